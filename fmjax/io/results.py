"""Files and folders that a task leaves behind: checked before the work, and whole or not there.

Each function takes the `key` that a user sets to have the result elsewhere, for the message of its
CheckpointError. Of several processes, one calls them.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fmjax.errors import ConfigError, quoted
from fmjax.io import manifest, metrics_log
from fmjax.io.storage import TMPDIR, WORKDIR, named, unwritable, writing

OUTPUT = "config.output"
TEMPORARY = ".tmp"


def check_file(path: str | os.PathLike, key: str = WORKDIR) -> None:
    """Raises CheckpointError unless `path` can be written or replaced. Leaves nothing behind."""
    path = Path(path)
    with _checking(path, key):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not _is_device(path):
            _check_room(Path(os.path.realpath(path)).parent)


def check_growing(path: str | os.PathLike, key: str = WORKDIR) -> None:
    """Raises CheckpointError unless lines can be added to `path`. Leaves nothing behind."""
    path = Path(path)
    with _checking(path, key):
        if path.exists():
            path.open("ab").close()
        _check_room(path.parent)


def check_folder(path: str | os.PathLike, key: str = OUTPUT) -> None:
    """Raises ConfigError for a folder that holds files, CheckpointError unless it can be made or
    written. Leaves nothing behind."""
    path = Path(path)
    with _checking(path, key):
        if path.is_dir() and set(os.listdir(path)) - {TEMPORARY}:
            raise ConfigError(f"{path} is not empty: set {key} to a new folder.")
        _check_room(path)


def make_folder(path: str | os.PathLike, key: str = WORKDIR) -> None:
    """Makes a folder unless it is there. Raises CheckpointError where it cannot be made."""
    with writing(path, key):
        os.makedirs(path, exist_ok=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, key: str = WORKDIR) -> Iterator[Path]:
    """The name of a file for the block to write: where the block ends well it becomes `path`, else
    it is removed and `path` is as before. A device has nothing from before, and is written itself.

    Raises CheckpointError where the file cannot be written.
    """
    path = Path(path)
    if _is_device(path):
        with _filling(path, path.parent, key):
            yield path
        return
    target = Path(os.path.realpath(path))  # else a link would be replaced, and not what it is to
    make_folder(target.parent, key)
    made = target.with_name(f"{target.name}{TEMPORARY}")
    try:
        with _filling(path, target.parent, key):
            yield made
            manifest.sync(made)
            os.replace(made, target)
    except BaseException:
        with contextlib.suppress(OSError):
            made.unlink()
        raise


def write_lines(
    path: str | os.PathLike, rows: Iterable[Mapping[str, Any]], key: str = WORKDIR
) -> None:
    """Writes JSON lines as a whole or not at all. Raises CheckpointError where it cannot."""
    with replacing(path, key) as made, made.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(metrics_log.plain(row), ensure_ascii=False) + "\n")


def append(path: str | os.PathLike, row: Mapping[str, Any], key: str = WORKDIR) -> None:
    """Adds a JSON line to a file: the whole line or nothing, else the next would be added to a part
    of it. Raises CheckpointError where it cannot be written."""
    path = Path(path)
    make_folder(path.parent, key)
    with writing(path, key), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            _write_all(file, f"{json.dumps(metrics_log.plain(row))}\n".encode())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, last: str, key: str = OUTPUT) -> Iterator[Path]:
    """A folder inside of `path` for the block to fill: where the block ends well its files become
    those of `path`, else all is removed. The file `last`, without which the folder cannot be
    opened, comes after the others.

    Raises ConfigError where `path` holds files, CheckpointError where it cannot be written.
    """
    path = Path(path)
    check_folder(path, key)
    existed, made = path.exists(), path / TEMPORARY
    try:
        with writing(path, key):
            if made.is_dir():  # of a process that was killed
                shutil.rmtree(made)
            made.mkdir(parents=True)
        with _filling(path, path.absolute(), key):
            yield made
            for file in sorted(made.rglob("*")):
                manifest.sync(file)
            for file in sorted(made.iterdir(), key=lambda file: file.name == last):
                os.replace(file, path / file.name)
            made.rmdir()
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is removed. Raises CheckpointError where none can be made."""
    with contextlib.ExitStack() as stack:
        with writing("a temporary folder", TMPDIR):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        yield Path(folder)


@contextlib.contextmanager
def _checking(path: Path, key: str) -> Iterator[None]:
    if "\0" in str(path):
        raise ConfigError(f"{key}: {quoted(str(path))} is no name of a file: it holds a null byte")
    with writing(path, key):
        yield


def _check_room(folder: Path) -> None:
    """Raises OSError unless a file can be made in `folder`, or in the first folder above it that
    exists. Permissions alone do not tell: file systems are read-only, or full."""
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(b"\n")


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


@contextlib.contextmanager
def _filling(path: Path, folder: Path, key: str) -> Iterator[None]:
    """Raises CheckpointError where the block, which makes `path`, meets an OSError that is not
    about a file outside of `folder`, which it may read."""
    try:
        yield
    except OSError as error:
        names = named(error)
        if names and not any(Path(name).absolute().is_relative_to(folder) for name in names):
            raise
        raise unwritable(path, error, key) from error


def _write_all(file: Any, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
