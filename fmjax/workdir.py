"""The folder of one run: who works in it, with which config, and how far it came.

    config.json    what the run was started with, secrets removed
    status.json    state, step, reason, exit code: enough for a supervisor or a person
    lock.json      host, pid and start time of the process that works here; the kernel's lock on
                   this file is what counts, so a crash leaves nothing to clean up

Nothing here imports jax.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fmjax import config as configs
from fmjax.errors import CheckpointError, ConfigError, Preempted, ResourceError

EXAMPLES = "examples.npz"  # what each example of the last evaluation adds to its means
ABOUT_EXAMPLES = ("label", "tokens", "step")  # what else is there
LEDGER = "ledger.json"
# All that fmjax writes, hence all that --fresh removes. What marks a folder as a run comes last, so
# that an interrupted removal can be repeated.
WRITES = (
    "arms",
    "checkpoints",
    "tokenizer",
    "tensorboard",
    "wandb",
    "dumps",
    "metrics.jsonl",
    "evaluation.jsonl",
    EXAMPLES,
    LEDGER,
    "summary.json",
    "report.html",
    "status.json",
    "config.json",
)
MARKS = ("config.json", "status.json", "lock.json")


class InUse(ConfigError):
    """Another process works here."""


class Folder:
    """An opened run folder. `previous` is the status.json found in it, {} for a new run."""

    def __init__(self, path: Path, previous: dict[str, Any], writes: bool):
        self.path = path
        self.previous = previous
        self.failure: BaseException | None = None  # of this run alone, while others go on
        self._writes = writes
        self._stale = False  # whether status.json lacks the last update
        self._status = {"state": "running", "step": 0, "checkpoint": 0, "reason": ""}
        # What is known to be saved stays known until something else is: see fmjax.begin.states.
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
        except OSError as error:
            if not self._stale:
                print(f"warning: cannot write {file} now: {error.strerror}", file=sys.stderr)
            self._stale = True

    def close(self, error: BaseException | None) -> None:
        """Records how the run has ended: well if there is no error."""
        before, error = self.previous, self.failure or error
        if error is None and before.get("state") == "done" and before["step"] == self.step:
            # The run had already ended: leave no trace of having looked.
            self._status = {k: v for k, v in before.items() if k != "time"}
            if self._writes:
                with contextlib.suppress(OSError):
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
        """Whether an earlier sitting came to the end of the run, report and all."""
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
    that the others neither look before it is ready nor go on where it refuses. An XLA out-of-memory
    error leaves as a ResourceError.

    Raises:
      ConfigError: another process works here, or the folder holds a run with another config.
      CheckpointError: the folder cannot be written, or its config.json cannot be read.
    """
    path = Path(path).absolute()
    with contextlib.ExitStack() as stack:

        def begin():
            check(path, config, fresh=fresh)
            stack.enter_context(locked(path, log))
            if fresh:
                for arm in sorted(path.glob("arms/*")):  # where one may go on alone
                    with locked(arm, log):
                        pass
                _remove(path)
            check(path, config)
            _keep_config(path / "config.json", config, log)
            return _read_json(path / "status.json")

        folder = Folder(path, first(begin), writes)
        folder.update(exit_code=None)
        try:
            with memory_errors():
                yield folder
        except BaseException as error:
            folder.close(error)
            raise
        folder.close(None)


def check(path: str | os.PathLike, config: ConfigDict, *, fresh: bool = False) -> None:
    """Refuses a folder that `open` would refuse for its content. Reads only; takes no lock."""
    path = Path(path)
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
    changed = [row for row in _changes(path / "config.json", config) if not _free(row)]
    if changed:
        raise ConfigError(
            f"{path} holds a run with another config ({_listed(changed)}): "
            "use another --workdir, or --fresh to remove that run and start over"
        )


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


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` so that readers, and a crash, see the old file or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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


def is_locked(file: Path) -> bool:
    """Whether a process holds this lock file."""
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _keep_config(file: Path, config: ConfigDict, log: Callable[[str], None]) -> None:
    changed = _changes(file, config)
    if changed:
        log(f"continuing with changed settings: {_listed(changed)}")
    if changed or not file.exists():
        write_atomic(file, configs.to_json(configs.redact(config)))


def _changes(file: Path, config: ConfigDict) -> list[tuple[str, Any, Any]]:
    try:
        saved = configs.from_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. --fresh starts over") from error
    return configs.diff(saved, configs.redact(config))


def _free(row: tuple[str, Any, Any]) -> bool:
    return configs.may_change(row[0])


def _listed(changed: list[tuple[str, Any, Any]], most: int = 8) -> str:
    shown = [f"{key}: {old!r} -> {new!r}" for key, old, new in changed[:most]]
    more = [f"and {len(changed) - most} more"] if len(changed) > most else []
    return ", ".join(shown + more)


@contextlib.contextmanager
def locked(path: Path, log: Callable[[str], None], name: str = "lock.json") -> Iterator[None]:
    """Holds the lock file `name` of a folder, after proving that the folder can be written.

    Raises InUse where another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((path / name).open("a+", encoding="utf-8"))
            _flock(file, path, log)
            file.seek(0)
            stale = _parse_json(file.read())
            if stale:
                log(f"the previous run here ({_who(stale)}) did not end by itself")
            file.truncate(0)
            me = {"host": socket.gethostname(), "pid": os.getpid(), "start": _now()}
            file.write(json.dumps(me))
            file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written ({error.strerror or error}): use another --workdir"
            ) from error
        try:
            yield
        finally:  # Only a run that could not say goodbye leaves its name here.
            with contextlib.suppress(OSError):
                file.truncate(0)


def _flock(file, path: Path, log: Callable[[str], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = _who(_parse_json(file.read()))
        raise InUse(
            f"{path} is in use ({holder}): wait for that run, stop it, or use another --workdir"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        log(f"{path}: this file system has no locks; do not start two runs here")


def _remove(path: Path) -> None:
    for name in WRITES:
        item = path / name
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink(missing_ok=True)


def _who(holder: dict[str, Any]) -> str:
    keys = ("host", "pid", "start")
    return ", ".join(f"{key} {holder[key]}" for key in keys if key in holder) or "unknown process"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return _parse_json(file.read_text(encoding="utf-8"))
    except OSError:
        return {}


def _parse_json(text: str) -> dict[str, Any]:
    """A JSON object, or {} for anything else: these files inform, nothing depends on them."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
