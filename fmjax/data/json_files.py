"""Reader of .json files: an array of records, SQuAD's questions, or one record a line."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fmjax.data import json_text, lines, readers
from fmjax.data import records as values
from fmjax.data.records import EXCERPT
from fmjax.data.settings import DataSettings
from fmjax.errors import DataError

MAX_JSON_BYTES = 1 << 28  # of a file that is read whole; SQuAD 2.0 is 42 MB
MAX_ID = 100  # characters of a question's id that messages repeat


def read(path: Path, settings: DataSettings, key: str, check: Callable) -> Iterator[tuple]:
    """The records of an array, or one a line; or the questions of SQuAD's articles, versions 1 and
    2, with the columns `id`, `question`, `context` and `answers`, which are empty where a question
    cannot be answered."""
    reader = readers.jsonl if _record_a_line(path, check) else _whole
    yield from reader(path, settings, key, check)


def _record_a_line(path: Path, check: Callable) -> bool:
    """True if the first line is an object by itself, and more lines follow or it is not SQuAD's."""
    filled = (line for line in lines.read(path, check) if line.bad or line.text.strip())
    first, *more = itertools.islice(filled, 2) or [None]
    try:
        record = json_text.loads(first.text) if first and not first.bad else None
    except ValueError:
        return False
    return isinstance(record, dict) and (bool(more) or "data" not in record)


def _whole(path: Path, settings: DataSettings, key: str, check: Callable) -> Iterator[tuple]:
    with lines.opened(path, check) as (file, raw):
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
        document = json_text.loads(content.decode("utf-8-sig"))
        rows = document if isinstance(document, list) else list(_questions(document))
    except UnicodeDecodeError as error:
        reason = lines.not_utf8(error, lines.mark_of(content))
        yield excerpt, 1, f"not JSON ({reason})", size
        return
    except ValueError as error:
        yield excerpt, 1, f"not JSON ({error})", size
        return
    except (KeyError, TypeError, AttributeError) as error:
        form = "{'data': [{'paragraphs': [{'context': …, 'qas': [{'question': …}]}]}]}"
        wrong = f"no array, nor SQuAD's JSON, {form} ({error!r}); one record a line is jsonl"
        yield excerpt, 1, wrong, size
        return
    word = "record" if isinstance(document, list) else "question"
    for number, row in enumerate(rows, 1):
        bad = "" if isinstance(row, dict) else f"a JSON {type(row).__name__}, not an object"
        fields, bad = ({}, bad) if bad else values.read(row, settings.schema)
        named = row.get("id") if word == "question" else ""
        where = named[:MAX_ID] if isinstance(named, str) and named else f"{word} {number}"
        yield values.excerpt(row) if bad else fields, where, bad, size * number // len(rows)


def _questions(document: Any) -> Iterator[dict]:
    """Raises KeyError, TypeError or AttributeError for what is not of SQuAD's shape."""
    for article in document["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                none = {"answers": []} if asked.get("is_impossible") else {}
                yield (
                    {"question": asked["question"], "context": paragraph["context"]} | asked | none
                )
