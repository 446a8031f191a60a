"""Readers of one file each: (path, settings, key, check) to (fields, where, bad, bytes read).

`fields` are {column: value}, or an excerpt of what is bad; `where` is a line, a row or an id; `bad`
says what is wrong, else ""; bytes are those of the file, packed. `check` is called after each block
that is read, and may raise: see digests.py. Others are in json_files.py and parquet.py.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from fmjax.data import json_text, lines
from fmjax.data import records as values
from fmjax.data.records import EXCERPT, MAX_RECORD_BYTES
from fmjax.data.settings import DataSettings
from fmjax.errors import ConfigError, DataError, did_you_mean


def txt(path: Path, settings: DataSettings, key: str, check: Callable) -> Iterator[tuple]:
    columns = list(settings.schema)
    if len(columns) != 1 or settings.labelled or settings.chat:
        raise ConfigError(
            f"config.{key}: {path} has one text and no columns, but config.data.format="
            f"{settings.format!r} needs the columns {columns}: use jsonl, csv, tsv or parquet."
        )
    kept, size, start, line = [], 0, 1, None

    def document() -> Iterator[tuple]:
        if size > MAX_RECORD_BYTES:
            bad = f"a document of more than {MAX_RECORD_BYTES:,} bytes (see config.data.document)"
            yield "\n".join(kept)[:EXCERPT], start, bad, line.read
        elif any(text.strip() for text in kept):
            yield {columns[0]: "\n".join(kept)}, start, "", line.read

    for line in lines.read(path, check):
        if line.bad:
            yield line
        elif settings.document == "blank_line" and not line.text.strip():
            yield from document()
            kept, size = [], 0
        else:
            if not kept:
                start = line.number
            size += len(line.text.encode()) + 1
            if size <= MAX_RECORD_BYTES:
                kept.append(line.text)
            if settings.document == "line":
                yield from document()
                kept, size = [], 0
    yield from document()


def jsonl(path: Path, settings: DataSettings, key: str, check: Callable) -> Iterator[tuple]:
    for line in lines.read(path, check):
        if line.bad:
            yield line
        elif line.text.strip():
            found, bad = _json_object(line.text)
            fields, bad = ({}, bad) if bad else values.read(found, settings.schema)
            yield (line.text[:EXCERPT] if bad else fields), line.number, bad, line.read


def _json_object(text: str) -> tuple[dict, str]:
    try:
        record = json_text.loads(text)
    except ValueError as error:
        return {}, f"not JSON ({error})"
    if not isinstance(record, dict):
        return {}, f"a JSON {type(record).__name__}, not an object"
    return record, ""


def check_columns(path: Path, settings: DataSettings, names: list[str]) -> None:
    """Raises ConfigError for a column of the config that a file does not have, DataError for one
    that it has twice."""
    for column in settings.schema:
        if column not in names:
            raise ConfigError(
                f"{settings.key_of(column)}={column!r} is no column of {path}."
                + did_you_mean(column, names)
            )
        if (count := names.count(column)) > 1:
            times = "twice" if count == 2 else f"{count} times"
            raise DataError(
                f"{path}: the column {column!r} ({settings.key_of(column)}) is there {times}. Give "
                "the others another name, or remove them."
            )


def delimited(path: Path, settings: DataSettings, key: str, check: Callable) -> Iterator[tuple]:
    header = None
    for row, first, bad, last in _rows(path, check):
        if header is None:
            if bad:
                raise DataError(f"{path}:{first.number}: in the header: {bad}; config.{key}")
            header = row
            check_columns(path, settings, header)
            continue
        if not bad and len(row) != len(header):
            bad = f"{len(row)} fields, the header has {len(header)}"
        fields = {}
        if not bad:
            fields, bad = values.read(dict(zip(header, row, strict=True)), settings.schema)
        yield fields or first.text[:EXCERPT], first.number, bad, last.read


def _rows(path: Path, check: Callable) -> Iterator[tuple[list[str], lines.Line, str, lines.Line]]:
    """(fields, first line, what is wrong, last line) of each row that is not empty. A bad line
    within a row makes the whole row bad."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    dialect = {"delimiter": ","}
    if ".tsv" in path.name.lower():
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    source = lines.read(path, check)
    last, begins, bad = None, True, ""

    def texts() -> Iterator[str]:
        """The first line of each row, and the further lines of one that continues within quotes."""
        nonlocal last, begins, bad
        while True:
            if not begins:
                following = next(source, None)
                if following is None:
                    return
                last = following
                bad = bad or (last.bad and f"line {last.number}: {last.bad}")
            begins = False
            yield last.text + "\n"

    reader = csv.reader(texts(), strict=True, **dialect)
    for first in source:
        row, last, begins, bad = [], first, True, first.bad
        if not bad:
            try:
                row = next(reader)
            except csv.Error as error:
                bad = bad or f"not CSV ({error})"
        if row or bad:
            yield row, first, bad, last


def conll(path: Path, settings: DataSettings, key: str, check: Callable) -> Iterator[tuple]:
    """Sentences of "word TAB tag" lines with an empty line between: lists under the two columns
    that the config names. Where it names no label, a line may also be a word alone."""
    if settings.format != "tags":
        raise ConfigError(
            f"config.{key}: {path} has words and their tags, but config.data.format="
            f"{settings.format!r}. Set it to tags, or use jsonl, csv, tsv or parquet."
        )
    words, tags, start, size, bad, line = [], [], 1, 0, None, None

    def sentence() -> Iterator[tuple]:
        if bad:
            yield bad
        elif words:
            found = dict(
                zip((settings.column_names[0], settings.label), (words, tags), strict=True)
            )
            fields, wrong = values.read(found, settings.schema)
            excerpt = " ".join(words)[:EXCERPT]
            yield (excerpt if wrong else fields), start, wrong, line.read

    for line in lines.read(path, check):
        if not line.bad and not line.text.strip():
            yield from sentence()
            words, tags, size, bad = [], [], 0, None
            continue
        start = start if words or bad else line.number
        fields = line.text.split("\t")
        size += len(line.text)
        possible = (2,) if settings.label else (1, 2)
        if bad:  # the first fault of a sentence is told, and the sentence left out
            continue
        if line.bad:
            bad = line
        elif len(fields) not in possible:
            words_of = f"{len(fields)} fields between tabs, not a word and its tag"
            bad = line._replace(text=line.text[:EXCERPT], bad=words_of)
        elif size > MAX_RECORD_BYTES:
            bad = line._replace(
                text=" ".join(words)[:EXCERPT], bad="no empty line between sentences"
            )
        else:
            words.append(fields[0])
            tags.append(fields[-1])
    yield from sentence()
