"""An adapter folded into the weights, taken out again, and several of them over one base."""

import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fmjax.adapters import low_rank, wrapper
from fmjax.adapters.wrapper import LEAVES, Adapted
from fmjax.errors import ConfigError
from fmjax.params import paths


def merge(model: Adapted, params: paths.Tree) -> paths.Tree:
    """Parameters of `model.model` that give the same outputs, at the base model's cost.

    Raises ConfigError for an adapter that cannot be merged, as that of a table that the model's
    output reads too.
    """
    flat = paths.flatten(params)
    for path, site in model.places(params).items():
        one = functools.partial(model.adapter.merge, site)
        each = jax.vmap(one) if paths.is_stacked(path) else one
        try:
            whole = each(wrapper.take(flat, path))
        except ConfigError as error:
            raise ConfigError(f"{path} {error}") from error
        flat |= {f"{path}/{name}": leaf for name, leaf in paths.flatten(whole).items()}
    return paths.unflatten(flat)


def unmerge(model: Adapted, merged: paths.Tree, adapter: paths.Tree) -> paths.Tree:
    """The adapted model's parameters, from merged ones and the `adapter` that is in them.

    The base's numbers come back to rounding, not to the bit.

    Raises ConfigError for other adapters than LoRA, and for DoRA, whose factor needs the base that
    is sought.
    """
    model.adapter.check_by_example()
    if model.adapter.dora:
        raise ConfigError("A merged DoRA adapter cannot be taken out: keep the base's parameters.")
    without = lambda weight, leaves: (weight - low_rank.product(leaves), leaves)
    return changed(model, join(merged, adapter), without)


def separate(params: paths.Tree) -> tuple[paths.Tree, paths.Tree]:
    """(the base's parameters, the adapter's)."""
    flat = paths.flatten(params)
    adapter = {path: x for path, x in flat.items() if re.fullmatch(LEAVES, path)}
    base = {path: x for path, x in flat.items() if path not in adapter}
    return paths.unflatten(base), paths.unflatten(adapter)


def join(base: paths.Tree, adapter: paths.Tree) -> paths.Tree:
    """The inverse of `separate`."""
    return paths.unflatten({**paths.flatten(base), **paths.flatten(adapter)})


def combine(params: paths.Tree, adapters: Sequence[paths.Tree]) -> paths.Tree:
    """The base of `params` with several adapters (trees that have their leaves), for `adapter_ids`.

    The axis of adapters is the first, in a stack the one after the layers.
    """
    leaves = [separate(adapter)[1] for adapter in adapters]
    shapes = [{path: x.shape for path, x in paths.flatten(one).items()} for one in leaves]
    if any(found != shapes[0] for found in shapes):
        raise ConfigError("Adapters of one batch must have the same targets, ranks and stacks.")
    stack = lambda path, *arrays: jnp.stack(arrays, int(paths.is_stacked(path)))
    flat = [paths.flatten(one) for one in leaves]
    together = {path: stack(path, *(one[path] for one in flat)) for path in shapes[0]}
    return join(separate(params)[0], paths.unflatten(together))


def changed(model: Adapted, params: paths.Tree, function: Callable) -> paths.Tree:
    """`params` with `function(weight, leaves) -> (weight, leaves)` at each adapted module.

    The function sees one layer at a time.
    """
    flat = paths.flatten(params)
    for path, site in model.places(params).items():

        def one(weight, a, b, m, scale=site.scale):
            weight, leaves = function(weight, low_rank.Leaves(a, b, m, scale))
            return weight, leaves.a, leaves.b, leaves.m

        names = [f"{path}/{leaf}" for leaf in (site.weight, "lora_a", "lora_b", "lora_m")]
        each = jax.vmap(one) if paths.is_stacked(path) else one
        new = each(*(flat.get(name) for name in names))
        flat |= {name: x for name, x in zip(names, new, strict=True) if x is not None}
    return paths.unflatten(flat)
