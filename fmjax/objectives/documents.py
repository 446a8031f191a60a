"""Beginnings and ends of the documents in packed rows, for objectives that take them apart."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def begin(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The first column of the document of each token."""
    begins = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(begins, jnp.arange(segments.shape[1])[None], 0), axis=1)


def last(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The last column of the document of each token."""
    time = segments.shape[1]
    ends = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    return jax.lax.cummin(jnp.where(ends, jnp.arange(time)[None], time), axis=1, reverse=True)


def behind(chosen: Bool[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Number of chosen tokens after each token in its document."""
    count = jnp.cumsum(chosen, axis=1)
    return jnp.take_along_axis(count, last(segments), axis=1) - count
