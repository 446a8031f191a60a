"""Files to records: txt, jsonl, json (an array, one a line, or SQuAD's), csv, tsv, conll, parquet.

Errors name the line. All but parquet may be gzipped. What is accepted: UTF-8 with or without a
byte-order mark, lines that end in LF or CRLF, form feeds and U+2028 inside a line. What is a bad
record: other encodings, NUL, a lone surrogate, a record beyond `MAX_RECORD_BYTES`, broken JSON or
CSV, a value of another kind than its column needs. In tsv a quotation mark is a character like any
other (as its registration with IANA says). Memory is bounded, whatever a file unpacks to.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fmjax.data import json_files, lines, parquet, patterns, readers
from fmjax.data.records import Record
from fmjax.data.settings import DataSettings
from fmjax.errors import ConfigError, did_you_mean, quoted

READERS = {
    ".txt": readers.txt,
    ".text": readers.txt,
    ".md": readers.txt,
    ".jsonl": readers.jsonl,
    ".ndjson": readers.jsonl,
    ".json": json_files.read,
    ".csv": readers.delimited,
    ".tsv": readers.delimited,
    ".conll": readers.conll,
    ".bio": readers.conll,
    ".parquet": parquet.read,
}
ENDINGS = (*READERS, *(f"{ending}.gz" for ending in READERS))


def expand(names: str | tuple[str, ...] | list[str], key: str) -> list[Path]:
    """The files that a comma- or tuple-list of names and globs means, sorted within each glob."""
    given = names
    if isinstance(names, str):
        one = os.path.exists(names)  # its name may hold a comma
        names = [names] if one else [name.strip() for name in names.split(",") if name.strip()]
    files = []
    for name in names:
        path = Path(os.path.expanduser(name))
        # os.path: a Path raises for names that are too long.
        if any(mark in name for mark in "*?[") and not os.path.exists(path):
            files += patterns.matches(path, key, ENDINGS)
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise _no_file(path, name, key)
    if not files:
        raise ConfigError(f"config.{key}: {quoted(given)} names no file.")
    for path in files:
        _reader(path, key)
    return files


def _no_file(path: Path, name: str, key: str) -> ConfigError:
    if os.path.isdir(path):
        return ConfigError(
            f"config.{key}: {name!r} is a folder. Give files, or a pattern like '{name}/*.txt'."
        )
    if os.path.lexists(path):
        return ConfigError(f"config.{key}: {quoted(name)} is {patterns.kind_of(path)}, no file.")
    try:
        near = os.listdir(path.parent)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        near = []
    return ConfigError(
        f"config.{key}: there is no file {quoted(name)}." + did_you_mean(path.name, near)
    )


def records(
    files: list[Path],
    settings: DataSettings,
    key: str,
    check: Callable[[Path], None] = lambda path: None,
    poll: Callable[[], None] = lambda: None,
) -> Iterator[Record]:
    """The records of `files`, in order; a file without any is a bad record itself.

    `poll`, and `check` with a file's path, are called after each block that is read, and may raise.
    """
    sizes = []
    for path in files:
        with lines.readable(path, key):
            sizes.append(path.stat().st_size)
    before, total = 0, sum(sizes) or 1
    for path, size in zip(files, sizes, strict=True):
        empty, checked = True, lambda path=path: (poll(), check(path))
        with lines.readable(path, key):
            for value, line, bad, read in _reader(path, key)(path, settings, key, checked):
                empty = False
                fields, excerpt = ({}, value) if bad else (value, "")
                yield Record(fields, f"{path}:{line}", (before + read) / total, bad, excerpt)
        before += size
        if empty:
            yield Record({}, str(path), before / total, "the file holds no document")


def _reader(path: Path, key: str):
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in READERS:
        raise ConfigError(
            f"config.{key}: {path} has the unknown ending {suffix!r}. Possible: "
            f"{', '.join(READERS)}, all but parquet also with .gz."
        )
    return READERS[suffix]
