"""Sources of documents: `pydocs`, `pycode` (embedded), `text` (files), `hub` (`datasets`).

A source is read several times (to train a tokenizer, to tokenise, again when a killed preparation
resumes), so `documents()` starts anew at each call and always gives the same documents in the same
order.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from fmjax.data import files, hub, patterns, pycode, pydocs
from fmjax.data.digests import Digests
from fmjax.data.records import Record
from fmjax.data.settings import DataSettings
from fmjax.data.waiting import polled
from fmjax.errors import ConfigError, DataError
from fmjax.io import snapshot

MAX_BAD_RECORDS = 1000


class Document(NamedTuple):
    """One record, its text and its split; or one left out: with the split "bad" and the reason, or
    with the split "overlap"."""

    text: str  # of all columns that hold any, one below the other
    split: str
    where: str  # for messages: file:line or the like
    done: float  # the share of the source read so far, 0 to 1
    bad: str = ""
    fields: dict[str, Any] | None = None  # {column: value}, of labelled formats and chat


class Source(NamedTuple):
    """`identity` (JSON) changes whenever the documents do; `documents()` yields them."""

    identity: dict
    documents: Callable[[], Iterator[Document]]


# What each kind of source gives: its identity, and for each of its parts ("train" and perhaps
# "validation") a function of `poll` that yields the records. Without a part "validation", the
# documents of "train" are split by their hash.
Parts = dict[str, Callable[[Callable[[], None]], Iterator[Record]]]


def read(
    settings: DataSettings, log: Callable[[str], None], poll: Callable[[], None] = lambda: None
) -> Source:
    """The source that `settings` describes; nothing but digests is read yet.

    `poll` is called often, also while documents are read, and may raise to stop.
    """
    kinds = {"pydocs": _pydocs, "pycode": _pycode, "text": _text, "hub": _hub}
    identity, parts = polled(lambda: kinds[settings.source](settings, log), poll)
    keys = ("validation_fraction", "max_documents", "on_bad_record")
    identity |= {key: getattr(settings, key) for key in keys}
    if settings.overlap != "keep":
        identity["overlap"] = settings.overlap
    return Source(identity, lambda: _documents(settings, parts, poll))


def split_of(text: str, fraction: float) -> str:
    """The split of a document: a hash of its text, so equal texts never sit in both."""
    return "validation" if _hash(text) < fraction * 2**64 else "train"


def _documents(
    settings: DataSettings, parts: Parts, poll: Callable[[], None]
) -> Iterator[Document]:
    """The records of all parts with their splits; what is bad is judged by `on_bad_record`."""
    bad, held = 0, _held(settings, parts, poll)
    for number, (part, records) in enumerate(parts.items()):
        taken, found = 0, False
        for record in records(poll):
            done = (number + record.done) / len(parts)
            if record.bad:
                bad += 1
                check_bad(record.where, record.bad, settings.on_bad_record, bad)
                kept = record.excerpt if settings.on_bad_record == "quarantine" else ""
                yield Document(kept, "bad", record.where, done, record.bad)
                continue
            split, text = part, _text_of(record, settings)
            if settings.format == "seq2seq" and settings.label:  # whose words a tokenizer learns
                text = "\n".join([text, *record.fields[settings.label]])
            whole = _whole(record, settings)
            if "validation" not in parts:
                split = split_of(whole, float(settings.validation_fraction))
            if part == "train" and _hash(whole) in held:
                yield Document("", "overlap", record.where, done)
                continue
            fields = record.fields if settings.labelled or settings.chat else None
            yield Document(text, split, record.where, done, fields=fields)
            found |= split == part and bool(text.strip())
            taken += 1
            if taken == settings.max_documents:
                break
        if not found:
            raise DataError(
                f"There is no text for the {part} split in the source {settings.source!r}: it has "
                f"{taken} documents and {bad} bad records. See config.data.{part}, "
                "config.data.columns and config.data.validation_fraction."
            )


def _held(settings: DataSettings, parts: Parts, poll: Callable[[], None]) -> set[int]:
    """Hashes of the validation texts that training must not have."""
    if settings.overlap == "keep":
        return set()
    good = (record for record in parts["validation"](poll) if not record.bad)
    taken = itertools.islice(good, settings.max_documents or None)
    return {_hash(_whole(record, settings)) for record in taken}


def _whole(record: Record, settings: DataSettings) -> str:
    """The content that must not be in two splits: the text; all questions about one context go with
    it."""
    if settings.format == "spans":
        return record.fields[settings.column_names[1]]
    return _text_of(record, settings)


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _text_of(record: Record, settings: DataSettings) -> str:
    columns = (record.fields[column] for column in settings.column_names)
    texts = lambda x: (one["content"] if isinstance(one, dict) else one for one in x)
    return "\n".join("\n".join(texts(x)) if isinstance(x, list) else x for x in columns)


def check_bad(where: str, bad: str, policy: str, count: int) -> None:
    """Raise DataError for a record that is `bad`, the `count`th of them, unless `policy` allows
    it."""
    if policy == "raise":
        raise DataError(
            f"{where}: {bad}. Correct it, or set config.data.on_bad_record to skip or quarantine."
        )
    if count > MAX_BAD_RECORDS:
        raise DataError(
            f"{where}: {bad}. This is bad record {count}, and a source with more "
            f"than {MAX_BAD_RECORDS} is broken. See config.data.columns and the files."
        )


def _pydocs(settings: DataSettings, log) -> tuple[dict, Parts]:
    names, label = settings.column_names, settings.label if settings.format == "classes" else ""
    if settings.labelled and settings.format not in ("classes", "texts"):
        raise ConfigError(
            f"config.data.name='pydocs' has no {settings.format}, only documents, classes (the "
            "package of a docstring), texts and chat. Set config.data.train to your own files."
        )

    def records(poll: Callable[[], None]) -> Iterator[Record]:
        if settings.chat:
            rows = polled(pydocs.conversations, poll)
        elif settings.labelled:
            rows = polled(pydocs.examples, poll)
        else:
            rows = [(*row, "") for row in polled(pydocs.texts, poll)]
        for i, (where, text, more) in enumerate(rows):
            fields = dict.fromkeys(names, text) | ({label: more} if label else {})
            if settings.chat:
                asked = {"role": "user", "content": text}
                fields = {names[0]: [asked, {"role": "assistant", "content": more}]}
            yield Record(fields, where, i / len(rows))

    if len(names) != 1:
        raise ConfigError(f"config.data.columns={settings.columns!r}: pydocs has one column.")
    identity = {"pydocs": pydocs.digest(), "label": label}
    if settings.labelled or settings.chat:  # other texts, of which a tokenizer learns others
        identity["rows"] = "conversations" if settings.chat else "examples"
    return identity, {"train": records}


def _pycode(settings: DataSettings, log) -> tuple[dict, Parts]:
    if settings.labelled or settings.chat or len(settings.column_names) != 1:
        raise ConfigError(
            f"config.data.name='pycode' has documents in one column, but config.data.format="
            f"{settings.format!r} and columns={settings.columns!r}."
        )

    def records(poll: Callable[[], None]) -> Iterator[Record]:
        rows = polled(pycode.texts, poll)
        for i, (where, text) in enumerate(rows):
            yield Record({settings.column_names[0]: text}, where, i / len(rows))

    return {"pycode": pycode.digest()}, {"train": records}


def _text(settings: DataSettings, log) -> tuple[dict, Parts]:
    parts, contents = {}, {}
    for part in ("train", "validation"):
        if getattr(settings, part):
            key = f"data.{part}"
            found = files.expand(getattr(settings, part), key)
            digests = Digests(key)
            contents[part] = [[path.suffixes, digests.take(path)] for path in found]
            parts[part] = functools.partial(files.records, found, settings, key, digests.check)
    return {
        "text": contents,
        "schema": list(settings.schema.items()),
        "document": settings.document,
    }, parts


def _hub(settings: DataSettings, log) -> tuple[dict, Parts]:
    folder, digests = Path(os.path.expanduser(settings.path)), Digests("data.path")
    if os.path.isdir(folder):
        found = patterns.tree(folder, "data.path")
        identity = {"hub": {str(p.relative_to(folder)): digests.take(p) for p in found}}
    else:
        identity = {"hub": settings.path, "revision": settings.revision}
        if not snapshot.is_commit(settings.revision):
            log(
                f"data: {settings.path} is not pinned: once prepared, it is not looked at again. "
                "Set config.data.revision to a commit (40 hex digits)"
            )
    splits = {"train": settings.train or "train"}
    if settings.validation:
        splits["validation"] = settings.validation
    identity |= {
        "splits": splits,
        "subset": settings.subset,
        "schema": list(settings.schema.items()),
    }
    return identity, {
        part: functools.partial(hub.records, settings, name, digests.check_all)
        for part, name in splits.items()
    }
