"""Objects of JSON lines, for the tasks that read files of questions and of sources."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fmjax.data import lines
from fmjax.errors import DataError, quoted


def read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line that is not empty. Raises DataError naming the line that
    holds something else."""
    for line in lines.read(path):
        where = f"{path}:{line.number}"
        if line.bad:
            raise DataError(f"{where}: {line.bad}")
        if line.text.strip():
            yield where, _object(line.text, where)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where}: JSON that is nested too deeply") from error
    except ValueError as error:  # no JSON, or a number of more digits than Python converts
        raise DataError(f"{where}: not JSON ({quoted(str(error))})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: {quoted(text)} is no JSON object, {{…}}")
    return value
