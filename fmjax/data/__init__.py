"""Prepared data in a cache; batches that are a pure function of (seed, step).

`config.data.format` decides what rows are made of: texts (texts.py), images (images/), or what a
module of the user's own makes ("package.module:name"). Nothing here imports jax: preparation runs
before it, and in processes that must start fast.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from fmjax.config import plugins
from fmjax.data.batches import (
    Batches,
    batches,
    check_drawn,
    check_fingerprint,
    eval_batches,
    eval_steps,
    examples,
    fingerprint,
    full_row,
)
from fmjax.data.dataset import Dataset, Split
from fmjax.data.vocabulary import Vocab

__all__ = [
    "Batches",
    "Dataset",
    "Split",
    "Vocab",
    "batches",
    "check_drawn",
    "check_fingerprint",
    "complete",
    "eval_batches",
    "eval_steps",
    "examples",
    "fingerprint",
    "full_row",
    "prepare",
    "stand_in",
]

# {config.data.format: module}; all other names are formats of texts.
KINDS = {"images": "fmjax.data.images"}


def stand_in(data: Mapping, tokenizer: Mapping) -> Dataset:
    """Dataset without splits, whose `facts` come from `config.data` and `config.tokenizer` before
    anything is read. Raises ConfigError for settings that cannot be used."""
    return _kind(data).stand_in(data, tokenizer)


def complete(data: Mapping) -> dict[str, Any]:
    """`config.data` with the defaults of its kind, if it has any. Raises ConfigError for settings
    that cannot be used."""
    return getattr(_kind(data), "complete", dict)(data)


def prepare(
    data: Mapping,
    tokenizer: Mapping = MappingProxyType({}),
    *,
    embedding_rows: int | None = None,
    log: Callable[[str], None] = print,
    poll: Callable[[], None] = lambda: None,
) -> Dataset:
    """Prepare data in the cache, or reuse what it holds.

    `data` and `tokenizer` hold the keys of `config.data` and `config.tokenizer`. Ids of tokens that
    are not below `embedding_rows`, those of the model, are refused with their record. `poll` is
    called often and may raise to stop; the next start resumes. Raises ConfigError for settings that
    cannot be used, DataError for data that cannot.
    """
    kind = _kind(data)
    return kind.prepare(data, tokenizer, embedding_rows=embedding_rows, log=log, poll=poll)


def _kind(data: Mapping) -> Any:
    """Module or object with the `stand_in` and `prepare` of `config.data.format`."""
    name = data.get("format", "packed")
    module = KINDS.get(name, "fmjax.data.texts")
    return plugins.load(name if plugins.is_object(name) else module, "data.format")
