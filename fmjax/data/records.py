"""The records that every source yields, and the types that their columns must have."""

import itertools
import math
from typing import Any, NamedTuple

from fmjax.errors import quoted

MAX_RECORD_BYTES = 1 << 24  # a long book is 4 MB
EXCERPT = 1000  # characters of a bad record that quarantine keeps
LIMIT_32 = 2.0**128 - 2.0**103  # from here on a number rounds to an infinity of 32 bits

# What a column can be asked to hold, as messages name it.
KINDS = {
    "text": "text",
    "texts": "a list of texts",
    "passage": "text or a list of texts",
    "targets": "text or a list of texts",
    "label": "text or a whole number",
    "number": "a finite number of 32 bits",
    "labels": "a list of texts or whole numbers",
    "set": "a list of texts or whole numbers, none of them twice",
    "answers": "{'text': [...], 'answer_start': [...]}",
    "filled": "text that is not empty",
    "messages": "a list of {'role': ..., 'content': ...}",
}
ROLES = ("system", "user", "assistant")
# Of a message: what is used, and what published conversations have that says nothing of how one is
# written or learnt. Files for fine-tuning by OpenAI, Mistral and axolotl have weights.
MESSAGE_KEYS = frozenset(
    "role content weight id message_id parent_id turn_id turn_identifier timestamp created_at date "
    "model language lang country state hashed_ip header toxic redacted tokens token_count "
    "metadata source".split()
)


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
            names = ", ".join(quoted(name, 80) for name in list(found)[:20])
            return {}, f"no column {column!r} (config.data.columns, config.data.label), but {names}"
        fields[column], bad = _value(found[column], kind)
        if bad:
            return {}, bad if len(schema) == 1 else f"column {column!r}: {bad}"
    return fields, ""


def excerpt(value: Any) -> str:
    """The beginning of what a bad record holds."""
    if isinstance(value, bytes):
        return value[:EXCERPT].decode(errors="replace")
    try:
        return str(value)[:EXCERPT]
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply to be shown"


def fault(value: Any) -> str:
    """The problem with a value that should be text; empty if there is none."""
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
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        return number, "" if abs(number) < LIMIT_32 else f"{quoted(value)} is not {KINDS[kind]}"
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
    if len(texts) != len(starts) or not all(type(i) is int and i >= 0 for i in starts):
        return None, bad
    wrong = next(filter(None, map(fault, texts)), "")
    return list(zip(starts, texts, strict=True)), wrong


def _messages(value: Any) -> tuple[Any, str]:
    """The turns of a conversation as [{"role", "content"}, …], whichever way they are written; with
    "weight" where it has one, 0 for an answer that is not to be learnt and 1 for one that is."""
    if isinstance(value, dict) and all(isinstance(value.get(x), list) for x in ("role", "content")):
        if single := [key for key, row in value.items() if not isinstance(row, list)]:
            return None, f"{quoted(single[0])} is not a list, as the roles and contents are"
        rows = itertools.zip_longest(*value.values())
        value = [dict(zip(value, row, strict=True)) for row in rows]
    if not isinstance(value, list | tuple) or not value:
        empty = "an empty list" if isinstance(value, list | tuple) else _type(value)
        return None, f"the value is {empty}, not {KINDS['messages']}"
    for number, message in enumerate(value, 1):
        if bad := _message_fault(message):
            return None, f"message {number}: {bad}"
    answers = [message for message in value if message["role"] == "assistant"]
    if not answers:
        return None, "no message of the assistant, from which alone is learnt"
    if not any(_weight(message) for message in answers):
        return None, "the weight of each message of the assistant is 0: nothing is learnt"
    keys = lambda message: ("role", "content") + ("weight",) * (_weight(message) == 0)
    return [{key: message[key] for key in keys(message)} for message in value], ""


def _weight(message: dict[str, Any]) -> Any:
    return 1 if message.get("weight") is None else message["weight"]


def _message_fault(message: Any) -> str:
    if not isinstance(message, dict):
        return f"it is {_type(message)}, not {{'role': ..., 'content': ...}}"
    for key in ("role", "content"):
        if key not in message:
            names = ", ".join(quoted(name, 80) for name in list(message)[:20])
            return f"it has no {key!r}, but {names}"
    if message["role"] not in ROLES:
        return f"the role {quoted(str(message['role']))} is none of {', '.join(ROLES)}"
    said = lambda value: value is not None and value not in ("", [], {})
    if lost := [key for key in message if key not in MESSAGE_KEYS and said(message[key])]:
        return (
            f"the key {quoted(lost[0])} would be lost, which may change what is to be learnt: take "
            "it out"
        )
    weight = _weight(message)
    if weight not in (0, 1):
        return f"the weight {quoted(weight)} is neither 0, not to be learnt, nor 1"
    if message["role"] != "assistant" and message.get("weight"):
        return f"weight 1 of the {message['role']}, from whom nothing is learnt"
    return _value(message["content"], "filled")[1]
