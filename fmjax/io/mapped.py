"""Memory-mapped files of a cache folder that notice when they change."""

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fmjax.errors import DataError


class MappedFiles:
    """Arrays in the files of a folder, whose digests have been checked.

    A memory map shows what is written into its file later, and ends the process where it is read
    beyond the end of a file that was cut. A file that was removed or replaced is safe: it stays as
    it was for those that have it open.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._opened: list[tuple[str, int, tuple[int, int]]] = []  # name, descriptor, stamp

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).exists()

    def raw(self, name: str, dtype: np.dtype | type) -> np.ndarray:
        """The numbers of a file that holds nothing else: [numbers], in read-only memory."""
        return np.memmap(self._open(name), dtype, "r")

    def npy(self, name: str) -> np.ndarray:
        """The array in a file of numpy's format, in read-only memory."""
        try:
            return np.load(self._open(name), mmap_mode="r")
        except ValueError as error:  # it was cut, or is of no such format
            raise self._changed(name) from error

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """A block that reads the arrays. Raises DataError if a file has been written to since it
        was opened, also in the place of an error of the block: what it read may be nonsense."""
        self._check()
        try:
            yield
        finally:
            self._check()

    def _check(self) -> None:
        for name, descriptor, stamp in self._opened:
            if _stamp(descriptor) != stamp:
                raise self._changed(name)

    def _changed(self, name: str) -> DataError:
        return DataError(
            f"{self.folder / name} has been changed while it was read. The same command prepares "
            "it again, and goes on from the last checkpoint."
        )

    def _open(self, name: str) -> Path:
        descriptor = os.open(self.folder / name, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        self._opened.append((name, descriptor, _stamp(descriptor)))
        return self.folder / name


def _stamp(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_mtime_ns, found.st_size
