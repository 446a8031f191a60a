"""The lines of a metrics.jsonl, read so that damage to some of them costs no other.

A line is whole if it is JSON of the kinds that `logs.Logger` writes, and in order: neither time nor
steps ever fall from one line to the next. The last line of a process that was killed may be torn.
"""

import bisect
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fmjax.errors import CheckpointError
from fmjax.io.storage import writing

# Of an event, where it has them.
NUMBERS = ("step", "time", "lost_sec")
TEXTS = ("event", "command", "wandb_id")
MAX_TEXT = 2000  # characters of a damaged line that stay in the log


class Lines(NamedTuple):
    """The whole lines, the byte that each ends before, and how many others are not the torn end."""

    lines: list[dict[str, Any]]
    ends: list[int]
    damaged: int


def read(path: Path) -> Lines:
    """The lines of a log; none where there is no file. Raises CheckpointError where it cannot be
    read."""
    lines, ends, damaged, end = [], [], 0, 0
    for raw in _raw_lines(path):
        end += len(raw)
        line = parse(raw)
        if line is not None:
            lines.append(line)
            ends.append(end)
        elif raw.endswith(b"\n"):
            damaged += 1
    ordered = _in_order(lines)
    damaged += len(lines) - len(ordered)
    return Lines([lines[i] for i in ordered], [ends[i] for i in ordered], damaged)


def cut(path: Path, last_step: int) -> tuple[list[dict[str, Any]], float, str]:
    """Cuts a log after `last_step`: its remaining lines, the time it had reached before, and a
    sentence where lines were damaged: the file is then kept under another name.

    Raises CheckpointError where the log cannot be written.
    """
    lines, ends, damaged = read(path)
    reached = lines[-1]["time"] if lines else 0.0
    steps, step = [], 0
    for line in lines:
        step = line.get("step", step)
        steps.append(step)
    count = bisect.bisect_right(steps, last_step)
    if not path.exists():
        return [], reached, ""
    with writing(path):
        if not damaged:
            # One system call: a kill leaves the old file or the new one.
            os.truncate(path, ends[count - 1] if count else 0)
            return lines[:count], reached, ""
        copy = _unused(path)
        shutil.copy2(path, copy)
        _rewrite(path, ends[:count])
    said = f"{path}: left out damaged lines ({damaged}); the file as it was is {copy.name}"
    return lines[:count], reached, said


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): repair or remove it"
        ) from error


def parse(raw: bytes) -> dict[str, Any] | None:
    """A whole line, None for any other."""
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else None
        if not isinstance(line, dict):
            return None
        if "event" in line:
            return line if _is_event(line) else None
        spent = line.pop("spent", {})
        row = {key: _number(value) for key, value in line.items()}
        if _is_clock(line, spent) and type(line.get("step")) is int and line["step"] >= 0:
            return row | ({"spent": spent} if spent else {})
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    return None


def _is_event(line: dict[str, Any]) -> bool:
    numbers = [line[key] for key in NUMBERS if key in line]
    return (
        _is_clock(line, line.get("spent", {}))
        and all(_is_number(value) for value in numbers)
        and type(line.get("step", 0)) is int
        and all(isinstance(line.get(key, ""), str) for key in TEXTS)
    )


def _is_clock(line: dict[str, Any], spent: Any) -> bool:
    """True if the time of a line, and its spent seconds, are numbers."""
    return (
        _is_number(line.get("time"))
        and isinstance(spent, dict)
        and all(_is_number(seconds) for seconds in spent.values())
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _number(value: Any) -> int | float:
    """A number, which JSON has as text if it is not finite."""
    if type(value) not in (int, float, str):
        raise TypeError(value)
    number = float(value)
    return number if isinstance(value, str) else value


def _in_order(lines: Sequence[dict[str, Any]]) -> list[int]:
    """The indices of the most lines in which neither time nor steps fall."""
    stepped = [i for i, line in enumerate(lines) if "step" in line]
    wrong = set(stepped) - {stepped[i] for i in _rising([lines[i]["step"] for i in stepped])}
    rest = [i for i in range(len(lines)) if i not in wrong]
    return [rest[i] for i in _rising([lines[i]["time"] for i in rest])]


def _rising(values: Sequence[float]) -> list[int]:
    """The indices of a longest non-decreasing subsequence."""
    ends: list[int] = []  # of the subsequences of each length, the index of the least last value
    least: list[float] = []
    before: list[int] = []
    for i, value in enumerate(values):
        length = bisect.bisect_right(least, value)
        before.append(ends[length - 1] if length else -1)
        ends[length:] = [i, *ends[length + 1 :]]
        least[length:] = [value, *least[length + 1 :]]
    found, i = [], ends[-1] if ends else -1
    while i >= 0:
        found.append(i)
        i = before[i]
    return found[::-1]


def _rewrite(path: Path, ends: Sequence[int]) -> None:
    """Keeps the lines that end before the bytes `ends`, as a whole or not at all; those between
    them become events that tell where damage is."""
    temporary = path.with_name(f"{path.name}.tmp")
    whole, last, end, time = set(ends), max(ends, default=0), 0, 0.0
    with path.open("rb") as old, temporary.open("wb") as new:
        for raw in old:
            end += len(raw)
            if end in whole:
                time = json.loads(raw)["time"]
                new.write(raw)
            elif end < last:
                text = raw.decode(errors="backslashreplace").strip()[:MAX_TEXT]
                event = {"event": "damaged", "time": time, "line": text}
                new.write(json.dumps(event).encode() + b"\n")
        new.flush()
        os.fsync(new.fileno())
    os.replace(temporary, path)


def _unused(path: Path) -> Path:
    names = [f"{path.name}.damaged", *(f"{path.name}.damaged.{n}" for n in range(2, 1000))]
    return next(file for name in names if not (file := path.with_name(name)).exists())
