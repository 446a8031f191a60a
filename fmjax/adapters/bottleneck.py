"""Bottleneck adapters: a narrow perceptron after a module, or beside it.

    model = bottleneck.wrap(model, targets=((r"block_.*/(attn/out|mlp/down)", None),), width=16)

| | targets | beside |
|---|---|---|
| Houlsby et al. 2019 | `block_.*/(attn/out\\|mlp/down)` | False |
| Pfeiffer et al. 2021 | `block_.*/mlp/down` | False |
| parallel (He et al. 2022) | `block_.*/mlp` | True |

y + s f(h D + d) U + u, where h is the module's output y, or `beside` its input. The parameters at
the module: `bottleneck_down` D, `bottleneck_down_bias` d, `bottleneck_up` U, `bottleneck_up_bias`
u. U and both biases start at zero, and so every output is exactly the base model's at first.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fmjax.adapters.wrapper import (
    Adapted,
    Adapter,
    Call,
    Leaves,
    Module,
    around,
    check_numbers,
    chosen,
)
from fmjax.models import layers
from fmjax.params import precision


@dataclasses.dataclass(frozen=True)
class Bottleneck(Adapter):
    """Settings of `config.adapter`; the first target that matches a path decides."""

    targets: tuple[tuple[str, int], ...]
    beside: bool = False
    activation: str = "relu"
    scale: float = 1.0  # s
    dropout: float = 0.0  # of h

    def sites(self, modules: Mapping[str, Module]) -> dict[str, tuple[int, int, int]]:
        """{path: (width of h, bottleneck, width of y)}."""
        found = {}
        for path, width in chosen(modules, self.targets, _fits, "modules of vectors").items():
            module = modules[path]
            inputs = module.inputs if self.beside else module.outputs
            found[path] = inputs[-1], width, module.outputs[-1]
        return found

    def start(self, site: tuple[int, int, int], key: jax.Array, own: Leaves) -> Leaves:
        inputs, width, outputs = site
        bound = inputs**-0.5
        return own | {
            "bottleneck_down": jax.random.uniform(key, (inputs, width), jnp.float32, -bound, bound),
            "bottleneck_down_bias": jnp.zeros(width),
            "bottleneck_up": jnp.zeros((width, outputs)),
            "bottleneck_up_bias": jnp.zeros(outputs),
        }

    def call(self, site: Any, here: Call, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        y = here.run(x, *args, **options)
        leaf = lambda name: here.leaf(f"bottleneck_{name}")
        h, dtype = layers.dropout(x if self.beside else y, self.dropout, here.seeds), x.dtype
        h = precision.add_bias(precision.linear(h, leaf("down"), dtype), leaf("down_bias"))
        h = layers.ACTIVATIONS[self.activation](h)
        h = precision.add_bias(precision.linear(h, leaf("up"), dtype), leaf("up_bias"))
        return (y + self.scale * h).astype(y.dtype)


def wrap(
    model: Any,
    *,
    targets: Sequence[tuple[str, int | None]],
    width: int = 32,
    beside: bool = False,
    activation: str = "relu",
    scale: float = 1.0,
    dropout: float = 0.0,
) -> Adapted:
    """`model`, a Linen module with `example()`, with an adapter at each of `targets`.

    A target is (expression over whole module paths, width); a width of None is that of `width`, 0
    leaves its modules out. Fits every module that gives vectors, and takes them if `beside`.

    Raises ConfigError for a target that decides nothing, or no such module.
    """
    check_numbers(targets)
    rows = tuple((pattern, width if own is None else own) for pattern, own in targets)
    return around(model, Bottleneck(rows, beside, activation, float(scale), dropout))


def _fits(module: Module) -> bool:
    return bool(module.inputs and module.outputs)
