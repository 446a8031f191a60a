"""What every source yields, and what the columns of a record must hold to be used."""

import itertools
import math
from typing import Any, NamedTuple

from fmjax.errors import quoted

MAX_RECORD_BYTES = 1 << 24  # a long book is 4 MB
EXCERPT = 1000  # characters of a bad record that quarantine keeps

# What a column can be asked to hold, as messages name it.
KINDS = {
    "text": "text",
    "texts": "a list of texts",
    "passage": "text or a list of texts",
    "targets": "text or a list of texts",
    "label": "text or a whole number",
    "number": "a finite number",
    "labels": "a list of texts or whole numbers",
    "set": "a list of texts or whole numbers, none of them twice",
    "answers": "{'text': [...], 'answer_start': [...]}",
    "filled": "text that is not empty",
    "messages": "a list of {'role': ..., 'content': ...}",
}
ROLES = ("system", "user", "assistant")


class Record(NamedTuple):
    """{column: value}; or, where `bad` says what is wrong, the beginning of what was read."""

    fields: dict[str, Any]
    where: str  # file:line or the like
    done: float  # the share of the source read so far, 0 to 1
    bad: str = ""
    excerpt: str = ""


def read(found: dict[str, Any], schema: dict[str, str]) -> tuple[dict[str, Any], str]:
    """(the columns of `schema`, {column: kind}, each as its kind has it; what is wrong or "")."""
    fields = {}
    for column, kind in schema.items():
        if column not in found:
            names = ", ".join(map(repr, list(found)[:20]))
            return {}, f"no column {column!r} (config.data.columns, config.data.label), but {names}"
        fields[column], bad = _value(found[column], kind)
        if bad:
            return {}, bad if len(schema) == 1 else f"column {column!r}: {bad}"
    return fields, ""


def fault(value: Any) -> str:
    """What is wrong with a value that should be text; empty when nothing is."""
    if not isinstance(value, str):
        return f"the value is {_type(value)}, not text"
    if "\0" in value:
        return "NUL character (a binary or UTF-16 file?)"
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        return f"lone surrogate at character {error.start}"
    return f"{size:,} bytes, the limit is {MAX_RECORD_BYTES:,}" if size > MAX_RECORD_BYTES else ""


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _value(value: Any, kind: str) -> tuple[Any, str]:
    if kind == "text":
        return value, fault(value)
    if kind == "filled":
        return value, fault(value) or ("" if value.strip() else "an empty text")
    if kind == "messages":
        return _messages(value)
    if kind in ("passage", "targets"):  # of several parts; or several, each for itself
        texts, bad = _value([value] if isinstance(value, str) else value, "texts")
        bad = bad.replace(KINDS["texts"], KINDS[kind])
        return texts if kind == "targets" or bad else " ".join(texts), bad
    if kind in ("texts", "labels"):
        if not isinstance(value, list | tuple) or not value:
            empty = "an empty list" if isinstance(value, list | tuple) else _type(value)
            return None, f"the value is {empty}, not {KINDS[kind]}"
        pairs = [_value(item, kind[:-1]) for item in value]
        return [item for item, _ in pairs], next((bad for _, bad in pairs if bad), "")
    if kind == "set":
        labels, bad = ([], "") if value in ([], ()) else _value(value, "labels")
        bad = bad or ("a label twice" if len(set(labels)) < len(labels) else "")
        return labels, bad.replace(KINDS["labels"], KINDS["set"])
    if kind == "label":
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not isinstance(value, str):
            return None, f"the value is {_type(value)}, not {KINDS[kind]}"
        text = str(value).strip()
        return text, fault(text) if text else "an empty label"
    if kind == "number":
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        return number, "" if math.isfinite(number) else f"{value!r} is not {KINDS[kind]}"
    return _answers(value)


def _answers(value: Any) -> tuple[Any, str]:
    """SQuAD's two ways to write answers, as [(first character, text), …]."""
    bad = f"the value is not {KINDS['answers']}"
    if isinstance(value, list | tuple):
        rows = [x if isinstance(x, dict) else {} for x in value]
        value = {key: [row.get(key) for row in rows] for key in ("text", "answer_start")}
    if not isinstance(value, dict):
        return None, bad
    texts, starts = value.get("text"), value.get("answer_start")
    if not (isinstance(texts, list | tuple) and isinstance(starts, list | tuple)):
        return None, bad
    if len(texts) != len(starts) or not all(isinstance(i, int) and i >= 0 for i in starts):
        return None, bad
    wrong = next(filter(None, map(fault, texts)), "")
    return list(zip(starts, texts, strict=True)), wrong


def _messages(value: Any) -> tuple[Any, str]:
    """The turns of a conversation as [{"role", "content"}, …], whichever way they are written."""
    if isinstance(value, dict) and all(isinstance(value.get(x), list) for x in ("role", "content")):
        pairs = itertools.zip_longest(value["role"], value["content"])
        value = [{"role": role, "content": content} for role, content in pairs]
    if not isinstance(value, list | tuple) or not value:
        empty = "an empty list" if isinstance(value, list | tuple) else _type(value)
        return None, f"the value is {empty}, not {KINDS['messages']}"
    for number, message in enumerate(value, 1):
        if bad := _message_fault(message):
            return None, f"message {number}: {bad}"
    if not any(message["role"] == "assistant" for message in value):
        return None, "no message of the assistant, from which alone is learnt"
    return [{key: message[key] for key in ("role", "content")} for message in value], ""


def _message_fault(message: Any) -> str:
    if not isinstance(message, dict):
        return f"it is {_type(message)}, not {{'role': ..., 'content': ...}}"
    for key in ("role", "content"):
        if key not in message:
            return f"it has no {key!r}, but {', '.join(map(repr, list(message)[:20]))}"
    if message["role"] not in ROLES:
        return f"the role {quoted(str(message['role']))} is none of {', '.join(ROLES)}"
    return _value(message["content"], "filled")[1]
