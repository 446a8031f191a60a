"""Attention with linear biases (Press et al. 2022): no positions, but less of what is far away."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def slopes(heads: int) -> np.ndarray:
    """[N] 2^(-8 i / N) for i = 1 … N (§3). Where N is no power of two, those of the next lower one,
    and then every second of those of the next higher, as BLOOM has them."""
    below = 2 ** math.floor(math.log2(heads))
    geometric = lambda n: 2.0 ** (-8 / n * np.arange(1, n + 1))
    return np.concatenate([geometric(below), geometric(2 * below)[::2][: heads - below]])


def bias(
    heads: int, positions: Int[Array, "B T"], keys: Int[Array, "B S"], before: int = 0
) -> Float[Array, "B N T R"]:
    """-slope · distance, on either side, to be added to products of queries and keys; `before` keys
    at positions 0, 1, … are in front of those of the tokens."""
    front = jnp.broadcast_to(jnp.arange(before)[None], (len(keys), before))
    keys = jnp.concatenate([front, keys], axis=1)
    distance = jnp.abs(positions[:, :, None] - keys[:, None, :]).astype(jnp.float32)  # (B, T, S)
    return -jnp.asarray(slopes(heads), jnp.float32).reshape(1, -1, 1, 1) * distance[:, None]
