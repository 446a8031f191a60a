"""Losses of arrays, whichever objective they serve."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def cross_entropy(logits: Float[Array, "*B V"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """-log softmax(logits)[labels], in nats, each label in [0, V).

    Over a vocabulary the logits are the largest array of a step. The backward pass keeps their
    exponentials alone and makes the gradient of them in one pass, where the derived one keeps the
    logits too, fills an array of that size with zeros and scatters into it.
    """
    return _cross_entropy_forward(logits, labels)[0]


def _cross_entropy_forward(logits, labels):
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    target = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    nats = (jnp.log(total) + (top - target))[..., 0]
    return nats, (exponentials, total, labels)


def _cross_entropy_backward(residuals, g):
    exponentials, total, labels = residuals
    g = g[..., None]
    places = jax.lax.broadcasted_iota(labels.dtype, exponentials.shape, exponentials.ndim - 1)
    at_label = jnp.where(places == labels[..., None], g, jnp.zeros((), g.dtype))
    return exponentials * (g / total) - at_label, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
