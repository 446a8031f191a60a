"""The contents of a config: names, and plain data that JSON preserves."""

import math
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from fmjax.errors import ConfigError, quoted

# No dots, which separate keys; nothing like __class__, which a ConfigDict has itself.
NAME = re.compile(r"(?!__\w+__$)[\w-]+")


def plain(value: Any, key: str = "") -> Any:
    """Nested dicts and tuples of finite numbers, text, booleans and None; lists become tuples.

    `key` is where `value` stands, for the message.

    Raises:
      ConfigError: for anything else, naming the key.
    """
    if isinstance(value, ConfigDict | Mapping):
        entries = {}
        for name in value:
            if not (isinstance(name, str) and NAME.fullmatch(name)):
                raise ConfigError(
                    f"--config.{key}: {quoted(name)} is no name: "
                    "not text made of letters, digits, '_' and '-'"
                )
            child = f"{key}.{name}" if key else name
            try:
                entries[name] = plain(value[name], child)
            except RequiredValueError as error:
                raise ConfigError(f"--config.{child}=… must be given") from error
        return entries
    if isinstance(value, list | tuple):
        return tuple(plain(item, f"{key}[{i}]") for i, item in enumerate(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"--config.{key} is {value}: expected a finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"--config.{key} is an integer of more than 64 bits")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"--config.{key} is a {type(value).__name__}: a config holds only plain data")


def flatten(config: Mapping | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}; an empty dict is a value, so that nothing disappears."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = {} if isinstance(value, ConfigDict) else value
    return flat
