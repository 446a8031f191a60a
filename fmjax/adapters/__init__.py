"""Adapters: wrappers of a model that keep the names of its parameters and add a few of their own.

config.quantise = dict(name="nf4", targets=r"block_.*/(attn|mlp)/.*")
config.adapter = dict(name="lora", targets=((r"block_.*/(attn|mlp)/.*", None),), rank=8, …)
config.groups = ((r".*/lora_.|head/.*", "train"), (".*", "freeze"))
"""

import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmjax.adapters import initial, merge, prompt, quantise
from fmjax.adapters.wrapper import LEAVES, Adapted, base
from fmjax.errors import ConfigError, did_you_mean
from fmjax.models import AnyModel
from fmjax.params import paths, sharding

__all__ = [
    "LEAVES",
    "Adapted",
    "Packing",
    "base",
    "changes_base",
    "check_frozen",
    "has_prompt",
    "merged",
    "of_adapter",
    "packings",
    "parameters",
    "positions",
    "start",
    "wrap",
]


class Packing(NamedTuple):
    """The several arrays in which a parameter of the base is stored, one layer at a time."""

    shape: tuple[int, ...]  # of the whole
    pack: Callable[[Any], Mapping[str, jax.Array]]


def wrap(model: AnyModel, config: Mapping[str, Any]) -> AnyModel:
    """The model with its base as `config["quantise"]` has it and the adapter of
    `config["adapter"]`; without what is not there or names nothing.

    Raises ConfigError where one does not fit the model.
    """
    for section in ("quantise", "adapter"):
        if isinstance(model.kinds, Mapping) and (config.get(section) or {}).get("name"):
            raise ConfigError(
                f"config.{section} is for a single model yet, and config.model.name='composite' is "
                f"several: set config.{section}.name=''."
            )
    if (settings := dict(config.get("quantise") or {})).get("name"):
        model = quantise.wrap(model, **settings)
    fields = dict(config.get("adapter") or {})
    if not (name := fields.pop("name", "")):
        return model
    around = importlib.import_module(f"fmjax.adapters.{name}").wrap
    possible = list(inspect.signature(around).parameters)[1:]
    for key in fields.keys() - set(possible):
        raise ConfigError(
            f"config.adapter.{key} is not known to config.adapter.name={name!r}."
            + did_you_mean(key, possible)
        )
    required = inspect.signature(around).parameters.values()
    if lost := [p.name for p in required if p.kind == p.KEYWORD_ONLY and p.default is p.empty]:
        if missing := [key for key in lost if key not in fields]:
            raise ConfigError(
                f"config.adapter.name={name!r} needs config.adapter.{missing[0]}: start from the "
                "config that has it, configs/finetune_*.py."
            )
    return around(model, **fields)


def packings(model: AnyModel, audit: dict[str, float] | None = None) -> dict[str, Packing]:
    """{parameter of the base that is quantized: how}, by the names of single layers.

    Into `audit` goes of each that is packed how much is lost: ||what is kept - W|| / ||W||.
    """
    if not isinstance(model, Adapted):
        return {}
    found = packings(model.model, audit)
    if isinstance(model.adapter, quantise.Quantised):
        for path, shape in model.sites().items():
            name = f"{path}/kernel"
            pack = functools.partial(_packed, model.adapter.name, name, audit)
            found[name] = Packing(shape, pack)
    return found


def _packed(scheme: str, name: str, audit: dict[str, float] | None, whole: Any) -> quantise.Packed:
    kept, lost = quantise.packed(scheme, jnp.asarray(whole))
    if audit is not None:
        audit[name] = float(lost)
    return kept


def check_frozen(model: AnyModel, moving: Collection[str]) -> None:
    """Raise ConfigError if a quantized parameter would train: `moving` are the parameters that
    train."""
    quantised = packings(model)
    if wrong := [name for name in moving if name.rpartition("/")[0] in quantised]:
        raise ConfigError(
            f"config.quantise keeps {wrong[0].rpartition('/')[0]} in a few bits, but config.groups "
            "trains it: freeze it there, or leave it out of config.quantise.targets."
        )


def parameters(model: AnyModel, params: Any) -> int:
    """Number of parameters that the (abstract) tree stands for: a quantized matrix counts as it
    was."""
    few = packings(model)
    apart = [x for name, x in paths.unstack(params).items() if name.rpartition("/")[0] not in few]
    return paths.size(apart) + sum(math.prod(packing.shape) for packing in few.values())


def positions(model: AnyModel) -> int:
    """Number of the model's positions that its adapters take."""
    if not isinstance(model, Adapted):
        return 0
    return model.adapter.positions + positions(model.model)


def has_prompt(model: AnyModel) -> bool:
    """True if there are vectors in front of the tokens of a row."""
    inside = isinstance(model, Adapted) and has_prompt(model.model)
    return inside or isinstance(getattr(model, "adapter", None), prompt.Prompt)


def start(
    model: Any,
    params: Any,
    fresh: Collection[str],
    tokenize: Callable[[str], Sequence[int]],
    whole: Callable[[str], Any],
    seed: int,
) -> Any:
    """`params` of a base that was just loaded, with an adapter that starts from its weights.

    `fresh` are the names of the parameters that were not loaded: an adapter that was, stays.
    `tokenize` gives the ids of a text, `whole` a matrix of the base by its name, as it was loaded,
    `seed` what is drawn.
    """
    init = getattr(getattr(model, "adapter", None), "init", "uniform")
    if init in ("uniform", "normal") or not any(re.fullmatch(LEAVES, name) for name in fresh):
        return params
    leaves = {name for name in paths.unstack(params) if re.fullmatch(LEAVES, name)}
    if leaves - set(fresh):
        raise ConfigError(
            f"config.adapter.init={init!r} starts all of the adapter from the weights, but "
            "config.init has a part of it: set it to uniform (of a prompt: normal), or the targets "
            "as they are there."
        )
    if isinstance(model.adapter, prompt.Prompt):
        return model.adapter.from_base(params, tokenize, seed)
    return initial.start(model, params, whole)


def changes_base(model: Any) -> bool:
    """True if `start` changes the base weights: the adapter's product is subtracted from them."""
    return getattr(getattr(model, "adapter", None), "init", "") in ("pissa", "loftq")


def of_adapter(params: Any) -> Any:
    """The leaves that adapters have added to the stored tree."""
    flat = paths.flatten(params)
    return paths.unflatten({p: x for p, x in flat.items() if re.fullmatch(LEAVES, p)})


def merged(model: Any, params: Any) -> tuple[Any, Any]:
    """(the model without adapters, in full precision; parameters that give the same outputs, laid
    out as they were).

    Raises ConfigError as `merge.merge` does.
    """
    if not isinstance(model, Adapted):
        return model, params
    here = jax.tree.leaves(params)[0].sharding

    def fold(params):
        inner, params = quantise.restored(model, params)
        while isinstance(inner, Adapted):
            inner, params = inner.model, merge.merge(inner, params)
        return params

    places = None
    if isinstance(here, jax.sharding.NamedSharding):
        places = sharding.shardings(jax.eval_shape(fold, params), here.mesh)
    return base(model), jax.jit(fold, out_shardings=places)(params)
