"""LoRA over any Linen model (Hu et al. 2021): y = x W + s (x A) B with W frozen.

    model = lora.wrap(model, targets=((r"block_.*/attn/(query|value)", 8),), alpha=16)
    params = state.init_params(model, key)       # the model's own, and .../lora_a, .../lora_b
    y = model.apply({"params": params}, *args)

The model's files know nothing of it: its calls are intercepted (`flax.linen.intercept_methods`) and
the path is added to the output of the modules that match. Their parameters lie beside the kernel:

| name | shape | at first |
|---|---|---|
| `lora_a` | (in, rank), a convolution's (*window, in, rank) | uniform in ±1/√in; a table's zero |
| `lora_b` | (rank, out) | zero; a table's normal |
| `lora_m` (DoRA) | (out,): magnitudes less the norms of the columns of W | zero |

So every output is exactly the base model's at first. What trains is up to `config.groups`; a group
with a learning rate of its own for `.*/lora_b` is LoRA+ (Hayou et al. 2024).
"""

import dataclasses
import functools
import inspect
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from fmjax import streams, trees
from fmjax.adapters import low_rank
from fmjax.errors import ConfigError, did_you_mean
from fmjax.models import layers

LEAVES = r".*/lora_[abm]"  # names of an adapter's parameters
# The modules that the path can be added to, and the parameter that it stands beside.
MATMULS: dict[type[nn.Module], str] = {
    layers.Linear: "kernel",
    nn.Dense: "kernel",
    nn.Conv: "kernel",
    layers.Embedding: "embedding",
    nn.Embed: "embedding",
}
# A stream of randomness for each module: present while a program is traced, never in a state.
_STREAM = "lora_stream"


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


@dataclasses.dataclass(frozen=True)
class Lora:
    """What `config.adapter` holds; the first target that matches a path decides."""

    targets: tuple[Target, ...]
    dropout: float = 0.0  # of x on the low-rank path, while training
    rslora: bool = False  # s = alpha / √rank (Kalajdzievski 2023), not alpha / rank
    dora: bool = False  # Liu et al. 2024
    init: str = "uniform"  # or as in `fmjax.adapters.initial`

    def target(self, path: str) -> Target | None:
        return next((t for t in self.targets if re.fullmatch(t.pattern, path)), None)

    def scale(self, target: Target) -> float:
        return target.alpha / (math.sqrt(target.rank) if self.rslora else target.rank)


def wrap(
    model: Any,
    *,
    targets: Sequence[tuple[str, int | None]],
    rank: int = 8,
    alpha: float = 16.0,
    scaling: str = "alpha/rank",
    **settings: Any,
) -> "Adapted":
    """`model`, a Linen module with `example()`, adapted at `targets`.

    A target is (expression over whole module paths, rank); a rank of None is that of `rank`. Paths
    are those of single layers, `block_07/attn/query`, however they are stacked.

    Raises ConfigError for a target that decides nothing, or that adapts what is no matrix product.
    """
    rows = tuple(Target(t, rank if r is None else r, float(alpha)) for t, r in targets)
    adapted = Adapted(model, Lora(rows, rslora=scaling == "rslora", **settings))
    adapted.sites()
    return adapted


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model and its adapter, with the interface of a model (`fmjax.models.AnyModel`)."""

    model: Any
    lora: Lora

    @property
    def cfg(self) -> Any:
        return self.model.cfg

    @property
    def stacks(self) -> Sequence[int] | None:
        return self.model.stacks

    @property
    def kinds(self) -> list[str]:
        """The model's own, told apart by what is adapted: one scan has one rank."""
        inside: list[list[tuple]] = [[] for _ in self.model.kinds]
        for name, site in self.sites().items():
            if match := re.match(r"block_(\d+)/(.*)", name):
                inside[int(match[1])].append((match[2], site.rank, site.scale))
        return [f"{kind} {sites}" for kind, sites in zip(self.model.kinds, inside, strict=True)]

    def example(self) -> tuple[Any, ...]:
        return self.model.example()

    def clone(self, **changes: Any) -> "Adapted":
        return dataclasses.replace(self, model=self.model.clone(**changes))

    def sites(self) -> dict[str, Site]:
        """{module path: what is adapted there}, paths of single layers."""
        return _sites(_canonical(self.model), self.lora)

    def init(self, key: jax.Array, *args: Any) -> dict[str, Any]:
        """Fresh variables. The model's own are what they are without an adapter, and a module's
        path decides its random numbers, so that neither depends on the stacking."""
        base = _canonical(self.model)
        variables = base.init(key, *args)
        params = variables["params"]
        if base is not self.model:
            params = trees.restack(params, self.model.stacks)
        return {**variables, "params": self.add(params, key)}

    def add(self, params: trees.Tree, key: jax.Array) -> trees.Tree:
        """The stored tree `params` of the model with fresh leaves of the adapter."""
        flat = trees.flatten(params)
        for path, site in self.places(params).items():
            names = trees.names(path)
            fresh = functools.partial(_fresh, site, self.lora.dora)
            keys = jnp.stack([jax.random.fold_in(key, _stream(name)) for name in names])
            leaves = jax.vmap(fresh)(keys) if trees.is_stacked(path) else fresh(keys[0])
            flat |= {f"{path}/{name}": leaf for name, leaf in leaves.items()}
        return trees.unflatten(flat)

    def places(self, params: trees.Tree) -> dict[str, Site]:
        """{stored path of an adapted module: its site}, in the stacks of the tree `params`."""
        sites, found = self.sites(), {}
        for path in trees.flatten(params):
            module, _, leaf = path.rpartition("/")
            site = sites.get(trees.names(module)[0])
            if site and leaf == site.weight:
                found[module] = site
        return found

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        method: Any = None,
        adapter_ids: Int[Array, "B"] | None = None,
        **options: Any,
    ) -> Any:
        """The model's `apply`, with the adapter.

        A method's argument `seeds`, one per example, turns the adapter's dropout on too; a method
        that has none runs without.

        With `adapter_ids`, for inference, the adapter's leaves have an axis of adapters before
        those in the table above (behind that of layers; `merge.combine` makes them), and example i
        uses adapter `adapter_ids[i]`. One that does not exist gives NaN.
        """
        seeds = self._seeds(method, args, options)
        if seeds is not None:
            variables = {**variables, "params": self._with_streams(variables["params"])}
        if adapter_ids is not None:
            # As an index, a negative number would count from the end.
            adapter_ids = jnp.where(adapter_ids < 0, jnp.iinfo(jnp.int32).max, adapter_ids)
        add = functools.partial(_intercept, self.lora, seeds, adapter_ids)
        with nn.intercept_methods(add):
            return self.model.apply(variables, *args, method=method, **options)

    def _seeds(self, method, args, options):
        """The argument `seeds` of the method, where it has one and something is dropped."""
        if not self.lora.dropout:
            return None
        function = method if callable(method) else getattr(type(self.model), method or "__call__")
        given = inspect.signature(function).bind_partial(self.model, *args, **options)
        seeds = given.arguments.get("seeds")
        return None if seeds is None else streams.named(seeds, "lora")

    def _with_streams(self, params):
        """A number for each adapted module beside its parameters: inside of a scan a module knows
        its layer by what is sliced for it alone."""
        flat = trees.flatten(params)
        for path in self.places(params):
            numbers = np.array([_stream(name) for name in trees.names(path)], np.uint32)
            numbers = jnp.asarray(numbers.view(np.int32))
            flat[f"{path}/{_STREAM}"] = numbers if trees.is_stacked(path) else numbers[0]
        return trees.unflatten(flat)


def _intercept(lora, seeds, adapter_ids, call, args, options, context):
    """Adds the path to `call(*args, **options)`, one call of a method of `context.module`."""
    module = context.module
    if context.method_name != "__call__" or not module.path:
        return call(*args, **options)
    path = trees.names("/".join(module.path))[0]
    target = lora.target(path)
    if _weight(module) is None or target is None or not target.rank:
        return call(*args, **options)
    leaf = lambda name: module.get_variable("params", name)
    if leaf("lora_a") is None:
        raise ValueError(f"{path} has no lora_a among the parameters: `Adapted.add` makes it.")
    leaves = low_rank.Leaves(
        leaf("lora_a"),
        leaf("lora_b"),
        leaf("lora_m"),
        lora.scale(target),
        lora.dropout,
        None if seeds is None else streams.fold(seeds, leaf(_STREAM)),
        adapter_ids,
    )
    weight, bias = leaf(_weight(module)), leaf("bias")
    finish = lambda base, path: low_rank.add(base, path, bias, weight, leaves)
    return _with_path(module, leaves, finish, call, *args, **options)


def _with_path(module, leaves, finish, call, x, out_dtype=None):
    """The output of an adapted module, rounded to its dtype once, after the sum."""
    if isinstance(module, layers.Linear):
        y = finish(call(x, jnp.float32), low_rank.linear(x, leaves, module.dtype))
        return y.astype(module.dtype if out_dtype is None else out_dtype)
    base = call(x)
    if isinstance(module, layers.Embedding | nn.Embed):
        path = low_rank.lookup(x, leaves)
    elif isinstance(module, nn.Conv):
        path = _convolved(module, leaves, x, base.dtype)
    else:
        path = low_rank.linear(x, leaves, base.dtype)
    return finish(base.astype(jnp.float32), path).astype(base.dtype)


def _convolved(module, leaves, x, dtype):
    """The module's own convolution with fewer channels, then a product."""
    if leaves.ids is not None:
        raise ValueError("Adapters of convolutions are not chosen by example: merge them.")
    narrow = module.clone(features=leaves.a.shape[-1], use_bias=False, name=None, parent=None)
    h = narrow.apply({"params": {"kernel": leaves.a}}, leaves.dropped(x))
    return low_rank.up(h, leaves, dtype)


def _fresh(site: Site, dora: bool, key: jax.Array) -> dict[str, jax.Array]:
    """The leaves of one module at first (Hu et al. 2021, section 4.1; bounds as in its code)."""
    *inputs, outputs = site.shape
    shapes = (*inputs, site.rank), (site.rank, outputs)
    if site.weight == "embedding":
        leaves = {"lora_a": jnp.zeros(shapes[0]), "lora_b": jax.random.normal(key, shapes[1])}
    else:
        bound = math.prod(inputs) ** -0.5
        first = jax.random.uniform(key, shapes[0], jnp.float32, -bound, bound)
        leaves = {"lora_a": first, "lora_b": jnp.zeros(shapes[1])}
    return leaves | ({"lora_m": jnp.zeros(outputs)} if dora else {})


def _stream(name: str) -> int:
    return zlib.crc32(name.encode())


def _canonical(model: Any) -> Any:
    """The model in its largest stacks, where it has any."""
    if not hasattr(model, "stacks"):
        return model
    whole = dict(start=0, stop=None) if hasattr(model, "start") else {}
    return model.clone(stacks=trees.runs(model.kinds), **whole)


@functools.cache  # asked for by every part of a run, and found by tracing the model
def _sites(model: Any, lora: Lora) -> dict[str, Site]:
    modules, used = _modules(model), set()
    sites, refused = {}, []
    for path, (module, leaves, shared) in modules.items():
        target, weight = lora.target(path), _weight(module)
        if target is None or not target.rank:
            used.add(target)
        elif weight and getattr(module, "feature_group_count", 1) == 1:
            used.add(target)
            scale = lora.scale(target)
            sites[path] = Site(weight, leaves[weight], target.rank, scale, shared)
        elif leaves:  # what has no parameters of its own only holds others
            refused.append(f"{path} ({type(module).__name__})")
    if refused:
        raise ConfigError(
            f"config.adapter.targets matches what is no matrix product: {', '.join(refused[:5])}. "
            f"Adapted can be {', '.join(sorted({kind.__name__ for kind in MATMULS}))}, ungrouped: "
            "make the expression narrower, or put (expression, 0) before it."
        )
    for target in lora.targets:
        if target not in used:
            possible = [path for path, (module, *_) in modules.items() if _weight(module)]
            raise ConfigError(
                f"config.adapter.targets: {target.pattern!r} decides no matrix product; earlier "
                "ones win, and an expression must match the whole path."
                + did_you_mean(target.pattern, possible)
            )
    if not sites:
        raise ConfigError("config.adapter.targets adapts nothing: every rank is 0.")
    return sites


def _weight(module: nn.Module) -> str | None:
    """The parameter of a module that the path can stand beside."""
    return next((weight for kind, weight in MATMULS.items() if isinstance(module, kind)), None)


def _modules(model: Any) -> dict[str, tuple[nn.Module, dict[str, tuple[int, ...]], bool]]:
    """{path: (module, shapes of its own parameters, is it a table read from elsewhere)}."""
    seen: dict[str, nn.Module] = {}
    running, shared = [], set()

    def record(call, args, options, context):
        if context.method_name not in ("__call__", "table", "attend"):
            return call(*args, **options)
        path = "/".join(context.module.path)
        if context.method_name != "__call__":
            shared.update({path} - set(running))
            return call(*args, **options)
        seen[path] = context.module
        running.append(path)
        out = call(*args, **options)
        running.pop()
        return out

    with nn.intercept_methods(record):
        init = lambda: model.init(jax.random.key(0), *model.example())["params"]
        flat = trees.flatten(jax.eval_shape(init))
    own: dict[str, dict[str, tuple[int, ...]]] = {path: {} for path in seen if path}
    for stored, leaf in flat.items():
        module, _, name = stored.rpartition("/")
        if module in own:
            own[module][name] = leaf.shape[1:] if trees.is_stacked(stored) else leaf.shape
    return {
        name: (seen[path], leaves, path in shared)
        for path, leaves in own.items()
        for name in trees.names(path)
    }
