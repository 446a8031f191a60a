"""Files that are written as a whole or not at all."""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from fmjax.io.storage import WORKDIR, writing


def write_atomic(path: Path, text: str, key: str = WORKDIR) -> None:
    """Writes `text` so that readers, and a crash, see the old file or the new one, never a part.

    Raises CheckpointError where it cannot be written; `key` is what a user sets to have it
    elsewhere.
    """
    _replace(path, lambda file: file.write(f"{text}\n".encode()), key)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz as a whole or not at all; raises CheckpointError where it cannot be."""
    _replace(path, lambda file: np.savez_compressed(file, **arrays))


def _replace(path: Path, write: Callable[[IO[bytes]], Any], key: str = WORKDIR) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path, key):
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # on a full disk the part would take room, too
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
