"""Tokens that end a text, as the folder of a model lists them.

Chat models end an answer with a token of its own, which their tokenizer does not call its end:
`eos_token_id` of generation_config.json lists both. transformers' generate stops at these.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmjax.errors import ConfigError, quoted
from fmjax.io.snapshot import read_json

FILE = "generation_config.json"
KEY = "eos_token_id"
# What transformers takes from the file where there is one, and else from config.json.
_WITH = ("bos_token_id", "pad_token_id", "decoder_start_token_id")


def listed(folder: Path) -> tuple[int, ...] | None:
    """`eos_token_id` of generation_config.json in `folder`, else of its config.json; None where
    neither has it. Raises ConfigError for a value that is not made of whole numbers."""
    for path in (folder / FILE, folder / "config.json"):
        if not path.is_file():
            continue
        try:
            settings = read_json(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {quoted(str(error))}") from error
        value = settings.get(KEY) if isinstance(settings, Mapping) else None
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ConfigError(
                f"{path} has {KEY}={quoted(value)}: it has to be a token's number, or a list of "
                "them."
            )
        return tuple(ids)
    return None


def write(folder: Path, ids: Sequence[int], config: Mapping[str, Any] | None = None) -> None:
    """generation_config.json with these tokens; `config` is the content of config.json, of which
    transformers reads no other token where this file is."""
    known = {name: config[name] for name in _WITH if (config or {}).get(name) is not None}
    content = known | {KEY: ids[0] if len(ids) == 1 else list(ids)}
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
