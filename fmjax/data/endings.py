"""Tokens that end and begin what a model writes, as its folder lists them.

Chat models end an answer with a token of its own, which their tokenizer does not call its end:
`eos_token_id` of generation_config.json lists both. transformers' generate reads
generation_config.json alone where there is one, whatever it lacks, and else config.json.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmjax.errors import ConfigError, quoted
from fmjax.io.snapshot import read_json

FILE = "generation_config.json"
KEY = "eos_token_id"
STARTS = ("decoder_start_token_id", "bos_token_id")  # of encoder–decoders: the first that is set
# What transformers takes from the file where there is one, and else from config.json.
_WITH = ("bos_token_id", "pad_token_id", "decoder_start_token_id")


def listed(folder: Path) -> tuple[int, ...] | None:
    """The tokens at which transformers' generate stops with `folder`: () where its settings have
    none, None where it has no settings at all. Raises ConfigError for a value that is not made of
    whole numbers."""
    path, settings = _settings(folder)
    if settings is None:
        return None
    value = settings.get(KEY)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(_is_id, ids)):
        raise ConfigError(
            f"{path} has {KEY}={quoted(value)}: it has to be a token's number, or a list of them."
        )
    return tuple(ids)


def start(folder: Path) -> int | None:
    """The token with which transformers' generate begins the answer of an encoder–decoder in
    `folder`; None where its settings have none. Raises ConfigError for what is no whole number."""
    path, settings = _settings(folder)
    named = ((key, settings.get(key)) for key in STARTS) if settings else ()
    key, value = next(((key, value) for key, value in named if value is not None), ("", None))
    if value is not None and not _is_id(value):
        raise ConfigError(f"{path} has {key}={quoted(value)}: it has to be a token's number.")
    return value


def _settings(folder: Path) -> tuple[Path, Mapping[str, Any] | None]:
    """(the file that transformers reads these keys from, its content); None without a file."""
    path = folder / FILE
    if not path.is_file():
        path = folder / "config.json"
    if not path.is_file():
        return path, None
    try:
        settings = read_json(path)
        if not isinstance(settings, Mapping):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {quoted(str(error))}") from error
    return path, settings


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def write(folder: Path, ids: Sequence[int], config: Mapping[str, Any] | None = None) -> None:
    """generation_config.json with these tokens; `config` is the content of config.json, of which
    transformers reads no other token where this file is."""
    known = {name: config[name] for name in _WITH if (config or {}).get(name) is not None}
    content = known | {KEY: ids[0] if len(ids) == 1 else list(ids)}
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
