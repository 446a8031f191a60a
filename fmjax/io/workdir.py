"""The folder of one run: who works in it, with which config, and how far it came.

    config.json    what the run was started with, secrets removed
    status.json    state, step, reason, exit code: enough for a supervisor or a person
    lock.json      host, pid and start time of the process that works here; the kernel's lock on
                   this file is what counts, so a crash leaves nothing to clean up

Nothing here imports jax.
"""

import contextlib
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fmjax.config import load as configs
from fmjax.errors import CheckpointError, ConfigError, Preempted, ResourceError
from fmjax.io import run_config, summary
from fmjax.io.atomic import write_atomic
from fmjax.io.lock import Lock, locked
from fmjax.io.storage import check_name, read_object, writing, writing_in

EXAMPLES = "examples.npz"  # what each example of the last evaluation adds to its means
ABOUT_EXAMPLES = ("label", "tokens", "step")  # what else is there
PREDICTIONS = "predictions.json"  # a few examples of the last evaluation, for the report
LEDGER = "ledger.json"
# All that fmjax writes, hence all that --fresh removes. What marks a folder as a run comes last, so
# that an interrupted removal can be repeated.
WRITES = (
    "arms",
    "checkpoints",
    "tokenizer",
    "image_processor",
    "tensorboard",
    "wandb",
    "dumps",
    "metrics.jsonl",
    "evaluation.jsonl",
    EXAMPLES,
    PREDICTIONS,
    LEDGER,
    "summary.json",
    "report.html",
    "status.json",
    "config.json",
)
MARKS = ("config.json", "status.json", "lock.json")


class Folder:
    """An opened run folder. `previous` is the status.json found in it, {} for a new run; `lock` is
    held by the process that writes."""

    def __init__(self, path: Path, previous: dict[str, Any], lock: Lock | None, writes: bool):
        self.path, self.previous, self.lock = path, previous, lock
        self.failure: BaseException | None = None  # of this run alone, while others continue
        self._writes = writes
        self._stale = False  # whether status.json lacks the last update
        self._status = {"state": "running", "step": 0, "checkpoint": 0, "reason": ""}
        # What is known to be saved stays known until something else is: see
        # fmjax.training.restore.states.
        self._status |= {key: previous[key] for key in ("step", "checkpoint") if key in previous}

    def update(self, **facts) -> None:
        """Merges `facts` (step=…, and anything JSON) into status.json.

        A full disk is not worth a training run: a status that cannot be written is skipped, which
        is said once.
        """
        self._status |= facts
        if not self._writes:
            return
        file, status = self.path / "status.json", self._status | {"time": _now()}
        try:
            write_atomic(file, json.dumps(status, indent=2))
            self._stale = False
        except CheckpointError as error:
            if not self._stale:
                print(f"warning: {error}", file=sys.stderr)
            self._stale = True

    def close(self, error: BaseException | None) -> None:
        """Records how the run has ended: well if there is no error."""
        before, error = self.previous, self.failure or error
        if error is None and before.get("state") == "done" and before["step"] == self.step:
            # The run had already ended: leave no trace of having looked.
            self._status = {k: v for k, v in before.items() if k != "time"}
            if self._writes:
                with contextlib.suppress(CheckpointError):
                    write_atomic(self.path / "status.json", json.dumps(before, indent=2))
        elif error is None:
            self.update(state="done", reason="", exit_code=0)
        else:
            state = "preempted" if isinstance(error, Preempted) else "failed"
            reason = f"{type(error).__name__}: {error}"[:2000]
            code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
            self.update(state=state, reason=reason, exit_code=code)

    @property
    def step(self) -> int:
        return self._status["step"]

    @property
    def finished(self) -> bool:
        """True if an earlier session finished the run, or what remained of the others after it has
        failed, with its report."""
        if self.failure:
            return self.previous.get("state") == "failed"
        return self.previous.get("state") == "done" and self.previous.get("exit_code") == 0


@contextlib.contextmanager
def open(
    path: str | os.PathLike,
    config: ConfigDict,
    *,
    fresh: bool = False,
    writes: bool = True,
    first: Callable[[Callable[[], Any]], Any] = lambda call: call(),
    log: Callable[[str], None] = print,
) -> Iterator[Folder]:
    """Opens the run folder for one process, creating it if need be, and records how the run ends.

    Of several processes one writes; `first(call)` gives what `call()` returns or raises there, so
    that the others neither look before it is ready nor continue where it refuses. An XLA
    out-of-memory error leaves as a ResourceError.

    Raises:
      ConfigError: another process works here, or the folder holds a run with another config.
      CheckpointError: the folder cannot be written, or its config.json cannot be read.
    """
    path, locks = Path(path).absolute(), []
    with contextlib.ExitStack() as stack:

        def begin():
            check(path, config, fresh=fresh)
            locks.append(stack.enter_context(locked(path, log)))
            if fresh:
                _clear(path, log)
            check(path, config)
            _keep_config(path, config, log)
            return _read_status(path / "status.json")

        folder = Folder(path, first(begin), locks[0] if locks else None, writes)
        folder.update(exit_code=None)
        try:
            with memory_errors(), writing_in(path):
                yield folder
        except BaseException as error:
            folder.close(error)
            raise
        folder.close(None)


def check(path: str | os.PathLike, config: ConfigDict, *, fresh: bool = False) -> None:
    """Raise the errors that `open` would raise for a folder's content. Reads only; takes no
    lock."""
    path = Path(path).absolute()
    check_name(path)
    if os.path.exists(path) and not os.path.isdir(path):  # a Path raises for too long names
        raise ConfigError(f"--workdir={path} is a file: name a folder")
    if fresh:
        found = sorted(os.listdir(path)) if os.path.isdir(path) else []
        if found and not set(MARKS) & set(found):
            raise ConfigError(
                f"--fresh: {path} holds no run of fmjax (no config.json) but {found[0]!r}: "
                "nothing was removed, use another --workdir"
            )
        return
    run_config.check(path, config)


def of_arms(path: Path, config: ConfigDict) -> list[Path]:
    """The folders of the arms of a run (`config.arms`); of a run without any, its own."""
    arms = range(len(configs.arms(config)))
    return [path / "arms" / str(arm) for arm in arms] if config.get("arms") else [path]


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turns XLA's out-of-memory error into a ResourceError that says what to change."""
    try:
        yield
    except RuntimeError as error:  # Not ValueError: with the same words that is a full disk.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ResourceError(
            f"out of memory ({str(error).strip().splitlines()[0][:200]}). Lower "
            "--config.batch_size, raise --config.accumulate, turn on --config.model.remat, or "
            "spread the state over more devices with --config.mesh.fsdp"
        ) from error


def read_examples(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of examples.npz, {} where a run has none. Raises CheckpointError for a damaged
    file."""
    file = folder / EXAMPLES
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:
            return dict(arrays.items())
    except FileNotFoundError:
        return {}  # a task or an objective that says nothing of single examples
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): remove it, and means are compared alone, or do the "
            "run again with --fresh."
        ) from error


def _keep_config(path: Path, config: ConfigDict, log: Callable[[str], None]) -> None:
    """Writes config.json, after the log of what has changed. A folder in which nothing has been
    trained takes any config."""
    rows, source = run_config.compare(path, config)
    if source:
        log(source)
    if run_config.is_other(rows):
        log(f"{path} holds no step of a run yet: starting over ({run_config.listed(rows)})")
        _clear(path, log)
    elif rows:
        log(f"continuing with changed settings: {run_config.listed(rows)}")
    text = configs.to_json(configs.redact(config))
    if run_config.read(path) != f"{text}\n".encode():
        write_atomic(path / run_config.FILE, text)


def _clear(path: Path, log: Callable[[str], None]) -> None:
    """Removes a run, unless another process continues one of its arms alone."""
    for arm in sorted(path.glob("arms/*")):
        with locked(arm, log):
            pass
    with writing(path):
        _remove(path)


def _remove(path: Path) -> None:
    for name in WRITES:
        item = path / name
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink(missing_ok=True)


def _read_status(file: Path) -> dict[str, Any]:
    """status.json as `Folder` writes it, or {} for anything else.

    A run whose summary.json is damaged has not ended, so that it is written again.
    """
    status = read_object(file)
    if not all(type(status.get(key)) is int for key in ("step", "checkpoint")):
        return {}
    unended = {"state": "running", "exit_code": None} if summary.is_damaged(file.parent) else {}
    return status | unended


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
