"""IA³ (Liu et al. 2022): what goes into or comes out of a module, times a vector that trains.

    model = ia3.wrap(model, targets=((r"block_.*/attn/(key|value)", "output"),
                                     (r"block_.*/mlp/down", "input")))

`ia3_scale`, as wide as what it multiplies, is at the module and starts at one. An output is
multiplied with its bias, as PEFT does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.adapters.wrapper import Adapted, Adapter, Call, Leaves, Module, around, chosen
from fmjax.errors import ConfigError
from fmjax.models import layers

SIDES = ("input", "output")


@dataclasses.dataclass(frozen=True)
class Ia3(Adapter):
    """Settings of `config.adapter`; the first target that matches a path decides."""

    targets: tuple[tuple[str, str], ...]

    def sites(self, modules: Mapping[str, Module]) -> dict[str, tuple[str, int]]:
        """{path: (side, width)}."""
        fits = lambda module: isinstance(module.module, layers.Linear | nn.Dense)
        found = chosen(modules, self.targets, fits, "Dense, Linear")
        width = lambda path, side: modules[path].leaves["kernel"][SIDES.index(side)]
        return {path: (side, width(path, side)) for path, side in found.items()}

    def start(self, site: tuple[str, int], key: jax.Array, own: Leaves) -> Leaves:
        return own | {"ia3_scale": jnp.ones(site[1])}

    def call(self, site: tuple[str, int], here: Call, x: jax.Array, *args: Any, **options: Any):
        scale = here.leaf("ia3_scale")
        times = lambda y: (y * scale.reshape(*[1] * (y.ndim - 1), -1)).astype(y.dtype)
        if site[0] == "input":
            return here.run(times(x), *args, **options)
        return times(here.run(x, *args, **options))

    def merge(self, site: tuple[str, int], own: Leaves) -> Leaves:
        own = dict(own)
        scale = own.pop("ia3_scale")
        if site[0] == "input":
            return own | {"kernel": own["kernel"] * scale.reshape(-1, 1)}
        bias = {"bias": own["bias"] * scale} if "bias" in own else {}
        return own | bias | {"kernel": own["kernel"] * scale.reshape(1, -1)}


def wrap(model: Any, *, targets: Sequence[tuple[str, str | None]]) -> Adapted:
    """`model`, a Linen module with `example()`, scaled at `targets`.

    A target is (expression over whole module paths, "input", "output" or None to leave out).

    Raises ConfigError for a target that decides nothing, or that is no matrix product.
    """
    for pattern, side in targets:
        if side and side not in SIDES:
            raise ConfigError(
                f"config.adapter.targets: {pattern!r} has {side!r}; possible are 'input', 'output' "
                "and None."
            )
    return around(model, Ia3(tuple((pattern, side or "") for pattern, side in targets)))
