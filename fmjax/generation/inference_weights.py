"""In how many bits a writer keeps its matrices, and what it has seen (`decoding.Writer`)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fmjax import adapters
from fmjax.adapters import quantise
from fmjax.errors import ConfigError
from fmjax.models import AnyModel
from fmjax.params import paths, precision


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def ready(params: Any, dtype: str | None, weights: str, tied: bool) -> Any:
    """Layer by layer; matrices as products in `dtype` take them, once for all (None: as they are),
    and with them the table of the tokens where it is one."""

    def one(name, x):
        table = tied and name.endswith("token/embedding")
        matrix = table or name.endswith("/kernel")
        if dtype is None or not matrix or x.dtype != jnp.float32:
            return x
        if x.ndim != 2:  # of all experts
            return x.astype(dtype)
        if weights == "int8":
            packed = quantise.SCHEMES["int8"].pack(x.T if table else x)
            return precision.Rows(packed["codes"].T, packed["scales"])
        return precision.Rows((x if table else x.T).astype(dtype))

    flat = paths.flatten(paths.restack(params, None))
    return paths.unflatten({name: one(name, x) for name, x in flat.items()})


def check(model: AnyModel, weights: str, cache: str) -> None:
    """Raises ConfigError for words that are not known, and models that have no int8."""
    for key, value in (("weights", weights), ("cache", cache)):
        if value not in ("", "int8"):
            raise ConfigError(
                f"config.{key}={value!r} is not known: give 'int8', or '' for the dtype of "
                "config.precision."
            )
    if weights and adapters.base(model) is not model:
        raise ConfigError(
            "config.weights='int8' is for models without adapters and quantised bases: merge them "
            "first, with configs/export.py."
        )
    if weights and getattr(model.cfg, "experts", 0):
        raise ConfigError("config.weights='int8' is not for experts: leave it ''.")
