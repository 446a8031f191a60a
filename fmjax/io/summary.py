"""summary.json of a run or of a task: the numbers that came out, read where they are whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "summary.json"


def read(folder: Path) -> dict[str, Any]:
    """The summary of a folder, {} where there is none or it is damaged."""
    try:
        summary = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return summary if _is_whole(summary) else {}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def is_damaged(folder: Path) -> bool:
    return (folder / FILE).exists() and not read(folder)


def _is_whole(summary: Any) -> bool:
    if not isinstance(summary, dict) or "metrics" not in summary and "arms" not in summary:
        return False
    goodput = summary.get("goodput", {"step": 0.0})
    return (
        isinstance(summary.get("environment", {}), dict)
        and numbers(summary.get("metrics", {}))
        and numbers(goodput)
        and "step" in goodput
    )


def numbers(values: Any) -> bool:
    """True if it is a dict of numbers, which JSON has as text if they are not finite."""
    if not isinstance(values, Mapping):
        return False
    return all(isinstance(value, int | float | str) and _float(value) for value in values.values())


def _float(value: int | float | str) -> bool:
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True
