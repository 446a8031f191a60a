"""Modules and objects of the user's own packages that a config names.

A model or a kind of data is an object, "package.module:name"; an objective is a module,
"package.module". Only packages that the configs and flags of this process name are imported: a name
in the folder of somebody else is data.
"""

import importlib
import re
from collections.abc import Iterable
from typing import Any

from fmjax.errors import ConfigError, first_line, quoted

_NAME = r"[A-Za-z_]\w*"
MODULE = re.compile(rf"{_NAME}(\.{_NAME})*")
OBJECT = re.compile(rf"{MODULE.pattern}:{_NAME}")
PACKAGE = __name__.partition(".")[0]
_trusted: set[str] = set()  # names of packages


def is_object(name: Any) -> bool:
    """True if `name` reads as "package.module:name"."""
    return isinstance(name, str) and bool(OBJECT.fullmatch(name))


def is_module(name: Any) -> bool:
    """True if `name` reads as "package.module"."""
    return isinstance(name, str) and bool(MODULE.fullmatch(name))


def trust(settings: Iterable[tuple[str, Any]]) -> None:
    """Allow the packages that (key, value) pairs name to be imported: values that are objects, and
    modules where the last part of the key is "module"."""
    for key, value in settings:
        if is_object(value) or is_module(value) and key.rpartition(".")[2] == "module":
            _trusted.add(_package(value))


def _package(name: str) -> str:
    return name.partition(":")[0].partition(".")[0]


def load(name: str, key: str) -> Any:
    """The module or the object called `name`, which `config.<key>` has.

    Raises ConfigError where Python cannot import it, and where only a folder names it.
    """
    module, _, attribute = name.partition(":")
    if _package(name) not in (PACKAGE, *_trusted):
        raise ConfigError(
            f"config.{key}={quoted(name)} is code that a folder names, and is not imported for it: "
            f"give --config.{key}={name} if you trust its package"
        )
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"config.{key}={quoted(name)}: {first_line(error)}. Install its package, or name its "
            "folder in PYTHONPATH"
        ) from error
    if attribute and not hasattr(loaded, attribute):
        raise ConfigError(f"config.{key}={quoted(name)}: {module} defines no {attribute}")
    return getattr(loaded, attribute) if attribute else loaded
