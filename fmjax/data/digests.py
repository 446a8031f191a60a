"""Digests of the files that data are made of, which must not change while they are read."""

import os
import time
from pathlib import Path

from fmjax.data import lines
from fmjax.errors import DataError
from fmjax.io import disk_cache

GRAIN = 0.02  # seconds; a file system may note the time of a change in steps of a kernel's tick


class Digests:
    """Digests of files, by which their prepared form is stored; `key` is what named them.

    A file that changes after its digest was taken would be stored under the digest of another
    text, and every later run with that cache would train on it.
    """

    def __init__(self, key: str):
        self._key = key
        self._states: dict[Path, tuple] = {}

    def take(self, path: Path) -> str:
        """The digest of a file. Raises DataError where it cannot be read."""
        with lines.readable(path, self._key):
            self._states[path] = _state(path)
            if self._states[path][0] == 0 and _first_byte(path):
                raise DataError(
                    f"{path}: has content but no size, as files of /proc, which may be endless. "
                    f"Copy it to a disk; config.{self._key}"
                )
            digest = disk_cache.file_digest(path)
        self.check(path)
        return digest

    def check(self, path: Path) -> None:
        """Raises DataError if a file changed since its digest was taken."""
        with lines.readable(path, self._key):
            changed = _state(path) != self._states[path]
        if changed:
            raise DataError(
                f"{path}: changed while it was read. Start again when nothing writes to it any "
                f"more; config.{self._key}"
            )

    def check_all(self) -> None:
        """`check` of every file whose digest was taken."""
        for path in self._states:
            self.check(path)


def _first_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1)


def _state(path: Path) -> tuple[int, int, int]:
    """Facts that a write changes: the size, and the times of the last change."""
    found = os.stat(path)
    age = time.time() - found.st_ctime
    if 0 <= age < GRAIN:  # a change in the same step would not show
        time.sleep(GRAIN - age)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
