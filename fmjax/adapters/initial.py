"""Adapters that start from the weights of their base, made once after it is loaded.

| init | A and B | the base keeps |
|---|---|---|
| `pissa` | the largest singular values of W (Meng et al. 2024) | the rest of W |
| `loftq` | what quantizing W loses (Li et al. 2023) | W quantized |

Both change the base: what is trained from there belongs to the changed one alone. Under `pissa`
outputs are at first those of W to rounding, under `loftq` nearly so.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.adapters import low_rank, merge, quantise
from fmjax.adapters.wrapper import Adapted
from fmjax.errors import ConfigError
from fmjax.params import paths

Weight = Float[Array, "*I O"]
ROUNDS = 5  # of LoftQ's alternation


def _same(x: Any) -> Any:
    return x


def start(
    model: Adapted, params: paths.Tree, whole: Callable[[str], Any] | None = None
) -> paths.Tree:
    """`params` with base and adapter as `model.adapter.init` says, where they lay.

    `whole` gives a matrix of the base that is quantized in `params`, by its name, as it was.
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
    if isinstance(model.model, Adapted):
        made = _over_quantised(model, params, whole, function)
        return jax.tree.map(jax.device_put, made, places)
    changed = functools.partial(merge.changed, model, function=function)
    return jax.jit(changed, out_shardings=places)(params)


def _over_quantised(model, params, whole, function):
    """One matrix after the other, each whole only while it is its turn."""
    named, few = dict(paths.unstack(params)), model.model.sites()
    scheme = quantise.SCHEMES[model.model.adapter.name]

    @functools.partial(jax.jit, static_argnums=2)
    def pair(weight, leaves, scale):
        given = low_rank.Leaves(*leaves, scale)
        kept, found = function(weight, given, scheme.pack, scheme.unpack)
        return kept, (found.a, found.b, found.m)

    for path, site in model.sites().items():
        name, parts = f"{path}/{site.weight}", ("lora_a", "lora_b", "lora_m")
        leaves = [named.get(f"{path}/{part}") for part in parts]
        if path not in few:
            raise ConfigError(
                f"config.adapter.init={model.adapter.init!r} over config.quantise: {path} is "
                "adapted but not quantised. Give both the same targets."
            )
        kept, found = pair(jnp.asarray(whole(name)), leaves, site.scale)
        named |= {f"{name}/{part}": x for part, x in kept.items()}
        found = {f"{path}/{part}": x for part, x in zip(parts, found, strict=True)}
        named |= {name: x for name, x in found.items() if x is not None}
    return paths.stack(named, model.stacks)


def pissa(
    weight: Weight, leaves: low_rank.Leaves, pack: Callable = _same, unpack: Callable = _same
) -> tuple[Any, low_rank.Leaves]:
    """The weight without its principal part, as `pack` stores it, and the leaves whose product that
    part is."""
    found = _principal(weight, leaves)
    kept = pack(weight - low_rank.product(found))
    return kept, _keeping(unpack(kept), found)


def loftq(
    weight: Weight, leaves: low_rank.Leaves, pack: Callable | None = None, unpack: Callable = _same
) -> tuple[Any, low_rank.Leaves]:
    """The weight as `pack` (int4) leaves it, and leaves that make up for most of the loss.

    Quantising what the leaves lack, and fitting them to what quantizing loses, in turn.
    """
    pack = pack or int4
    found = leaves._replace(a=jnp.zeros_like(leaves.a), b=jnp.zeros_like(leaves.b))
    for _ in range(ROUNDS):
        kept = pack(weight - low_rank.product(found))
        found = _principal(weight - unpack(kept), leaves)
    return kept, _keeping(unpack(kept), found)


def int4(weight: Weight) -> Weight:
    """Rounded to 15 values, symmetric around zero, in blocks of inputs of one output."""
    outputs = weight.shape[-1]
    rows = weight.reshape(-1, outputs)
    padded = jnp.pad(rows, ((0, -len(rows) % quantise.BLOCK), (0, 0))).reshape(
        -1, quantise.BLOCK, outputs
    )
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


def _keeping(base: Weight, leaves: low_rank.Leaves) -> low_rank.Leaves:
    """`leaves`, with DoRA's magnitudes, which count from the norms of `base`, such that its factor
    is one."""
    if leaves.m is None:
        return leaves
    norm = lambda x: jnp.linalg.norm(x.reshape(-1, x.shape[-1]), axis=0)
    return leaves._replace(m=norm(base + low_rank.product(leaves)) - norm(base))
