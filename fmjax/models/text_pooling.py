"""One vector for a whole text, of the hidden states of its tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def pooled(
    hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, pool: str
) -> Float[Array, "B D"]:
    """The vector of a whole sequence, in float32: of its "first" token, its "last", or over all
    tokens the "mean", the "max", the "weighted_mean" (by place, from 1) or the "sum_over_sqrt" of
    how many there are. Without `segment_ids` no position is padding."""
    if segment_ids is None:
        segment_ids = jnp.ones(hidden.shape[:2], jnp.int32)
    if pool == "first":
        return hidden[:, 0].astype(jnp.float32)
    if pool == "last":
        time = segment_ids.shape[1]
        last = time - 1 - jnp.argmax(segment_ids[:, ::-1] > 0, axis=1)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    hidden, real = hidden.astype(jnp.float32), (segment_ids > 0).astype(jnp.float32)[..., None]
    if pool == "max":
        return jnp.max(jnp.where(real > 0, hidden, -jnp.inf), axis=1)
    if pool == "weighted_mean":
        real = real * jnp.cumsum(real, axis=1)
    total, weight = jnp.sum(hidden * real, axis=1), jnp.maximum(jnp.sum(real, axis=1), 1.0)
    return total / (jnp.sqrt(weight) if pool == "sum_over_sqrt" else weight)
