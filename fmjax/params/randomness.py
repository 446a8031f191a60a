"""Addressable randomness: a random number is a pure function of (key, example, stream, element).

JAX's own generator gives one key for a whole array, so a draw depends on the shape of the batch it
is made in, and on a CPU it costs seven times the matrix product beside it. Here every *example*
carries its own 64-bit seed, derived from the step's key and the example's index, and elements are
hashed from it by counters. A dropout mask or an MLM mask then does not change when the batch is
split over devices, processes or accumulation steps, and it costs a few integer operations that XLA
fuses into whatever uses them, so nothing is stored for the backward pass.

The hash is the two-round multiply-xorshift finaliser with the constants of C. Wellons' search for
low-bias 32-bit functions ("Prospecting for Hash Functions", 2018: lowbias32).
"""

import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

Seeds = UInt32[Array, "B 2"]


def seeds(key: jax.Array, index: Int[Array, "B"]) -> Seeds:
    """One 64-bit seed per example, from a scalar typed `key` and its `index` in the run."""
    words = jax.random.key_data(key).astype(jnp.uint32)
    index = index.astype(jnp.uint32)
    low = _hash(index ^ words[0])
    return jnp.stack([low, _hash(low + words[1])], axis=-1)


def fold(seeds: Seeds, data: int | Int[Array, ""]) -> Seeds:
    """The seeds of a named stream: `data` is a layer number or a site number."""
    data = jnp.asarray(data, jnp.uint32)
    low = _hash(seeds[:, 0] + data * jnp.uint32(0x9E3779B9))
    return jnp.stack([low, _hash(seeds[:, 1] ^ low)], axis=-1)


def named(seeds: Seeds, name: str) -> Seeds:
    """The seeds of a stream that is known by name ("dropout", "mlm")."""
    return fold(seeds, zlib.crc32(name.encode()))


def bits(
    seeds: Seeds, shape: tuple[int, ...], strides: Sequence[int] = ()
) -> UInt32[Array, "B *shape"]:
    """32 random bits for each element of a (B, *shape) array.

    An element is known by its place in the array, or by the sum of index times stride, which stays
    what it is in an array with longer axes.
    """
    rest = len(shape)
    if strides:
        each = (jax.lax.broadcasted_iota(jnp.uint32, shape, i) for i in range(rest))
        counter = sum(x * jnp.uint32(s) for x, s in zip(each, strides, strict=True))[None]
    else:
        counter = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(1, *shape)
    first, second = (seeds[:, i].reshape(-1, *[1] * rest) for i in (0, 1))
    return _hash(_hash(counter + first) ^ second)


def uniform(seeds: Seeds, shape: tuple[int, ...]) -> Float[Array, "B *shape"]:
    """Uniform float32 in [0, 1), 24 bits each."""
    return (bits(seeds, shape) >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def bernoulli(
    seeds: Seeds, rate: float, shape: tuple[int, ...], strides: Sequence[int] = ()
) -> Bool[Array, "B *shape"]:
    """True with probability `rate`, exact to 2**-32."""
    return bits(seeds, shape, strides) < jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def _hash(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
