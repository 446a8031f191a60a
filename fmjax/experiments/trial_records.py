"""The records of the trials of a sweep: what came of each, written when it has ended."""

import sys
from pathlib import Path
from typing import Any

from fmjax.io import sealed, summary

Record = dict[str, Any]


def read(file: Path) -> Record | None:
    """A record, None where there is none. One that is damaged is said and as good as none: the run
    that it is about has its own folder, from which it is written again."""
    try:
        record = sealed.read(file)
        if wrong := _problem(record):
            raise ValueError(wrong)
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(
            f"warning: {file} is damaged ({error}) and left out: the same --sweep writes it again",
            file=sys.stderr,
        )
        return None
    return record


def write(file: Path, record: Record) -> None:
    """Writes a record. Raises CheckpointError where it cannot be written."""
    sealed.write(file, record)


def _problem(record: Record) -> str:
    """The first field that a record lacks, "" if it is complete."""
    kinds = {
        "state": str,
        "reason": str,
        "command": str,
        "exit_code": int,
        "seconds": int | float,
        "results": list,
        "config": dict,
    }
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    if wrong:
        return f"no {wrong[0]}"
    return "" if all(map(_is_result, record["results"])) else "no results"


def _is_result(result: Any) -> bool:
    return (
        isinstance(result, dict)
        and summary.numbers(result.get("metrics"))
        and isinstance(result.get("arm"), dict)
        and isinstance(result.get("folder"), str)
        and isinstance(result.get("failed"), str)
        and "seed" in result
    )
