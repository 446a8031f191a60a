"""Locks of folders: one process works in each, and a crash leaves nothing to clean up.

The kernel's lock on a file counts, and what the file says is who holds it. People remove such files
as left behind, and the lock on a removed file stops nobody: a run's folder is locked, too.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from fmjax.errors import ConfigError
from fmjax.io.storage import writing

NAME = "lock.json"


class InUse(ConfigError):
    """Another process works here."""


class Lock:
    """The lock of the file `name` in a folder; of a run's folder itself, too, where its file system
    can lock folders. Raises InUse where another process holds it."""

    def __init__(self, folder: Path, name: str, log: Callable[[str], None]):
        self._folder, self._file, self._log = folder, folder / name, log
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if name == NAME:
                self._lock_folder(stack)
            self._opened = self._lock_file()
            self._folder_lock = stack.pop_all()

    def hold(self) -> None:
        """Locks the file again where it was removed or replaced.

        Raises InUse where another process has locked the new one, CheckpointError where it cannot
        be written.
        """
        if _is_same(self._opened, self._file):
            return
        with writing(self._file):
            self._folder.mkdir(parents=True, exist_ok=True)
            removed, self._opened = self._opened, self._lock_file()
        removed.close()
        self._log(f"{self._file} was removed while this run works here: written again")

    def release(self) -> None:
        with contextlib.suppress(OSError):  # Only a run that was killed leaves its name here.
            self._opened.truncate(0)
        self._opened.close()
        self._folder_lock.close()

    def _lock_folder(self, stack: contextlib.ExitStack) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._in_use() from error
        except OSError:  # network file systems lock files only
            pass

    def _lock_file(self) -> IO[str]:
        """The opened and locked file, which another process may replace in between."""
        while True:
            file = self._file.open("a+", encoding="utf-8")
            try:
                self._lock(file)
                if _is_same(file, self._file):
                    self._sign(file)
                    return file
            except BaseException:
                file.close()
                raise
            file.close()

    def _lock(self, file: IO[str]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._in_use() from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            self._log(f"{self._folder}: this file system has no locks; do not start two runs here")

    def _in_use(self) -> InUse:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            holder = _parse(self._file.read_text(encoding="utf-8"))
            return InUse(
                f"{self._folder} is in use ({_described(holder)}): wait for that run, stop it, or "
                "use another --workdir"
            )
        return InUse(
            f"{self._folder} is in use by a run whose {self._file.name} was removed: wait for that "
            "run, stop it, or use another --workdir"
        )

    def _sign(self, file: IO[str]) -> None:
        file.seek(0)
        if holder := _parse(file.read()):
            self._log(f"the previous run here ({_described(holder)}) did not end by itself")
        file.truncate(0)
        start = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": start}))
        file.flush()


@contextlib.contextmanager
def locked(path: Path, log: Callable[[str], None], name: str = NAME) -> Iterator[Lock]:
    """Holds the lock file `name` of a folder, after proving that the folder can be written.

    Raises InUse where another process holds it, CheckpointError where it cannot be written.
    """
    with writing(path):
        lock = Lock(path, name, log)
    try:
        yield lock
    finally:
        lock.release()


def is_locked(file: Path) -> bool:
    """True if a process holds this lock file."""
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _is_same(opened: IO[str], file: Path) -> bool:
    """True if the opened file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(opened.fileno()), os.stat(file))
    except FileNotFoundError:
        return False


def _described(holder: dict[str, Any]) -> str:
    keys = ("host", "pid", "start")
    return ", ".join(f"{key} {holder[key]}" for key in keys if key in holder) or "unknown process"


def _parse(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
