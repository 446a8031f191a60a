"""Files to records: txt, jsonl, json (an array, or SQuAD's), csv, tsv, conll, parquet.

Errors name the line. All but parquet may be gzipped. What is accepted: UTF-8 with or without a
byte-order mark, lines that end in LF or CRLF, form feeds and U+2028 inside a line. What is a bad
record: other encodings, NUL, a lone surrogate, a record beyond `MAX_RECORD_BYTES`, broken JSON or
CSV, a value of another kind than its column needs. In tsv a quotation mark is a character like any
other (as its registration with IANA says). Memory is bounded, whatever a file unpacks to.
"""

import glob
import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from fmjax.data import readers
from fmjax.data.records import Record
from fmjax.data.settings import DataSettings
from fmjax.errors import ConfigError, DataError, did_you_mean, quoted


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
            found = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
            if not found:
                raise ConfigError(f"config.{key}: the pattern {quoted(name)} matches no file.")
            files += map(Path, found)
        elif os.path.isfile(path):
            files.append(path)
        elif os.path.isdir(path):
            raise ConfigError(
                f"config.{key}: {name!r} is a folder. Give files, or a pattern like '{name}/*.txt'."
            )
        else:
            near = os.listdir(path.parent) if os.path.isdir(path.parent) else []
            raise ConfigError(
                f"config.{key}: there is no file {quoted(name)}." + did_you_mean(path.name, near)
            )
    if not files:
        raise ConfigError(f"config.{key}: {quoted(given)} names no file.")
    for path in files:
        _reader(path, key)
    return files


def records(files: list[Path], settings: DataSettings, key: str) -> Iterator[Record]:
    """The records of `files`, in order; a file without any is a bad record itself."""
    total = sum(path.stat().st_size for path in files) or 1
    before = 0
    for path in files:
        found = False
        try:
            for value, line, bad, read in _reader(path, key)(path, settings, key):
                found = True
                fields, excerpt = ({}, value) if bad else (value, "")
                yield Record(fields, f"{path}:{line}", (before + read) / total, bad, excerpt)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file ({error}); config.{key}") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); config.{key}") from error
        before += path.stat().st_size
        if not found:
            yield Record({}, str(path), before / total, "the file holds no document")


def _reader(path: Path, key: str):
    name = path.name.lower().removesuffix(".gz")
    kinds = {
        ".txt": readers.txt,
        ".text": readers.txt,
        ".md": readers.txt,
        ".jsonl": readers.jsonl,
        ".ndjson": readers.jsonl,
        ".json": readers.whole_json,
        ".csv": readers.delimited,
        ".tsv": readers.delimited,
        ".conll": readers.conll,
        ".bio": readers.conll,
        ".parquet": readers.parquet,
    }
    suffix = Path(name).suffix
    if suffix not in kinds:
        raise ConfigError(
            f"config.{key}: {path} has the unknown ending {suffix!r}. Possible: "
            f"{', '.join(kinds)}, all but parquet also with .gz."
        )
    return kinds[suffix]
