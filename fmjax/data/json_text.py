"""JSON that others wrote: every fault of a text is a ValueError."""

import collections
import json
from typing import Any

from fmjax.errors import quoted


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError for a text that is not JSON, is nested too deeply, or has an object with a
    key twice: nobody can say which of its two values is meant.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def record(text: str) -> dict[str, Any]:
    """The object of a JSON text. Raises ValueError for any other text."""
    value = loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((twice, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quoted(twice, 80)} is there twice")
    return fields
