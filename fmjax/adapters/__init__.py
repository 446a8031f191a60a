"""Adapters: wrappers of a model that keep the names of its parameters and add a few of their own.

config.adapter = dict(name="lora", targets=((r"block_.*/(attn|mlp)/.*", None),), rank=8, …)
config.groups = ((r".*/lora_.|head/.*", "train"), (".*", "freeze"))
"""

import importlib
from collections.abc import Mapping
from typing import Any

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
