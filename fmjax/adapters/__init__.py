"""Adapters: wrappers of a model that keep the names of its parameters and add a few of their own.

config.adapter = dict(name="lora", targets=((r"block_.*/(attn|mlp)/.*", None),), rank=8, …)
config.groups = ((r".*/lora_.|head/.*", "train"), (".*", "freeze"))
"""

import functools
import importlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax

from fmjax import trees
from fmjax.adapters import initial, merge
from fmjax.adapters.lora import LEAVES, Adapted
from fmjax.errors import ConfigError
from fmjax.models import AnyModel


def wrap(model: AnyModel, settings: Mapping[str, Any]) -> AnyModel:
    """The model with the adapter of `config.adapter`; the model itself where that names none.

    Raises ConfigError where the adapter does not fit the model.
    """
    fields = dict(settings)
    name = fields.pop("name", "")
    return (
        importlib.import_module(f"fmjax.adapters.{name}").wrap(model, **fields) if name else model
    )


def start(model: Any, params: Any, fresh: Collection[str]) -> Any:
    """`params` of a base that was just loaded, with an adapter that starts from its weights.

    `fresh` are the names of the parameters that were not loaded: an adapter that was, stays.
    """
    if not isinstance(model, Adapted) or not any(re.fullmatch(LEAVES, name) for name in fresh):
        return params
    leaves = {name for name in trees.unstack(params) if re.fullmatch(LEAVES, name)}
    if model.lora.init != "uniform" and leaves - set(fresh):
        raise ConfigError(
            f"config.adapter.init={model.lora.init!r} starts all of the adapter from the weights, "
            "but config.init has a part of it: set it to uniform, or the targets as they are there."
        )
    return initial.start(model, params)


def base(model: AnyModel) -> AnyModel:
    """The model without its adapter."""
    return model.model if isinstance(model, Adapted) else model


def merged(model: Any, params: Any) -> tuple[Any, Any]:
    """(the model without its adapter, parameters that give the same outputs, where they lay).

    Raises ConfigError as `merge.merge` does.
    """
    if not isinstance(model, Adapted):
        return model, params
    places = jax.tree.map(lambda x: x.sharding, merge.separate(params)[0])
    fold = functools.partial(merge.merge, model)
    return model.model, jax.jit(fold, out_shardings=places)(params)
