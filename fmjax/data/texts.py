"""Texts as rows of tokens: documents tokenized and packed, or examples encoded, in the cache."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.data import chat, labelled, packing, pairs, sources, store
from fmjax.data import tokenizer as tokenizers
from fmjax.data.dataset import Dataset
from fmjax.data.settings import ALONE, DataSettings, TokenizerSettings, read
from fmjax.data.vocabulary import Vocab
from fmjax.errors import ConfigError, DataError
from fmjax.io import disk_cache

VERSION = 4  # of what the cache holds; raise it when the same inputs give other files


@dataclasses.dataclass(frozen=True)
class TextDataset(Dataset):
    """Texts in rows of tokens.

    `counts` has for each split documents, tokens, rows, fill and what was lost, and "bad_records".
    """

    vocab: Vocab | None = None
    tokenizer_dir: Path | None = None  # transformers format
    types: int = 1  # of tokens: 2 where those of a second text differ
    settings: DataSettings | None = None

    unit = "tokens"

    @property
    def facts(self) -> dict[str, Any]:
        """Those of every dataset, the vocabulary, and what the settings say of a row."""
        return super().facts | {
            "vocab": self.vocab,
            "vocab_size": self.vocab.size,
            "columns": len(self.settings.column_names),
            "room": self.settings.room,
            "types": self.types,
        }

    @property
    def identity(self) -> dict[str, Any]:
        seq_len = self.splits["train"].seq_len
        return super().identity | {"seq_len": seq_len, "vocab_size": self.vocab.size}

    @property
    def processors(self) -> dict[str, Path]:
        return {"tokenizer": self.tokenizer_dir}

    @property
    def digests(self) -> dict[str, str]:
        parts = [part.tobytes() if hasattr(part, "tobytes") else repr(part) for part in self.vocab]
        raw = (part if isinstance(part, bytes) else part.encode() for part in parts)
        return {"vocabulary": hashlib.sha256(b"".join(raw)).hexdigest()[:16]}

    def example(self, batch: Mapping[str, Any], prepared: Mapping[str, Any]) -> str:
        """The first row as it is, as the model sees it, and what it has to predict, decoded."""
        words = tokenizers.load(self.tokenizer_dir)

        def text(arrays: Mapping[str, Any], ids="input_ids", segments="segment_ids") -> str:
            return words.decode(np.asarray(arrays[ids][0])[np.asarray(arrays[segments][0]) > 0])

        parts = [text(batch)]
        if text(prepared) != text(batch):
            parts.append(f"as the model sees it\n{text(prepared)}")
        if "target_ids" in prepared:
            parts.append(f"target\n{text(prepared, 'target_ids', 'target_segment_ids')}")
        if "mlm_labels" in prepared:
            masked = np.asarray(prepared["mlm_weights"][0]) > 0
            order = np.argsort(np.asarray(prepared["mlm_positions"][0])[masked])
            labels = np.asarray(prepared["mlm_labels"][0])[masked][order]
            parts.append("targets     " + " ".join(words.convert_ids_to_tokens(labels)))
        return "\n\n".join(parts)

    def texts(self, batch: Mapping[str, np.ndarray]) -> list[str]:
        """The texts of rows; the two texts of a pair, and the choices of an example, are
        separated."""
        words = tokenizers.load(self.tokenizer_dir)
        texts = []
        for row in range(len(batch["input_ids"])):
            arrays = (batch[key][row] for key in ("input_ids", "token_types", "segment_ids"))
            ids, types, segments = (np.atleast_2d(array) for array in arrays)
            of_type = [(segments > 0) & (types == kind) for kind in (0, 1)]
            parts = [ids[i][here[i]] for i in range(len(ids)) for here in of_type]
            read = [words.decode(part, skip_special_tokens=True).strip() for part in parts]
            texts.append(" | ".join(dict.fromkeys(filter(None, read))))
        return texts


def complete(data: Mapping) -> dict[str, Any]:
    """`config.data` with its defaults. Raises ConfigError for settings that cannot be used."""
    return dataclasses.asdict(read(DataSettings, data, "data"))


def stand_in(data: Mapping, tokenizer: Mapping) -> TextDataset:
    """Facts from the settings before anything is read, with a vocabulary of every special token.

    Raises ConfigError for settings that cannot be used, or leave nothing to train on.
    """
    chosen = read(DataSettings, data, "data")
    if chosen.unlabelled:
        raise ConfigError(
            "config.data.label is empty, so that there is nothing to train on: name the column of "
            f"the labels of config.data.format={chosen.format}."
        )
    size = tokenizer["vocab_size"] if tokenizer["name"] == "train" else 8
    none = np.zeros(size, bool)
    marks = dict(sentinels=range(size), fim=(4, 5, 6))
    return TextDataset(
        splits={},
        digest="",
        format=chosen.format,
        counts={},
        target=chosen.target,
        labels=tuple(chosen.classes) or ("one", "other"),
        vocab=Vocab(size, 0, 1, (2,), (3,), none, none, **marks),
        settings=chosen,
    )


def prepare(
    data: Mapping,
    tokenizer: Mapping,
    *,
    embedding_rows: int | None = None,
    log: Callable[[str], None] = print,
    poll: Callable[[], None] = lambda: None,
) -> TextDataset:
    """Tokenise and pack into the cache, or reuse what it holds.

    `data` and `tokenizer` hold the keys of `config.data` and `config.tokenizer` (settings.py). Ids
    that are not below `embedding_rows`, those of the model, are refused with their record.
    `poll` is called often and may raise to stop; the next start resumes. Errors: `ConfigError` for
    settings that cannot be used, `DataError` for data that cannot.
    """
    data = read(DataSettings, data, "data")
    chosen = read(TokenizerSettings, tokenizer, "tokenizer")
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
    return TextDataset(
        splits=splits,
        digest=index.get("tokens_digest") or disk_cache.digest(index["files"]),
        format=f"{form}-{data.pair}" if data.format == "pairs" else form,
        counts=index["counts"] | {"bad_records": index["bad_records"]},
        target=data.target,
        labels=tuple(index.get("labels", ())),
        vocab=words.vocab,
        tokenizer_dir=words.folder,
        types=2 if data.format == "pairs" else index.get("types", 1),
        settings=data,
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
            padded=data.format in ALONE.values(),
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
