"""Configs for notebooks and scripts: a file, and what is changed in it."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from fmjax.config import files
from fmjax.config import load as config_files

__all__ = ["load"]


def load(spec: str, changes: Mapping[str, Any] | None = None, **more: Any) -> ConfigDict:
    """The checked config of `spec`, FILE.py[:ARG], with changed values.

        fmjax.configs.load("configs/mlm.py:tiny", {"optim.lr": 1e-3}, total="100 steps")

    Args:
      spec: a file of this computer; one of `configs/` that is not there is the shipped one.
      changes: {dotted key: value}; `more` are those without a dot.

    Raises:
      ConfigError: names the key, the value and what is possible.
    """
    values = {**(changes or {}), **more}
    shown = lambda value: value if isinstance(value, str) else repr(value)
    words = [f"--config.{key}={shown(value)}" for key, value in values.items()]
    return config_files.load(files.shipped(spec), words)
