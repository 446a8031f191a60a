"""Order without state: keyed hashes and permutations of integers, in constant memory."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

ROUNDS = 6
U = np.uint64
GOLDEN = U(0x9E3779B97F4A7C15)
Integers = np.ndarray | np.integer | int
Bits = np.ndarray | np.uint64


def hashed(*keys: Integers) -> Bits:
    """64 uniform bits for each combination of integer keys (arrays broadcast)."""
    value = GOLDEN
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        for key in keys:
            value = _mixed(value ^ (np.asarray(key).astype(U) + GOLDEN))
    return value


def uniform(*keys: Integers) -> np.ndarray | np.float64:
    """Floats in [0, 1) for each combination of integer keys."""
    return (hashed(*keys) >> U(11)).astype(np.float64) * 2.0**-53


def permuted(position: np.ndarray, size: int, *keys: Integers) -> np.ndarray:
    """Image of `position` (int64 in [0, size)) under the permutation of [0, size) named by `keys`
    (arrays broadcast).

    A Feistel network over pairs (l, r) in a × b, the smallest rectangle near a square that holds
    `size` numbers; walking its cycle until it falls below `size` restricts it, which one position
    in √size needs. The generalised Feistel construction of Black and Rogaway, "Ciphers with
    arbitrary finite domains" (2002).
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    with np.errstate(over="ignore"):
        key = hashed(*keys)
        rounds = [_mixed(key + U(i) * GOLDEN) for i in range(ROUNDS)]
        result = _feistel(np.asarray(position).astype(U), U(a), U(b), rounds)
        while (outside := result >= U(size)).any():
            result = np.where(outside, _feistel(result, U(a), U(b), rounds), result)
    return result.astype(np.int64)


def outside(position: Integers, ranges: Iterable[Sequence[int]]) -> np.ndarray:
    """The `position`-th number, from 0, that is in none of the `ranges`.

    These are (first, last + 1), in ascending order and apart.
    """
    position = np.asarray(position, np.int64)
    for first, end in ranges:
        position = np.where(position >= first, position + (end - first), position)
    return position


def _feistel(value: Bits, a: np.uint64, b: np.uint64, rounds: list[Bits]) -> Bits:
    right, left = np.divmod(value, a)
    for i, key in enumerate(rounds):
        if i % 2:
            right = (right + _mixed(left ^ key) % b) % b
        else:
            left = (left + _mixed(right ^ key) % a) % a
    return left + right * a


def _mixed(x: Bits) -> Bits:
    """The finaliser of splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators" (2014).
    """
    x = (x ^ (x >> U(30))) * U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U(27))) * U(0x94D049BB133111EB)
    return x ^ (x >> U(31))
