"""Digests of a folder, so that a flipped bit or a missing file is found before anything is read.

File systems and array formats return damaged bytes without an error: of 40 single-bit flips in
an Orbax array file, 40 restored silently wrong. A sealed folder holds a MANIFEST.json with the
size and the xxh3_128 digest of every other file. It is written last: a folder without it is
unfinished.
"""

import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import xxhash

from fmjax import __version__
from fmjax.errors import CheckpointError
from fmjax.io import sealed

NAME = "MANIFEST.json"
FORMAT = 1  # of the whole folder; raise it when an older fmjax could no longer read a new folder


def write(folder: Path) -> None:
    """Seals `folder`: every file and directory reaches the disk before the manifest appears."""
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(lambda path: _digest(path, sync=True), files.values())
        body = {"format": FORMAT, "files": dict(zip(files, digests, strict=True))}
    temporary = folder / f"{NAME}.tmp"
    with temporary.open("wb") as file:
        file.write(sealed.dumps(body))
        file.flush()
        os.fsync(file.fileno())
    for directory, _, _ in os.walk(folder):
        sync(directory)
    temporary.rename(folder / NAME)
    sync(folder)
    sync(folder.parent)


def problems(folder: Path) -> list[str]:
    """Differences from the manifest, one line a file; empty if every byte is as written.

    Raises CheckpointError for a folder of a newer format. Files the manifest does not know are
    ignored: file browsers and network file systems leave their own.
    """
    try:
        # The digest covers the manifest's own bytes, so damage cannot pass as a newer format.
        body = sealed.loads((folder / NAME).read_bytes())
        check_format(int(body["format"]), folder)
        files = {name: (size, digest) for name, (size, digest) in body["files"].items()}
        # Anybody can make a digest: what is read here is in this folder.
        if outside := [name for name in files if _leaves(name)]:
            return [f"{NAME}: names files outside of its folder: {outside[:3]}"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{NAME}: {error!r}"]

    def problem(item: tuple[str, tuple]) -> str | None:
        name, (size, digest) = item
        path = folder / name
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                return f"{name}: no plain file"
            if found.st_size != size:
                return f"{name}: {found.st_size} bytes, {size} were written"
            return None if _digest(path) == [size, digest] else f"{name}: its bytes have changed"
        except OSError as error:
            return f"{name}: {error.strerror}"

    with ThreadPoolExecutor(8) as pool:
        return [line for line in pool.map(problem, files.items()) if line]


def digest(folder: Path) -> str:
    """The digest of a manifest, which stands for the whole folder."""
    return json.loads((folder / NAME).read_bytes())[sealed.DIGEST]


def check_format(saved: int, folder: Path) -> None:
    """Raise CheckpointError for a folder written by an fmjax whose format this one does not
    know."""
    if saved > FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {saved}; this fmjax ({__version__}) reads up to "
            f"{FORMAT}. Use the newer fmjax that wrote it."
        )


def _leaves(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _files(folder: Path) -> Iterator[Path]:
    own = {folder / NAME, folder / f"{NAME}.tmp"}
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path not in own)


def _digest(path: Path, sync: bool = False) -> list:
    """[size in bytes, xxh3_128 in hex]. Reading and hashing large blocks both release the GIL."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return [size, digest.hexdigest()]


def sync(path: str | Path) -> None:
    """Bring the content of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
