"""A model and an adapter around it, whatever the model and whatever the adapter.

The model's files know nothing of adapters: calls of its modules are intercepted
(`flax.linen.intercept_methods`), and an adapter computes something beside, before or instead of
them. Names of the model's parameters stay; an adapter's own are beside those of its modules, under
names that `LEAVES` tells apart. A wrapper is a model again, so that wrappers nest: a LoRA over a
quantized base is `Adapted(Adapted(model, nf4), lora)`.
"""

import dataclasses
import functools
import inspect
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from fmjax.errors import ConfigError, did_you_mean
from fmjax.params import paths, randomness

LEAVES = r".*/(lora|ia3|bottleneck|prompt|prefix)_\w+"  # names of the parameters that adapters add
# A stream of randomness for each module: present while a program is traced, never in a state.
_STREAM = "adapter_stream"

Leaves = dict[str, Any]  # a module's own parameters by their last name


class Module(NamedTuple):
    """A module of a model, as tracing the model shows it."""

    module: nn.Module
    leaves: dict[str, tuple[int, ...]]  # shapes of its own parameters
    shared: bool  # a table that the model also reads otherwise, for its output
    inputs: tuple[int, ...]  # shape of its first argument; (): not numbers
    outputs: tuple[int, ...]


class Call(NamedTuple):
    """One call of a module that an adapter has to do with."""

    module: nn.Module
    method: str  # `__call__`; of the whole model any
    run: Callable[..., Any]  # what the module itself computes
    seeds: randomness.Seeds | None  # of the adapter here; None: deterministic
    adapter_ids: Int[Array, "B"] | None

    def leaf(self, name: str) -> Any:
        """A parameter that is at the module, None where it has none of that name."""
        return self.module.get_variable("params", name)

    def arguments(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Those of the call by their names."""
        function = getattr(type(self.module), self.method)
        given = inspect.signature(function).bind_partial(self.module, *args, **options)
        return dict(list(given.arguments.items())[1:])


class Adapter:
    """The settings of an adapter, a frozen dataclass, and what it does at one module."""

    dropout = 0.0
    by_example = False  # whether each example can have its own
    keeps = False  # whether it is how the base is kept, which another may stand beside
    positions = 0  # of the model's that it takes, in front of those of the tokens

    def sites(self, modules: Mapping[str, Module]) -> Mapping[str, Any]:
        """{path: what the adapter has to know there}, paths of single layers; that of the whole
        model is empty."""
        raise NotImplementedError

    def start(self, site: Any, key: jax.Array, own: Leaves) -> Leaves:
        """The parameters at a module in the place of its `own`, fresh from `key`."""
        return own

    def prepare(self, params: paths.Tree, places: Mapping[str, Any]) -> paths.Tree:
        """The stored tree as the modules are to find it; `places` are stored paths of modules."""
        return params

    def call(self, site: Any, here: Call, *args: Any, **options: Any) -> Any:
        """Output of the module with the adapter."""
        raise NotImplementedError

    def check_by_example(self) -> None:
        """Raises ConfigError for an adapter that all examples of a batch share."""
        if not self.by_example:
            raise ConfigError(
                f"{type(self).__name__} is one adapter for all examples of a batch; LoRA can be "
                "chosen by example, merged and taken out again."
            )

    def merge(self, site: Any, own: Leaves) -> Leaves:
        """The module's own parameters that give the same without the adapter.

        Raises ConfigError where there are none.
        """
        raise ConfigError(
            "has an adapter that no weight of the base can stand for: it cannot be merged. Write "
            "it alone with config.merge=False if PEFT has its kind, or keep the run's folder."
        )


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model and its adapter, with the interface of a model (`fmjax.models.AnyModel`)."""

    model: Any
    adapter: Adapter

    @property
    def cfg(self) -> Any:
        return self.model.cfg

    @property
    def causal(self) -> bool:
        return self.model.causal

    @property
    def decodes(self) -> bool:
        return self.model.decodes

    @property
    def encoded(self) -> int:
        return self.model.encoded

    @property
    def inputs(self) -> Sequence[str]:
        return self.model.inputs

    @property
    def stacks(self) -> Sequence[int] | None:
        return self.model.stacks

    @property
    def kinds(self) -> list[str]:
        """The model's own, told apart by what is adapted: one scan has one rank."""
        inside: list[list[tuple]] = [[] for _ in self.model.kinds]
        for name, site in self.sites().items():
            if place := paths.layer(name):
                inside[place.index].append((place.rest, site))
        return [f"{kind} {sites}" for kind, sites in zip(self.model.kinds, inside, strict=True)]

    def example(self) -> tuple[Any, ...]:
        return self.model.example()

    def clone(self, **changes: Any) -> "Adapted":
        return dataclasses.replace(self, model=self.model.clone(**changes))

    def sites(self) -> Mapping[str, Any]:
        """{module path: what is adapted there}, paths of single layers."""
        return _sites(_canonical(base(self.model)), self.adapter)

    def init(self, key: jax.Array, *args: Any) -> dict[str, Any]:
        """Fresh variables. The model's own are what they are without an adapter, and a module's
        path decides its random numbers, so that neither depends on the stacking."""
        inner = _canonical(self.model)
        variables = inner.init(key, *args)
        params = variables["params"]
        if inner is not self.model:
            params = paths.restack(params, self.model.stacks)
        return {**variables, "params": self.add(params, key)}

    def add(self, params: paths.Tree, key: jax.Array) -> paths.Tree:
        """The stored tree `params` of the model with what the adapter starts with."""
        flat = paths.flatten(params)
        for path, site in self.places(params).items():
            names = paths.names(path)
            own = take(flat, path)
            keys = jnp.stack([jax.random.fold_in(key, _stream(name)) for name in names])
            start = functools.partial(self.adapter.start, site)
            each = jax.vmap(start) if paths.is_stacked(path) else start
            leaves = each(keys if paths.is_stacked(path) else keys[0], own)
            flat |= {f"{path}/{name}": leaf for name, leaf in paths.flatten(leaves).items()}
        return paths.unflatten(flat)

    def places(self, params: paths.Tree) -> dict[str, Any]:
        """{stored path of an adapted module: its site}, in the stacks of the tree `params`; not
        that of the whole model, which has no parameters of its own."""
        stored = paths.stored_layers(params)
        found: dict[str, Any] = {}
        for path, site in self.sites().items():
            if place := paths.layer(f"{path}/"):
                run = stored.get(place.prefix, place.prefix)
                path = f"{run}/{place.rest}".rstrip("/")
            if path:
                found.setdefault(path, site)
        return found

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        method: Any = None,
        adapter_ids: Int[Array, "B"] | None = None,
        mutable: Any = False,
        **options: Any,
    ) -> Any:
        """The model's `apply`, with the adapter; `mutable` as Linen's has it.

        A method's argument `seeds`, one per example, turns the adapter's dropout on too; a method
        that has none runs without.

        With `adapter_ids`, for inference with LoRA, the adapter's leaves have an axis of adapters
        in front (after that of layers; `merge.combine` makes them), and example i uses adapter
        `adapter_ids[i]`. One that does not exist gives NaN. Raises ConfigError for other kinds.
        """
        params = variables["params"]
        params = self.adapter.prepare(params, self.places(params))
        seeds = self._seeds(method, args, options)
        if seeds is not None:
            params = self._with_streams(params)
        if adapter_ids is not None:
            self.adapter.check_by_example()
            # As an index, a negative number would count from the end.
            adapter_ids = jnp.where(adapter_ids < 0, jnp.iinfo(jnp.int32).max, adapter_ids)
        sites = self.sites()

        def intercept(call, args, options, context):
            module = context.module
            path, called = paths.names("/".join(module.path))[0], context.method_name
            if path not in sites or (path and called != "__call__"):
                return call(*args, **options)
            there = None
            if seeds is not None and path:
                there = randomness.fold(seeds, module.get_variable("params", _STREAM))
            here = Call(module, called, call, there, adapter_ids)
            return self.adapter.call(sites[path], here, *args, **options)

        with nn.intercept_methods(intercept):
            given = {**variables, "params": params}
            return self.model.apply(given, *args, method=method, mutable=mutable, **options)

    def _seeds(self, method, args, options):
        """The argument `seeds` of the method, where it has one and something is dropped."""
        if not self.adapter.dropout:
            return None
        model = base(self.model)
        function = method if callable(method) else getattr(type(model), method or "__call__")
        given = inspect.signature(function).bind_partial(model, *args, **options)
        seeds = given.arguments.get("seeds")
        return None if seeds is None else randomness.named(seeds, "adapter")

    def _with_streams(self, params):
        """A number for each adapted module beside its parameters: inside of a scan a module knows
        its layer by what is sliced for it alone."""
        flat = paths.flatten(params)
        for path in self.places(params):
            numbers = np.array([_stream(name) for name in paths.names(path)], np.uint32)
            numbers = jnp.asarray(numbers.view(np.int32))
            flat[f"{path}/{_STREAM}"] = numbers if paths.is_stacked(path) else numbers[0]
        return paths.unflatten(flat)


def around(model: Any, adapter: Adapter) -> Adapted:
    """`model` with `adapter`. Raises ConfigError where its modules have one of the kind already:
    a base is quantized once, and of other adapters a module has one."""
    room = model.cfg.max_len if adapter.positions else 1
    if adapter.positions >= room:
        raise ConfigError(
            f"config.adapter.length={adapter.positions} leaves no room for text in the {room} "
            "positions of the model: make it shorter."
        )
    adapted, inner = Adapted(model, adapter), model
    sites = adapted.sites().keys() - {""}
    while isinstance(inner, Adapted):
        both = sorted(sites & inner.sites().keys())
        if both and (adapter.keeps or not inner.adapter.keeps):
            raise ConfigError(
                f"{both[0]} would have two adapters, {type(inner.adapter).__name__} and "
                f"{type(adapter).__name__} around it: quantise first, and adapt a module once."
            )
        inner = inner.model
    return adapted


def base(model: Any) -> Any:
    """The model without its adapters."""
    return base(model.model) if isinstance(model, Adapted) else model


def take(flat: dict[str, Any], path: str) -> Leaves:
    """The module's own parameters, taken out of the flat tree; a quantized kernel is a dict."""
    start = f"{path}/"
    names = [n for n in flat if n.startswith(start)]
    own = [n for n in names if re.fullmatch(r"(kernel/)?[^/]+", n.removeprefix(start))]
    return paths.unflatten({name.removeprefix(start): flat.pop(name) for name in own})


def chosen(
    modules: Mapping[str, Module],
    targets: Sequence[tuple[str, Any]],
    fits: Callable[[Module], bool],
    kinds: str,
    key: str = "config.adapter.targets",
) -> dict[str, Any]:
    """{path: value of the first of the (expression, value) `targets` that matches all of it}.

    A value of 0 leaves its modules out. Raises ConfigError for an expression that matches what does
    not fit (the `kinds` are what does), that decides nothing, and where nothing is left.
    """
    found, refused, used = {}, [], set()
    for path, module in modules.items():
        at = next((i for i, (p, _) in enumerate(targets) if re.fullmatch(p, path)), None)
        if at is None or not targets[at][1]:
            used.add(at)
        elif fits(module):
            used.add(at)
            found[path] = targets[at][1]
        elif module.leaves:  # what has no parameters of its own only holds others
            refused.append(f"{path} ({type(module.module).__name__})")
    if refused:
        raise ConfigError(
            f"{key} matches what cannot be adapted: {', '.join(refused[:5])}. Possible are "
            f"{kinds}: make the expression narrower, or put (expression, 0) before it."
        )
    for i, (pattern, _) in enumerate(targets):
        if i not in used:
            possible = [path for path, module in modules.items() if fits(module)]
            raise ConfigError(
                f"{key}: {pattern!r} decides nothing that can be adapted ({kinds}); earlier ones "
                "win, and an expression must match the whole path."
                + did_you_mean(pattern, possible)
            )
    if not found:
        raise ConfigError(f"{key} adapts nothing: every value is 0.")
    return found


def check_numbers(targets: Sequence[tuple[str, Any]]) -> None:
    """Raise ConfigError for targets whose values are not numbers, as those of another kind of
    adapter."""
    for pattern, value in targets:
        if value is not None and not isinstance(value, int):
            raise ConfigError(
                f"config.adapter.targets: {pattern!r} has {value!r}, where a whole number or None "
                "has to be."
            )


def _stream(name: str) -> int:
    return zlib.crc32(name.encode())


def _canonical(model: Any) -> Any:
    """The model in its largest stacks, where it has any."""
    if not hasattr(model, "stacks"):
        return model
    whole = dict(start=0, stop=None) if hasattr(base(model), "start") else {}
    return model.clone(stacks=paths.runs(model.kinds), **whole)


@functools.cache  # asked for by every part of a run, and found by tracing the model
def _sites(model: Any, adapter: Adapter) -> Mapping[str, Any]:
    return adapter.sites(_modules(model))


@functools.cache
def _modules(model: Any) -> dict[str, Module]:
    """{path: module} of a model without adapters, paths of single layers."""
    seen: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {}
    running, shared = [], set()

    def shape(x):
        numbers = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
        return x.shape if numbers else ()

    def record(call, args, options, context):
        if context.method_name not in ("__call__", "table", "attend"):
            return call(*args, **options)
        path = "/".join(context.module.path)
        if context.method_name != "__call__":
            shared.update({path} - set(running))
            return call(*args, **options)
        running.append(path)
        out = call(*args, **options)
        running.pop()
        seen[path] = context.module, shape(args[0] if args else None), shape(out)
        return out

    with nn.intercept_methods(record):
        init = lambda: model.init(jax.random.key(0), *model.example())["params"]
        flat = paths.flatten(jax.eval_shape(init))
    own: dict[str, dict[str, tuple[int, ...]]] = {path: {} for path in seen if path}
    for stored, leaf in flat.items():
        module, _, name = stored.rpartition("/")
        if module in own:
            own[module][name] = leaf.shape[1:] if paths.is_stacked(stored) else leaf.shape
    return {
        name: Module(module, leaves, path in shared, inputs, outputs)
        for path, leaves in own.items()
        for module, inputs, outputs in [seen[path]]
        for name in paths.names(path)
    }
