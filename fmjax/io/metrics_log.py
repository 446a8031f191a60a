"""The log of a run: metrics.jsonl always, TensorBoard, and Weights & Biases on request.

`metrics.jsonl` holds one JSON object a line, of two kinds:

    {"step": 10, "time": 8.4, "spent": {"data_wait": 0.02}, "train/loss": 9.01, ...}
    {"event": "checkpoint", "step": 10, "time": 8.9, ...}

`time` is the seconds the run has been running, all its sessions added up; `spent` the seconds
since the line before that did not go into training steps. The file tells one history: a run that
resumes at step N cuts what came after step N, and its "resume" line says what that had cost.
"""

import contextlib
import datetime
import io
import json
import math
import numbers
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fmjax.config.load import SECRET
from fmjax.errors import CheckpointError
from fmjax.io import metrics_history, storage, trackers

# What a run spends time on beside training steps.
SPENT = ("init", "compile", "restore", "data_wait", "evaluation", "saving")
RESERVED = frozenset({"step", "time", "spent", "event"})
FILE = "metrics.jsonl"


class Logger:
    """Writes metrics and events of one run; in processes other than 0 it writes nothing.

    resume_step: steps already done in the restored state; 0 starts from the beginning.
    config: a plain mapping, shown by W&B.
    started: `time.monotonic()` when this session began; from then to now counts as "init".
    restore_sec: the part of that time in which a checkpoint was read; it counts as "restore".

    A "start" or "resume" line is written at once, with the date and the command. `spent` holds the
    seconds of this session by kind, for whoever wants the share of a window.
    Raises ConfigError if W&B is asked for and not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        resume_step: int = 0,
        tensorboard: bool = True,
        wandb: bool = False,
        config: Mapping[str, Any] | None = None,
        process_index: int = 0,
        started: float | None = None,
        restore_sec: float = 0.0,
    ):
        if wandb:
            trackers.require_wandb()
        now = time.monotonic()
        started = now if started is None else started
        self.spent = dict.fromkeys(SPENT, 0.0)
        self.spent |= {"init": now - started - restore_sec, "restore": restore_sec}
        self._told = dict.fromkeys(SPENT, 0.0)
        self._timing = False
        self._file, self._trackers = None, []
        if process_index != 0:
            return

        workdir = Path(workdir)
        self._path = workdir / FILE
        lines, reached, damage = metrics_history.cut(self._path, resume_step)
        if resume_step and not lines and not damage:
            damage = f"{self._path} is gone: it will lack the {resume_step} steps before"
        if damage:
            print(f"warning: {damage}", file=sys.stderr)
        self._pending = b""
        self._failed = False
        self._zero = started - reached
        fields = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        fields["command"] = command(sys.argv)
        if lines:
            fields["lost_sec"] = round(reached - lines[-1]["time"], 3)
        if wandb:
            known = [line["wandb_id"] for line in lines if "wandb_id" in line]
            fields["wandb_id"] = known[-1] if known else secrets.token_hex(4)
            self._trackers.append(
                trackers.Wandb(workdir, fields["wandb_id"], config or {}, resumed=bool(lines))
            )
        if tensorboard:
            # What an earlier session wrote for the steps to be repeated is hidden.
            purge = resume_step + 1 if lines else None
            self._trackers.append(trackers.TensorBoard(workdir / "tensorboard", purge))
        with storage.writing(self._path):  # last, since nothing above closes it again
            self._file = _append_to(self._path)
        self.event("resume" if lines else "start", step=resume_step, **fields)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line of metrics, valid after `step` steps.

        Values are numbers or scalar arrays and become Python ints or floats, so that counters
        stay exact. NaN and infinity are kept (as strings in the file).
        """
        clash = RESERVED & metrics.keys()
        assert not clash, f"metric names {sorted(clash)} are taken by the log itself"
        if self._file is None:
            return
        metrics = {name: _number(value) for name, value in metrics.items()}
        self._append({"step": step, **self._clock(), **metrics})
        for tracker in self._trackers:
            tracker.write(step, metrics)

    def event(self, name: str, **fields: Any) -> None:
        """Append one event with fields that are JSON; pass `step=` where there is one.

        An event without a step belongs to the step of the line before it.
        """
        if self._file is not None:
            self._append({"event": name, **self._clock(), **fields})

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Count the seconds of the block as `kind` (of SPENT); a block inside it counts with it."""
        assert kind in SPENT, f"{kind!r} is not one of {SPENT}"
        if self._timing:
            yield
            return
        begin, self._timing = time.monotonic(), True
        try:
            yield
        finally:
            self._timing = False
            self.spent[kind] += time.monotonic() - begin

    def close(self) -> None:
        """Finish all writers. Raises CheckpointError if lines could not be written to the end."""
        if self._file is None:
            return
        self._flush()
        self._file.close()
        self._file = None
        for tracker in self._trackers:
            tracker.close()
        if self._pending:
            raise CheckpointError(
                f"the last lines of {self._path} could not be written; free some space"
            )

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _clock(self) -> dict[str, Any]:
        """`time` now, and what was spent since the line before."""
        spent = {kind: self.spent[kind] - self._told[kind] for kind in SPENT}
        spent = {kind: round(seconds, 3) for kind, seconds in spent.items() if seconds >= 0.0005}
        self._told.update({kind: self._told[kind] + seconds for kind, seconds in spent.items()})
        clock = {"time": round(time.monotonic() - self._zero, 3)}
        return clock | ({"spent": spent} if spent else {})

    def _append(self, line: Mapping[str, Any]) -> None:
        self._pending += json.dumps(plain(line), allow_nan=False).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        """Write pending lines; on a full disk they wait for the next flush."""
        try:
            if self._pending:
                self._follow()
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
            self._failed = False
        except OSError as error:
            if not self._failed:
                print(f"warning: cannot write {self._path} now: {error.strerror}", file=sys.stderr)
            self._failed = True

    def _follow(self) -> None:
        """Continue in a new file where the old one was removed, with its lines, which are still
        there for those who have it open; where it was replaced, in the other file."""
        old = self._file
        removed = not self._path.exists()
        if not removed and os.path.samestat(self._path.stat(), os.fstat(old.fileno())):
            return
        lines = b""
        if removed:
            said = "it is written again"
            try:
                old.seek(0)
                lines = old.read()
            except OSError as error:  # another machine removed it, from a network's file system
                said = f"its lines so far are lost ({error.strerror})"
            print(f"warning: {self._path} was removed: {said}", file=sys.stderr)
        self._file = _append_to(self._path)
        self._pending = lines + self._pending
        with contextlib.suppress(OSError):
            old.close()


def read(workdir: str | os.PathLike) -> tuple[list[dict], list[dict]]:
    """(metric rows, events) of a run folder in the order written; both empty without a file."""
    lines = metrics_history.read(Path(workdir) / FILE).lines
    return (
        [line for line in lines if "event" not in line],
        [line for line in lines if "event" in line],
    )


def goodput(rows: list[dict], events: list[dict]) -> dict[str, float]:
    """Seconds by kind: "step" (training proper), the kinds of SPENT, "lost" to roll-backs.

    They add up to the time the run has been running: what no line claims went into steps.
    """
    lines = rows + events
    seconds = {kind: sum(line.get("spent", {}).get(kind, 0.0) for line in lines) for kind in SPENT}
    seconds["lost"] = sum(event.get("lost_sec", 0.0) for event in events)
    total = max((line["time"] for line in lines), default=0.0)
    return {"step": max(0.0, total - sum(seconds.values())), **seconds}


def plain(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: they become strings float() reads."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _append_to(path: Path) -> io.FileIO:
    # Unbuffered: a line is with the operating system when write() returns.
    return open(path, "a+b", buffering=0)


def _number(value: Any) -> int | float:
    """A Python number: integers stay exact beyond 2^53, scalar arrays are read."""
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def command(words: list[str]) -> str:
    """The command that continues with this run: without --fresh, and without secrets."""
    shown, flag = ["python"], ""
    for word in words:
        if word.startswith("--"):
            flag, given, value = word.partition("=")
        else:  # the value of the flag before it
            given, value = "", word
        names = flag.split(".") + re.findall(r"['\"]([\w-]+)['\"]\s*:", value)  # keys of a dict
        if value and any(SECRET.search(name) for name in names):
            word = f"{flag}=***" if given else "***"
        shown += [word] if word != "--fresh" else []
    return shlex.join(shown)
