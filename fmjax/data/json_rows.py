"""Objects of JSON lines, for the tasks that read files of questions and of sources."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fmjax.data import json_text, lines
from fmjax.errors import DataError, quoted


def read(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line that is not empty; `config.<key>` named the file. Raises
    DataError naming the line that holds something else."""
    for line in lines.good(path, key):
        where = f"{path}:{line.number}"
        try:
            yield where, json_text.record(line.text)
        except ValueError as error:
            raise DataError(f"{where}: not a JSON object ({quoted(str(error))})") from error
