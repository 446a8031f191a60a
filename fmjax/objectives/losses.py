"""Losses of arrays, whichever objective they serve."""

from collections.abc import Mapping

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


def real_rows(batch: Mapping[str, jax.Array]) -> Float[Array, "B"]:
    """1 for an example, 0 for a row without `units` (B,), which fills the last batch."""
    return (batch["units"] > 0).astype(jnp.float32)


def each_label(
    logits: Float[Array, "B C"], batch: Mapping[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(sum, weight) of the mean cross-entropy in nats of the yes and no of each of `labels` (B, C),
    0 or 1, and of how often all of an example are right."""
    labels, weights = batch["labels"].astype(jnp.float32), real_rows(batch)
    nats = jnp.mean(jax.nn.softplus(logits) - labels * logits, axis=-1)
    right = jnp.all((logits > 0) == (labels > 0), axis=-1).astype(jnp.float32)
    weight = jnp.sum(weights)
    return {
        "loss": (jnp.sum(nats * weights), weight),
        "accuracy": (jnp.sum(right * weights), weight),
    }


def classification(
    logits: Float[Array, "B C"], batch: Mapping[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(sum, weight) of the cross-entropy in nats against `labels` (B,), and of the accuracy."""
    labels, weights = batch["labels"], real_rows(batch)
    right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    weight = jnp.sum(weights)
    return {
        "loss": (jnp.sum(cross_entropy(logits, labels) * weights), weight),
        "accuracy": (jnp.sum(right * weights), weight),
    }
