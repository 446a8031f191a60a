"""Readers of one file each: (path, settings, key) to (fields, where, bad, bytes read).

`fields` are {column: value}, or an excerpt of what is bad; `where` is a line, a row or an id; `bad`
says what is wrong, else ""; bytes are those of the file, packed.
"""

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from fmjax.data import lines
from fmjax.data import records as values
from fmjax.data.records import EXCERPT, MAX_RECORD_BYTES
from fmjax.data.settings import DataSettings
from fmjax.errors import ConfigError, DataError, did_you_mean

MAX_JSON_BYTES = 1 << 28  # of a file that is read whole; SQuAD 2.0 is 42 MB
PARQUET_ROWS = 16  # in memory at a time: a text that is stored once may stand in every row


def txt(path: Path, settings: DataSettings, key: str) -> Iterator[tuple]:
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

    for line in lines.read(path):
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


def jsonl(path: Path, settings: DataSettings, key: str) -> Iterator[tuple]:
    for line in lines.read(path):
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


def delimited(path: Path, settings: DataSettings, key: str) -> Iterator[tuple]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    bad_lines, last = [], None

    def good_lines() -> Iterator[str]:
        nonlocal last
        for last in lines.read(path):
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


def whole_json(path: Path, settings: DataSettings, key: str) -> Iterator[tuple]:
    """The objects of an array; or the questions of SQuAD's articles, versions 1 and 2, with the
    columns `id`, `question`, `context` and `answers`, which are empty where a question cannot be
    answered."""
    with open(path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw
        content = file.read(MAX_JSON_BYTES + 1)
        size = raw.tell()
    lines.check_ratio(path, len(content), size)
    if len(content) > MAX_JSON_BYTES:
        raise DataError(
            f"{path}: more than {MAX_JSON_BYTES:,} bytes of JSON, which are read whole. Write the "
            f"records to jsonl, one a line; config.{key}"
        )
    excerpt = content[:EXCERPT].decode(errors="replace")
    try:
        found = json.loads(content.decode("utf-8-sig"))
        word = "record" if isinstance(found, list) else "question"
        found = found if isinstance(found, list) else list(_questions(found))
    except (ValueError, RecursionError) as error:
        yield excerpt, 1, f"not JSON ({error})", size
        return
    except (KeyError, TypeError) as error:
        form = "{'data': [{'paragraphs': [{'context': …, 'qas': [{'question': …}]}]}]}"
        wrong = f"no array, nor SQuAD's JSON, {form} ({error!r}); one record a line is jsonl"
        yield excerpt, 1, wrong, size
        return
    for number, row in enumerate(found, 1):
        bad = "" if isinstance(row, dict) else f"a JSON {type(row).__name__}, not an object"
        fields, bad = ({}, bad) if bad else values.read(row, settings.schema)
        named = row.get("id") if word == "question" else ""
        where = named or f"{word} {number}"
        yield str(row)[:EXCERPT] if bad else fields, where, bad, size * number // len(found)


def _questions(found: dict) -> Iterator[dict]:
    for article in found["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                none = {"answers": []} if asked.get("is_impossible") else {}
                yield (
                    {"question": asked["question"], "context": paragraph["context"]} | asked | none
                )


def conll(path: Path, settings: DataSettings, key: str) -> Iterator[tuple]:
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

    for line in lines.read(path):
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


def parquet(path: Path, settings: DataSettings, key: str) -> Iterator[tuple]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(path, settings, file.schema_arrow.names)
        for column, wanted in settings.schema.items():
            kind = file.schema_arrow.field(column).type
            if wanted in ("text", "filled") and not _is_text(kind):
                raise DataError(
                    f"{path}: column {column!r} ({settings.key_of(column)}) holds {kind}, not text."
                )
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        for part in (group.column(i) for group in groups for i in range(group.num_columns)):
            lines.check_ratio(path, part.total_uncompressed_size, part.total_compressed_size)
        row, unpacked, size, rows = 0, 0, path.stat().st_size, file.metadata.num_rows
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=list(settings.schema)):
            # Text as bytes: pyarrow does not check that strings are UTF-8.
            plain = lambda x: x.cast(pyarrow.large_binary()) if _is_text(x.type) else x
            columns = {name: plain(batch.column(name)).to_pylist() for name in settings.schema}
            for values_of_row in zip(*columns.values(), strict=True):
                row, found = row + 1, dict(zip(columns, values_of_row, strict=True))
                unpacked += sum(len(x) for x in found.values() if isinstance(x, bytes))
                lines.check_ratio(path, unpacked, size)
                found, bad = _decoded_values(found)
                fields, bad = ({}, bad) if bad else values.read(found, settings.schema)
                excerpt = str(next(iter(found.values())))[:EXCERPT]
                yield excerpt if bad else fields, f"row {row}", bad, size * row // rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as parquet ({error}); config.{key}") from error


def _is_text(kind) -> bool:
    import pyarrow

    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _decoded_values(found: dict) -> tuple[dict, str]:
    """The values with bytes as text, and what is wrong with the first of them that is no UTF-8."""
    decoded = {}
    for column, value in found.items():
        decoded[column], bad = (
            lines.decoded(value, len(value)) if isinstance(value, bytes) else (value, "")
        )
        if bad:
            return decoded, bad
    return decoded, ""
