"""Files to records: txt, jsonl, json (SQuAD), csv, tsv, conll, parquet; errors name the line.

All but parquet may be gzipped. What is accepted: UTF-8 with or without a byte-order mark, lines
that end in LF or CRLF, form feeds and U+2028 inside a line. What is a bad record: other encodings,
NUL, a lone surrogate, a record beyond `MAX_RECORD_BYTES`, broken JSON or CSV, a value of another
kind than its column needs. In tsv a quotation mark is a character like any other (as its
registration with IANA says). Memory is bounded by the limits below, whatever a file unpacks to.
"""

import codecs
import csv
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fmjax.data import records as values
from fmjax.data.records import EXCERPT, MAX_RECORD_BYTES, Record, fault
from fmjax.data.settings import DataSettings
from fmjax.errors import ConfigError, DataError, did_you_mean, quoted

MAX_JSON_BYTES = 1 << 28  # of a file that is read whole; SQuAD 2.0 is 42 MB
MAX_RATIO = 200  # prose packs 3 : 1; a bomb 1000 : 1
PARQUET_ROWS = 16  # in memory at a time: a text that is stored once may stand in every row


class _Line(NamedTuple):
    text: str
    number: int
    bad: str
    read: int  # bytes of the file, packed


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
        ".txt": _txt,
        ".text": _txt,
        ".md": _txt,
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _squad,
        ".csv": _csv,
        ".tsv": _csv,
        ".conll": _conll,
        ".bio": _conll,
        ".parquet": _parquet,
    }
    suffix = Path(name).suffix
    if suffix not in kinds:
        raise ConfigError(
            f"config.{key}: {path} has the unknown ending {suffix!r}. Possible: "
            f"{', '.join(kinds)}, all but parquet also with .gz."
        )
    return kinds[suffix]


def _lines(path: Path) -> Iterator[_Line]:
    """Lines cut at LF only, without their end; a bad one has an excerpt for text."""
    with open(path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw
        unpacked = number = 0
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            size, end = len(line), line[-1:]
            while size > MAX_RECORD_BYTES and end not in (b"\n", b""):  # past what is not kept
                rest = file.readline(MAX_RECORD_BYTES)
                size, end = size + len(rest), rest[-1:]
                _check_ratio(path, unpacked + size, raw.tell())
            unpacked += size
            _check_ratio(path, unpacked, raw.tell())
            text, bad = _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, size)
            yield _Line(text, number, bad, raw.tell())


def _check_ratio(path: Path, unpacked: int, packed: int) -> None:
    if unpacked > max(MAX_RECORD_BYTES, MAX_RATIO * packed):
        raise DataError(
            f"{path}: {packed:,} bytes unpack to more than {unpacked:,}, beyond the ratio of "
            f"{MAX_RATIO}: a decompression bomb? Unpack it yourself if you trust it."
        )


def _decoded(line: bytes, size: int) -> tuple[str, str]:
    if size > MAX_RECORD_BYTES:
        bad = f"a line of {size:,} bytes, the limit is {MAX_RECORD_BYTES:,}"
        return line[:EXCERPT].decode(errors="replace"), bad
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        bad = (
            f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8 "
            "(convert the file: iconv -f latin1 -t utf-8)"
        )
        return line[:EXCERPT].decode(errors="replace"), bad
    text = text.removesuffix("\n").removesuffix("\r")
    return text, fault(text)


def _txt(path: Path, settings: DataSettings, key: str) -> Iterator[tuple]:
    columns = list(settings.schema)
    if len(columns) != 1 or settings.labelled:
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

    for line in _lines(path):
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


def _jsonl(path: Path, settings: DataSettings, key: str) -> Iterator[tuple]:
    for line in _lines(path):
        if line.bad:
            yield line
        elif line.text.strip():
            found, bad = _json_object(line.text)
            fields, bad = ({}, bad) if bad else values.read(found, settings.schema)
            yield (line.text[:EXCERPT] if bad else fields), line.number, bad, line.read


def _json_object(text: str) -> tuple[dict, str]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON ({error})"
    if not isinstance(record, dict):
        return {}, f"a JSON {type(record).__name__}, not an object"
    return record, ""


def _check_columns(path: Path, settings: DataSettings, found: list[str]) -> None:
    for column in settings.schema:
        if column not in found:
            raise ConfigError(
                f"{settings.key_of(column)}={column!r} is no column of {path}."
                + did_you_mean(column, found)
            )


def _csv(path: Path, settings: DataSettings, key: str) -> Iterator[tuple]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    bad_lines, last = [], None

    def good_lines() -> Iterator[str]:
        nonlocal last
        for last in _lines(path):
            if last.bad:
                bad_lines.append(last)
            else:
                yield last.text + "\n"

    kind = dict(delimiter=",")
    if ".tsv" in path.name.lower():
        kind = dict(delimiter="\t", quoting=csv.QUOTE_NONE)
    reader = csv.reader(good_lines(), strict=True, **kind)
    header = None
    start = 1
    while True:
        bad, row = "", []
        try:
            row = next(reader)
        except StopIteration:
            yield from bad_lines
            return
        except csv.Error as error:
            bad = f"not CSV ({error})"
        yield from bad_lines
        bad_lines.clear()
        if header is None and row:
            header = row
            _check_columns(path, settings, header)
        elif row or bad:
            if not bad and len(row) != len(header):
                bad = f"{len(row)} fields, the header has {len(header)}"
            fields = {}
            if not bad:
                fields, bad = values.read(dict(zip(header, row, strict=True)), settings.schema)
            yield (",".join(row)[:EXCERPT] if bad else fields), start, bad, last.read
        start = last.number + 1


def _squad(path: Path, settings: DataSettings, key: str) -> Iterator[tuple]:
    """The questions of SQuAD's articles, versions 1 and 2, with the columns `id`, `question`,
    `context` and `answers`, which are empty where a question cannot be answered."""
    with open(path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw
        content = file.read(MAX_JSON_BYTES + 1)
        size = raw.tell()
    _check_ratio(path, len(content), size)
    if len(content) > MAX_JSON_BYTES:
        raise DataError(
            f"{path}: more than {MAX_JSON_BYTES:,} bytes of JSON, which are read whole. Write the "
            f"records to jsonl, one a line; config.{key}"
        )
    excerpt = content[:EXCERPT].decode(errors="replace")
    try:
        found = list(_questions(json.loads(content.decode("utf-8-sig"))))
    except (ValueError, RecursionError) as error:
        yield excerpt, 1, f"not JSON ({error})", size
        return
    except (KeyError, TypeError) as error:
        form = "{'data': [{'paragraphs': [{'context': …, 'qas': [{'question': …}]}]}]}"
        wrong = f"not SQuAD's JSON, {form} ({error!r}); one record a line is jsonl"
        yield excerpt, 1, wrong, size
        return
    for number, question in enumerate(found, 1):
        fields, bad = values.read(question, settings.schema)
        where = question.get("id") or f"question {number}"
        yield str(question)[:EXCERPT] if bad else fields, where, bad, size * number // len(found)


def _questions(found: dict) -> Iterator[dict]:
    for article in found["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                none = {"answers": []} if asked.get("is_impossible") else {}
                yield (
                    {"question": asked["question"], "context": paragraph["context"]} | asked | none
                )


def _conll(path: Path, settings: DataSettings, key: str) -> Iterator[tuple]:
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

    for line in _lines(path):
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


def _parquet(path: Path, settings: DataSettings, key: str) -> Iterator[tuple]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(path, settings, file.schema_arrow.names)
        for column, wanted in settings.schema.items():
            kind = file.schema_arrow.field(column).type
            if wanted == "text" and not _is_text(kind):
                raise DataError(
                    f"{path}: column {column!r} ({settings.key_of(column)}) holds {kind}, not text."
                )
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        for part in (group.column(i) for group in groups for i in range(group.num_columns)):
            _check_ratio(path, part.total_uncompressed_size, part.total_compressed_size)
        row, unpacked, size, rows = 0, 0, path.stat().st_size, file.metadata.num_rows
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=list(settings.schema)):
            # Text as bytes: pyarrow does not check that strings are UTF-8.
            plain = lambda x: x.cast(pyarrow.large_binary()) if _is_text(x.type) else x
            columns = {name: plain(batch.column(name)).to_pylist() for name in settings.schema}
            for values_of_row in zip(*columns.values(), strict=True):
                row, found = row + 1, dict(zip(columns, values_of_row, strict=True))
                unpacked += sum(len(x) for x in found.values() if isinstance(x, bytes))
                _check_ratio(path, unpacked, size)
                found, bad = _decoded_values(found)
                fields, bad = ({}, bad) if bad else values.read(found, settings.schema)
                excerpt = str(next(iter(found.values())))[:EXCERPT]
                yield excerpt if bad else fields, f"row {row}", bad, size * row // rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not readable as parquet ({error}); config.{key}") from error


def _is_text(kind) -> bool:
    import pyarrow

    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _decoded_values(found: dict) -> tuple[dict, str]:
    """The values with bytes as text, and what is wrong with the first of them that is no UTF-8."""
    decoded = {}
    for column, value in found.items():
        decoded[column], bad = (
            _decoded(value, len(value)) if isinstance(value, bytes) else (value, "")
        )
        if bad:
            return decoded, bad
    return decoded, ""
