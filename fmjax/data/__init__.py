"""Documents to packed integer rows in a cache; batches that are a pure function of (seed, step).

Nothing here imports jax: preparation runs before it, and in processes that must start fast.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fmjax.data import chat, labelled, packing, pairs, settings, sources, store
from fmjax.data import tokenizer as tokenizers
from fmjax.data.batches import (
    Batches,
    batches,
    check_drawn,
    check_fingerprint,
    cut,
    eval_batches,
    eval_steps,
    examples,
    fingerprint,
)
from fmjax.data.vocabulary import Vocab
from fmjax.errors import ConfigError, DataError
from fmjax.io import disk_cache

__all__ = [
    "Batches",
    "Dataset",
    "Vocab",
    "batches",
    "check_drawn",
    "check_fingerprint",
    "cut",
    "eval_batches",
    "eval_steps",
    "examples",
    "fingerprint",
    "prepare",
]

VERSION = 4  # of what the cache holds; raise it when the same inputs give other files


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Prepared data. A split has len() (rows), `seq_len`, `tokens` (not padding), `rows()` and
    `width()`, the columns that rows need."""

    vocab: Vocab
    tokenizer_dir: Path  # transformers format
    splits: dict[str, Any]  # "train"; "validation" if there is any
    digest: str  # of the tokens, whatever the packing
    format: str  # how they are packed
    counts: dict  # for each split documents, tokens, rows, fill and what was lost; "bad_records"
    target: str = ""  # what its labels mean: "classes", "nsp", … (settings.py)
    labels: tuple[str, ...] = ()  # names of the classes
    types: int = 1  # of tokens: 2 where those of a second text differ

    @property
    def rows_digest(self) -> str:
        """Digest of the tokens and of their packing: with another packing the examples are
        different."""
        return disk_cache.digest([self.digest, self.format])


def prepare(
    data: Mapping,
    tokenizer: Mapping,
    *,
    embedding_rows: int | None = None,
    log: Callable[[str], None] = print,
    poll: Callable[[], None] = lambda: None,
) -> Dataset:
    """Tokenise and pack into the cache, or reuse what it holds.

    `data` and `tokenizer` hold the keys of `config.data` and `config.tokenizer` (settings.py). Ids
    that are not below `embedding_rows`, those of the model, are refused with their record.
    `poll` is called often and may raise to stop; the next start resumes. Errors: `ConfigError` for
    settings that cannot be used, `DataError` for data that cannot.
    """
    data = settings.read(settings.DataSettings, data, "data")
    chosen = settings.read(settings.TokenizerSettings, tokenizer, "tokenizer")
    root = disk_cache.root(data.cache)
    disk_cache.remove_leftovers(root)
    source = sources.read(data, log, poll)
    words = tokenizers.prepare(chosen, source, root, log, poll, embedding_rows)

    if data.labelled:
        home, index = labelled.prepare(root, source, words, data, log, poll)
        form = f"{data.format}-{data.seq_len}-{data.long}"
    else:
        home, form, index = _rows(root, source, words, data, log, poll)
    folder = home if data.labelled else home / form
    splits = {
        split: _open(folder, split, counts, words.vocab, data)
        for split, counts in index["counts"].items()
        if counts["rows"]
    }
    wanted = {"train"} | ({"validation"} if data.validation or data.validation_fraction else set())
    for split, counts in index["counts"].items():
        if split in wanted:
            log(f"data: {split}: " + _summary(counts, data))
    if index["bad_records"]:
        log(f"data: {index['bad_records']:,} bad records left out, see {home}/**/bad.jsonl")
    if "train" not in splits:
        raise DataError(
            "The training split has no rows: " + _summary(index["counts"]["train"], data)
        )
    return Dataset(
        vocab=words.vocab,
        tokenizer_dir=words.folder,
        splits=splits,
        digest=index.get("tokens_digest") or disk_cache.digest(index["files"]),
        format=f"{form}-{data.pair}" if data.format == "pairs" else form,
        counts=index["counts"] | {"bad_records": index["bad_records"]},
        target=data.target,
        labels=tuple(index.get("labels", ())),
        types=2 if data.format == "pairs" else index.get("types", 1),
    )


def _rows(root: Path, source, words, data, log, poll) -> tuple[Path, str, dict]:
    """(home of the tokens, name of the folder with their rows, its index), made or found."""
    identity = {"version": VERSION, "source": source.identity, "tokenizer": words.digest}
    write = chat.writer(words.folder, data, log) if data.chat else None
    if write:
        identity["chat"] = write.identity
    home = root / f"tokens-{disk_cache.digest(identity)}"
    form = f"{data.format}-{data.seq_len}"
    if data.format != "pairs":
        form += f"-{data.long}" + f"-{data.frame}" * (data.frame != "piece")
        form += f"-room{data.room}" if data.room else ""
    with disk_cache.lock(root / f"{home.name}.lock", log, poll):
        index = disk_cache.verified(home / form, log, poll)
        if index is None:
            shards = store.tokenise(home, source, words, data.workers, log, poll, write)
            index = disk_cache.build(
                home / form, lambda folder: _pack(folder, home, shards, words, data, poll), poll
            )
    return home, form, index


def _open(folder: Path, split: str, counts: dict, vocab: Vocab, data):
    if data.labelled:
        return labelled.ExampleSplit(folder, split, data.seq_len, vocab, counts)
    if data.format != "pairs":
        return packing.PackedSplit(folder, split, data.seq_len, vocab, counts)
    if data.pair == "nsp" and counts["anchored_documents"] < 2:
        raise DataError(
            f"Next sentence prediction needs two documents of several sentences, but {split} has "
            f"{counts['anchored_documents']}. Set config.data.document, which says what one "
            "document is in a file, or config.data.pair='sop'."
        )
    return pairs.PairSplit(folder, split, data.seq_len, vocab, counts, data.pair)


def _pack(folder: Path, home: Path, shards: list[dict], words, data, poll) -> dict:
    if data.format == "pairs":
        if (len(words.vocab.first), len(words.vocab.last)) != (1, 1):
            raise ConfigError(
                "config.data.format='pairs' is [CLS] A [SEP] B [SEP], but the tokenizer has no "
                "such tokens: set config.tokenizer.name to a BERT-like one, or to 'train'."
            )
        counts = pairs.write(
            folder, home, len(shards), words.vocab, seq_len=data.seq_len, poll=poll
        )
    else:
        counts = packing.write(
            folder,
            home,
            len(shards),
            words.vocab,
            seq_len=data.seq_len,
            long=data.long,
            frame=data.frame,
            space=data.room,
            padded=data.format in settings.ALONE.values(),
            chat=data.chat,
            poll=poll,
        )
    for split in store.SPLITS:
        for key in ("documents", "empty_documents", store.OVERLAP):
            counts[split][key] = sum(shard[key][split] for shard in shards)
        counts[split]["source_tokens"] = sum(shard["tokens"][split] for shard in shards)
        slots = counts[split]["rows"] * data.seq_len
        counts[split]["fill"] = counts[split]["tokens"] / slots if slots else 0.0
    return {
        "counts": counts,
        "bad_records": sum(shard["bad_records"] for shard in shards),
        "tokens_digest": disk_cache.digest([shard["files"] for shard in shards]),
    }


def _summary(counts: dict, data) -> str:
    text = (
        f"{counts['documents']:,} documents, {counts['source_tokens']:,} tokens, "
        f"{counts['rows']:,} rows of {data.seq_len} ({100 * counts['fill']:.1f} % filled)"
    )
    lost = [
        f"{value:,} {key.replace('_', ' ')}"
        for key, value in counts.items()
        if key.startswith(("truncated", "dropped", "empty")) and value
    ]
    if "learnt_tokens" in counts:
        text += f", {counts['learnt_tokens']:,} of the tokens are learnt"
    return ", ".join([text, *lost])
