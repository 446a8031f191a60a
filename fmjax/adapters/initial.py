"""Adapters that start from the weights of their base, made once after it is loaded.

| init | A and B | the base keeps |
|---|---|---|
| `pissa` | the largest singular values of W (Meng et al. 2024) | the rest of W |
| `loftq` | what quantising W loses (Li et al. 2023) | W quantised |

Both change the base: what is trained from there belongs to the changed one alone. Under `pissa`
outputs are at first those of W to rounding, under `loftq` nearly so.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax import trees
from fmjax.adapters import low_rank, merge
from fmjax.adapters.wrapper import Adapted
from fmjax.errors import ConfigError

Weight = Float[Array, "*I O"]
ROUNDS = 5  # of LoftQ's alternation
BLOCK = 64  # weights that share a scale


def start(model: Adapted, params: trees.Tree) -> trees.Tree:
    """`params` with base and adapter as `model.adapter.init` says, where they lay.

    Raises ConfigError for a rank above that of the weight.
    """
    init = model.adapter.init
    if init == "uniform":
        return params
    for path, site in model.sites().items():
        if site.rank > (most := min(math.prod(site.shape[:-1]), site.shape[-1])):
            raise ConfigError(
                f"config.adapter.init={init!r}: {path} has {most} singular values, fewer than its "
                f"rank {site.rank}. Lower it in config.adapter.targets or config.adapter.rank."
            )
    function = {"pissa": pissa, "loftq": loftq}[init]
    places = jax.tree.map(lambda x: x.sharding, params)
    changed = functools.partial(merge.changed, model, function=function)
    return jax.jit(changed, out_shardings=places)(params)


def pissa(weight: Weight, leaves: low_rank.Leaves) -> tuple[Weight, low_rank.Leaves]:
    """The weight without its principal part, and leaves whose product that is."""
    found = _principal(weight, leaves)
    return _keeping(weight - low_rank.product(found), found)


def loftq(
    weight: Weight, leaves: low_rank.Leaves, quantise: Callable[[Weight], Weight] | None = None
) -> tuple[Weight, low_rank.Leaves]:
    """The weight as `quantise` (int4) leaves it, and leaves that make up for most of the loss.

    Quantising what the leaves lack, and fitting them to what quantising loses, in turn.
    """
    quantise = quantise or int4
    found = leaves._replace(a=jnp.zeros_like(leaves.a), b=jnp.zeros_like(leaves.b))
    for _ in range(ROUNDS):
        base = quantise(weight - low_rank.product(found))
        found = _principal(weight - base, leaves)
    return _keeping(base, found)


def int4(weight: Weight) -> Weight:
    """Rounded to 15 values, symmetric around zero, in blocks of `BLOCK` inputs of one output."""
    outputs = weight.shape[-1]
    rows = weight.reshape(-1, outputs)
    padded = jnp.pad(rows, ((0, -len(rows) % BLOCK), (0, 0))).reshape(-1, BLOCK, outputs)
    step = jnp.max(jnp.abs(padded), axis=1, keepdims=True) / 7
    codes = jnp.round(padded / jnp.where(step > 0, step, 1))
    return (codes * step).reshape(-1, outputs)[: len(rows)].reshape(weight.shape)


def _principal(weight: Weight, leaves: low_rank.Leaves) -> low_rank.Leaves:
    """Leaves of the same rank whose product is nearest to the weight."""
    rank = leaves.a.shape[-1]
    u, s, v = jnp.linalg.svd(weight.reshape(-1, weight.shape[-1]), full_matrices=False)
    root = jnp.sqrt(s[:rank] / leaves.scale)
    a = (u[:, :rank] * root.reshape(1, -1)).reshape(leaves.a.shape)
    return leaves._replace(a=a, b=root.reshape(-1, 1) * v[:rank])


def _keeping(base: Weight, leaves: low_rank.Leaves) -> tuple[Weight, low_rank.Leaves]:
    """`base` and `leaves`; DoRA's magnitudes, which count from the norms of `base`, such that its
    factor is one."""
    if leaves.m is None:
        return base, leaves
    norm = lambda x: jnp.linalg.norm(x.reshape(-1, x.shape[-1]), axis=0)
    return base, leaves._replace(m=norm(base + low_rank.product(leaves)) - norm(base))
