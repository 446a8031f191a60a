"""Prefix tuning: keys and values that train, before those of the tokens, in every layer.

    model = prefix.wrap(model, length=20)

Plain (P-tuning v2: Liu et al. 2022) each layer has its own; with `hidden`, all are made of one
short sequence by a perceptron, whose last matrix is the layer's (Li and Liang 2021, section 4.3).
They have the first positions, and are gone once attention has seen them.

| name | shape | at first |
|---|---|---|
| `block_…/attn/memory/prefix_values` | (2, P, D): keys, values | normal with deviation 0.02 |
| with `hidden`: `embed/prefix_tokens` | (P, D) | normal with deviation 0.02 |
| `embed/prefix_up_kernel`, `_bias` | (D, hidden) | uniform in ±1/√in; zero |
| `block_…/attn/memory/prefix_kernel`, `_bias` | (hidden, 2 D) | uniform in ±1/√in; zero |

Letters: B batch, N heads, T time, H head size, D = N H, P length of the prefix.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmjax.adapters.wrapper import Adapted, Adapter, Call, Leaves, Module, around
from fmjax.errors import ConfigError
from fmjax.models import layers
from fmjax.params import paths, precision

SHARED = "embed"  # module at which the sequence of all layers is
_HIDDEN = "prefix_hidden"  # what the perceptron gives: present while a program is traced


@dataclasses.dataclass(frozen=True)
class Prefix(Adapter):
    """Settings of `config.adapter`."""

    length: int
    hidden: int = 0  # width of the perceptron; 0: none

    @property
    def positions(self) -> int:
        return self.length

    def sites(self, modules: Mapping[str, Module]) -> dict[str, Any]:
        """The model; each attention with its heads and their size; what all share, with D."""
        found = {
            path: ("layer", module.inputs[1], module.inputs[3])
            for path, module in modules.items()
            if isinstance(module.module, layers.Memory)
        }
        if not found:
            raise ConfigError("config.adapter.name='prefix' needs attention (layers.Memory).")
        width = max(heads * size for _, heads, size in found.values())
        shared = {SHARED: ("shared", width)} if self.hidden else {}
        return {"": ("model",), **shared, **found}

    def start(self, site: Any, key: jax.Array, own: Leaves) -> Leaves:
        kind, *sizes = site
        one, two = jax.random.split(key)
        uniform = functools.partial(_uniform, two)
        if kind == "shared":
            tokens = 0.02 * jax.random.normal(one, (self.length, *sizes))
            new = {"prefix_tokens": tokens, "prefix_up_bias": jnp.zeros(self.hidden)}
            return own | new | {"prefix_up_kernel": uniform(sizes[0], self.hidden)}
        width = sizes[0] * sizes[1]
        if not self.hidden:
            return own | {"prefix_values": 0.02 * jax.random.normal(one, (2, self.length, width))}
        new = {"prefix_kernel": uniform(self.hidden, 2 * width)}
        return own | new | {"prefix_bias": jnp.zeros(2 * width)}

    def prepare(self, params: paths.Tree, places: Mapping[str, Any]) -> paths.Tree:
        if not self.hidden:
            return params
        flat = paths.flatten(params)
        leaf = lambda name: flat[f"{SHARED}/prefix_{name}"]
        h = jnp.tanh(precision.affine(leaf("tokens"), leaf("up_kernel"), leaf("up_bias")))
        for path, (kind, *_) in places.items():
            if kind == "layer":
                copies = [len(paths.names(path))] if paths.is_stacked(path) else []
                flat[f"{path}/{_HIDDEN}"] = jnp.broadcast_to(
                    h.reshape(*[1] * len(copies), *h.shape), (*copies, *h.shape)
                )
        return paths.unflatten(flat)

    def call(self, site: Any, here: Call, *args: Any, **options: Any) -> Any:
        kind, *sizes = site
        if kind == "layer":
            return self._extended(here.leaf, sizes, *here.run(*args, **options))
        if kind == "shared" or here.method != "encode":
            return here.run(*args, **options)
        given = here.arguments(*args, **options)
        return here.run(**given | {"positions": given["positions"] + self.length})

    def values(self, leaf: Any) -> jax.Array:
        """(2, P, D): keys and values of one layer, of the parameters that `leaf` gives."""
        if not self.hidden:
            return leaf("prefix_values")
        both = precision.affine(leaf(_HIDDEN), leaf("prefix_kernel"), leaf("prefix_bias"))
        return both.reshape(self.length, 2, -1).swapaxes(0, 1)

    def _extended(self, leaf, sizes, k, v, may_see):
        """As `layers.Memory` gives them, with the prefix in front, which all see who see any."""
        heads, size = sizes
        rows = self.values(leaf).reshape(2, 1, self.length, heads, size).swapaxes(2, 3)
        front = jnp.broadcast_to(rows, (2, len(k), *rows.shape[2:])).astype(k.dtype)
        seen = jnp.any(may_see, axis=-1, keepdims=True)
        seen = jnp.broadcast_to(seen, (*may_see.shape[:-1], self.length))
        join = lambda first, second, axis: jnp.concatenate([first, second], axis=axis)
        return join(front[0], k, 2), join(front[1], v, 2), join(seen, may_see, 3)


def wrap(model: Any, *, length: int, hidden: int = 0) -> Adapted:
    """`model`, with attention through `layers.Memory`, and a prefix of `length` in each layer.

    Raises ConfigError for a model that has none, and for a prefix that leaves no room.
    """
    return around(model, Prefix(length, hidden))


def _uniform(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
    bound = inputs**-0.5
    return jax.random.uniform(key, (inputs, outputs), jnp.float32, -bound, bound)
