"""Errors of the file system as errors that say which file cannot be written, and what to do."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fmjax.errors import CheckpointError, quoted

WORKDIR = "--workdir"  # what most files are in
TMPDIR = "$TMPDIR"


@contextlib.contextmanager
def writing(path: str | os.PathLike, key: str = WORKDIR) -> Iterator[None]:
    """Raises CheckpointError where the block, which writes `path`, meets an OSError; `key` is what
    a user sets to have the file elsewhere."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error, key) from error


@contextlib.contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Raises CheckpointError where the block meets an OSError about a file in `folder`."""
    try:
        yield
    except OSError as error:
        inside = [name for name in named(error) if Path(name).absolute().is_relative_to(folder)]
        if not inside:
            raise
        raise unwritable(inside[0], error) from error


@contextlib.contextmanager
def rust_errors() -> Iterator[None]:
    """Raises as an OSError what safetensors and tokenizers report of the file system, which they
    raise as exceptions of their own."""
    try:
        yield
    except Exception as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def named(error: OSError) -> list[str]:
    """The files that an error of the file system is about; none where a write has failed."""
    return [name for name in (error.filename, error.filename2) if isinstance(name, str)]


def unwritable(path: str | os.PathLike, error: OSError, key: str = WORKDIR) -> CheckpointError:
    """The error for a file that could not be written because of `error`."""
    reason = error.strerror or " ".join(str(error).split())[:200]
    return CheckpointError(
        f"{path} cannot be written ({reason}): free space, change its permissions, or use another "
        f"{key}"
    )


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file that informs and that nothing depends on, {} for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def check_name(path: Path) -> None:
    """Raises CheckpointError for a path that is no UTF-8, by which arrays are written and read."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{quoted(str(path))} is not UTF-8, which checkpoints need: use another folder, or "
            "start with PYTHONUTF8=1 where the name is right"
        ) from error
