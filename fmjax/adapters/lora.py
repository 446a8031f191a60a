"""LoRA over any Linen model (Hu et al. 2021): y = x W + s (x A) B with W frozen.

    model = lora.wrap(model, targets=((r"block_.*/attn/(query|value)", 8),), alpha=16)
    params = state.init_params(model, key)       # the model's own, and .../lora_a, .../lora_b
    y = model.apply({"params": params}, *args)

The path is added to the output of the modules that match (`fmjax.adapters.wrapper`). Its parameters
are beside the kernel:

| name | shape | at first |
|---|---|---|
| `lora_a` | (in, rank), a convolution's (*window, in, rank) | uniform in ±1/√in; a table's zero |
| `lora_b` | (rank, out) | zero; a table's normal |
| `lora_m` (DoRA) | (out,): magnitudes less the norms of the columns of W | zero |

So every output is exactly the base model's at first. What trains is up to `config.groups`; a group
with a learning rate of its own for `.*/lora_b` is LoRA+ (Hayou et al. 2024).
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.adapters import low_rank, quantise
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
from fmjax.errors import ConfigError, did_you_mean
from fmjax.models import layers, trunk
from fmjax.params import precision

# The modules that the path can be added to, and the parameter that it stands beside.
MATMULS: dict[type[nn.Module], str] = {
    layers.Linear: "kernel",
    nn.Dense: "kernel",
    nn.Conv: "kernel",
    layers.Embedding: "embedding",
    nn.Embed: "embedding",
    trunk.Output: "kernel",
}

INITS = ("uniform", "pissa", "loftq")


class Target(NamedTuple):
    """Modules whose whole path matches `pattern`; rank 0 adapts nothing."""

    pattern: str
    rank: int
    alpha: float


class Site(NamedTuple):
    """A module that is adapted."""

    weight: str  # its parameter, "kernel" or "embedding"
    shape: tuple[int, ...]  # of the weight: (in, out), (rows, features), (*window, in, out)
    rank: int
    scale: float  # s
    shared: bool  # a table that the model also reads otherwise, for its output
    output: bool  # the matrix of an output, whose product is taken elsewhere


@dataclasses.dataclass(frozen=True)
class Lora(Adapter):
    """Settings of `config.adapter`; the first target that matches a path decides."""

    targets: tuple[Target, ...]
    dropout: float = 0.0  # of x on the low-rank path, while training
    rslora: bool = False  # s = alpha / √rank (Kalajdzievski 2023), not alpha / rank
    dora: bool = False  # Liu et al. 2024
    init: str = "uniform"  # or as in `fmjax.adapters.initial`
    by_example = True

    def target(self, path: str) -> Target | None:
        return next((t for t in self.targets if re.fullmatch(t.pattern, path)), None)

    def scale(self, target: Target) -> float:
        return target.alpha / (math.sqrt(target.rank) if self.rslora else target.rank)

    def sites(self, modules: Mapping[str, Module]) -> dict[str, Site]:
        rows = [(target.pattern, target if target.rank else 0) for target in self.targets]
        kinds = sorted({kind.__name__ for kind in MATMULS})
        found = {}
        for path, target in chosen(modules, rows, _fits, f"{', '.join(kinds)}, ungrouped").items():
            module = modules[path]
            weight = _weight(module.module)
            shape, scale = module.leaves[weight], self.scale(target)
            output = isinstance(module.module, trunk.Output)
            found[path] = Site(weight, shape, target.rank, scale, module.shared, output)
        return found

    def start(self, site: Site, key: jax.Array, own: Leaves) -> Leaves:
        """As in section 4.1 of Hu et al. 2021, with the bounds of its code."""
        *inputs, outputs = site.shape
        shapes = (*inputs, site.rank), (site.rank, outputs)
        if site.weight == "embedding":
            leaves = {"lora_a": jnp.zeros(shapes[0]), "lora_b": jax.random.normal(key, shapes[1])}
        else:
            bound = math.prod(inputs) ** -0.5
            first = jax.random.uniform(key, shapes[0], jnp.float32, -bound, bound)
            leaves = {"lora_a": first, "lora_b": jnp.zeros(shapes[1])}
        return own | leaves | ({"lora_m": jnp.zeros(outputs)} if self.dora else {})

    def call(self, site: Site, here: Call, *args: Any, **options: Any) -> Any:
        if here.leaf("lora_a") is None:
            path = "/".join(here.module.path)
            raise ValueError(f"{path} has no lora_a among the parameters: `Adapted.add` makes it.")
        leaves = low_rank.Leaves(
            here.leaf("lora_a"),
            here.leaf("lora_b"),
            here.leaf("lora_m"),
            site.scale,
            self.dropout,
            here.seeds,
            here.adapter_ids,
        )
        if site.output:
            return _of_vocabulary(here.run(), leaves)
        weight = quantise.dense(here.leaf(site.weight)) if self.dora else None
        finish = lambda base, path: low_rank.add(base, path, here.leaf("bias"), weight, leaves)
        return _with_path(here.module, leaves, finish, here.run, *args, **options)

    def merge(self, site: Site, own: Leaves) -> Leaves:
        if site.shared:
            raise ConfigError(
                "is adapted where it is looked up, and the output of the model reads the same "
                "table, which merging would change: leave it out of config.adapter.targets, or "
                "keep the adapter apart."
            )
        own = dict(own)
        leaves = (own.pop(name, None) for name in ("lora_a", "lora_b", "lora_m"))
        return own | {
            site.weight: low_rank.merged(own[site.weight], low_rank.Leaves(*leaves, site.scale))
        }


def wrap(
    model: Any,
    *,
    targets: Sequence[tuple[str, int | None]],
    rank: int = 8,
    alpha: float = 16.0,
    scaling: str = "alpha/rank",
    dropout: float = 0.0,
    dora: bool = False,
    init: str = "uniform",
) -> Adapted:
    """`model`, a Linen module with `example()`, adapted at `targets`.

    A target is (expression over whole module paths, rank); a rank of None is that of `rank`. Paths
    are those of single layers, `block_07/attn/query`, however they are stacked.

    Raises ConfigError for a target that decides nothing, or that adapts what is no matrix product.
    """
    if init not in INITS:
        raise ConfigError(f"config.adapter.init={init!r} is not known.{did_you_mean(init, INITS)}")
    check_numbers(targets)
    rows = tuple(Target(t, rank if r is None else r, float(alpha)) for t, r in targets)
    adapted = around(model, Lora(rows, dropout, scaling == "rslora", dora, init))
    outputs = [path for path, site in adapted.sites().items() if site.output]
    if dropout and outputs:
        raise ConfigError(
            f"config.adapter.dropout={dropout} has no place in an adapter of the output matrix: "
            f"set it to 0, or put ({outputs[0]!r}, 0) first in config.adapter.targets."
        )
    return adapted


def _with_path(module, leaves, finish, call, x, out_dtype=None, **options):
    """The output of an adapted module, rounded to its dtype once, after the sum."""
    if isinstance(module, layers.Linear):
        y = finish(call(x, jnp.float32), low_rank.linear(x, leaves, module.dtype))
        return y.astype(module.dtype if out_dtype is None else out_dtype)
    base = call(x, **options)
    if isinstance(module, layers.Embedding | nn.Embed):
        path = low_rank.lookup(x, leaves)
    elif isinstance(module, nn.Conv):
        path = _convolved(module, leaves, x, base.dtype)
    else:
        path = low_rank.linear(x, leaves, base.dtype)
    return finish(base.astype(jnp.float32), path).astype(base.dtype)


def _of_vocabulary(vocabulary: trunk.Vocabulary, leaves: low_rank.Leaves) -> trunk.Vocabulary:
    """The output matrix W + s A B, since losses over a vocabulary take one matrix in pieces."""
    if leaves.ids is not None:
        raise ConfigError("Adapters of the output matrix are not chosen by example: merge them.")
    kernel = vocabulary.kernel
    if isinstance(kernel, precision.Rows):
        kernel = kernel.rows(jnp.arange(len(kernel.matrix))).T
    return vocabulary._replace(kernel=low_rank.merged(kernel, leaves))


def _convolved(module, leaves, x, dtype):
    """The module's own convolution with fewer channels, then a product."""
    if leaves.ids is not None:
        raise ValueError("Adapters of convolutions are not chosen by example: merge them.")
    narrow = module.clone(features=leaves.a.shape[-1], use_bias=False, name=None, parent=None)
    h = narrow.apply({"params": {"kernel": leaves.a}}, leaves.dropped(x))
    return low_rank.up(h, leaves, dtype)


def _weight(module: nn.Module) -> str | None:
    """The parameter of a module that the path can stand beside."""
    return next((weight for kind, weight in MATMULS.items() if isinstance(module, kind)), None)


def _fits(module: Module) -> bool:
    ungrouped = getattr(module.module, "feature_group_count", 1) == 1
    return _weight(module.module) is not None and ungrouped
