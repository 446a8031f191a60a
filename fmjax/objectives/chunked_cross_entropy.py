"""Cross-entropy over a vocabulary in pieces, so that the logits of a batch never exist at once.

Over 50,000 tokens they are the largest array of a step by far. Each piece of the columns is
projected, judged and, where the loss is differentiated, projected back on the spot: the gradient is
that of the sum, which is known before the backward pass begins. It takes the three products that
any way takes, and neither keeps logits nor computes them again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fmjax.params import precision, sharding

LOGITS_BYTES = 2**26  # of a piece on a device


class Sums(NamedTuple):
    """Over the targets, each by its weight."""

    loss: Float[Array, ""]  # what is minimised
    nats: Float[Array, ""]  # cross-entropy
    right: Float[Array, ""]  # how many have the largest logit


class _How(NamedTuple):
    """The arguments that are not arrays."""

    out_in: bool
    spec: P
    dtype: DTypeLike
    softcap: float
    z_loss: float
    smoothing: float


def sums(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "V D"] | Float[Array, "D V"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    out_in: bool,
    spec: P,
    dtype: DTypeLike,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> Sums:
    """Sums of what `hidden @ kernel` says of the labels; only `loss` has a gradient.

    Args:
        out_in, spec, dtype: as in `precision.linear`.
        softcap: c, where logits are c tanh(product / c); 0: the product.
        z_loss: factor of log² of the partition function (PaLM, Chowdhery et al. 2022, §5: 1e-4).
        smoothing: share of the target that is spread evenly over the vocabulary (Szegedy et al.
            2016, §7).
    """
    how = _How(out_in, spec, dtype, softcap, z_loss, smoothing)
    return _sums(how, hidden, kernel, labels, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(how, hidden, kernel, labels, weights):
    return _run(how, hidden, kernel, labels, weights, (False, False))[0]


def _forward(how, hidden, kernel, labels, weights):
    wanted = hidden.perturbed, kernel.perturbed
    values = (x.value for x in (hidden, kernel, labels, weights))
    sums, dhidden, dkernel = _run(how, *values, wanted)
    return sums, (dhidden, dkernel)


def _backward(how, gradients, g):
    scale = 0.0 if isinstance(g.loss, jax.custom_derivatives.SymbolicZero) else g.loss
    times = lambda x: (x * scale).astype(x.dtype)
    parts = (None if isinstance(x, tuple) else times(x) for x in gradients)
    return *parts, None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(how, hidden, kernel, labels, weights, wanted):
    """(sums, gradient of `hidden`, of `kernel`), of which () what is not `wanted`."""
    whole = sharding.gather(kernel.astype(how.dtype), how.spec)
    function = functools.partial(_rows, how, wanted)
    return sharding.each_and_sums(function, how.spec, whole, hidden, labels, weights)


def _rows(how, wanted, kernel, hidden, labels, weights):
    """The same of the rows of one device."""
    rows, time, width = hidden.shape
    vocabulary = kernel.shape[0 if how.out_in else 1]
    columns = max(LOGITS_BYTES // (4 * rows * vocabulary), 1)
    pieces = -(-time // columns)
    columns = -(-time // pieces)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, pieces * columns - time), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(rows, pieces, columns, *x.shape[2:]).swapaxes(0, 1)

    def piece(carry, part):
        sums, dkernel = carry
        found, dlogits, hidden = _judged(how, kernel, *part)
        sums = jax.tree.map(jnp.add, sums, found)
        dhidden = ()
        if wanted[0]:
            dhidden = precision.dot(dlogits, kernel, ((2,), (0 if how.out_in else 1,)))
            dhidden = dhidden.astype(part[0].dtype)
        if wanted[1]:
            flat = lambda x: precision.transposed(x.reshape(-1, x.shape[-1]))
            left, right = (dlogits, hidden) if how.out_in else (hidden, dlogits)
            dkernel += precision.dot(flat(left), right.reshape(-1, right.shape[-1]), ((1,), (0,)))
        return (sums, dkernel), dhidden

    zero = Sums(*[jnp.zeros((), jnp.float32)] * 3)
    start = zero, jnp.zeros(kernel.shape, jnp.float32) if wanted[1] else ()
    (sums, dkernel), dhidden = jax.lax.scan(
        piece, start, tuple(map(cut, (hidden, labels, weights)))
    )
    if wanted[0]:
        dhidden = dhidden.swapaxes(0, 1).reshape(rows, pieces * columns, width)[:, :time]
    return sums, dhidden, dkernel


def _judged(how, kernel, hidden, labels, weights):
    """(sums, gradient of the logits, `hidden`) of one piece, the latter as operands."""
    hidden = hidden.astype(how.dtype)
    logits = precision.dot(hidden, kernel, ((2,), (1 if how.out_in else 0,)))  # (B, C, V)
    if how.softcap:
        logits = how.softcap * jnp.tanh(logits / how.softcap)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    log_total = jnp.log(total) + top
    target = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    nats = (log_total - target)[..., 0]
    loss = nats + how.z_loss * jnp.square(log_total[..., 0])
    if how.smoothing:
        loss += how.smoothing * (target[..., 0] - jnp.mean(logits, axis=-1))
    right = (target == top)[..., 0].astype(jnp.float32)
    sums = Sums(*(jnp.sum(weights * x) for x in (loss, nats, right)))
    places = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 2)
    at_label = jnp.where(places == labels[..., None], 1 - how.smoothing, 0.0)
    dlogits = exponentials * ((1 + 2 * how.z_loss * log_total) / total) - at_label
    dlogits -= how.smoothing / logits.shape[-1]
    if how.softcap:
        dlogits *= 1 - jnp.square(logits / how.softcap)
    return sums, (dlogits * weights[..., None]).astype(how.dtype), hidden


def of(apply: Any, params: Any, hidden: jax.Array, *targets: jax.Array, **how: Any) -> Sums:
    """`sums` with the vocabulary of a model."""
    matrix = apply(params, method="vocabulary")
    told = matrix._asdict() | how
    return sums(hidden, told.pop("kernel"), *targets, **told)
