"""The cache folder: folders that exist whole or not at all, checked by size and digest, one
preparer at a time.
"""

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from fmjax.errors import DataError, quoted
from fmjax.io import manifest, sealed

INDEX = "index.json"
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
TEMPORARY = ".tmp-"  # between the name of a folder that is being made and the process that does


def root(cache: str = "", settings: str = "config.data.cache or $FMJAX_CACHE") -> Path:
    """The folder for what runs share (data; compiled programs), made if need be: `cache`, which is
    `config.data.cache`, else $FMJAX_CACHE, else ~/.cache/fmjax.

    Raises DataError where it cannot be made; `settings` names what can be set to another folder.
    """
    name = cache or os.environ.get("FMJAX_CACHE") or "~/.cache/fmjax"
    folder = Path(os.path.expanduser(name))
    try:
        if str(folder).startswith("~"):  # nothing that anybody would want a folder of this name for
            raise ValueError("the system knows no home folder for this user")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DataError(
            f"The cache folder {quoted(name)} cannot be made ({error}). "
            f"Set {settings} to a writable folder."
        ) from error
    return folder.resolve()


def private(folder: Path) -> Path:
    """`folder`, made if need be, for this user alone: for compiled programs, which are run.

    Raises DataError where it belongs to somebody else.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise DataError(
            f"{folder} belongs to another user, whose compiled programs would be run as yours. "
            "Set $FMJAX_CACHE to a folder of your own."
        )
    folder.chmod(0o700)
    return folder


def digest(value) -> str:
    """16 hex digits that identify a JSON value."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())


def file_digest(path: Path, poll: Callable[[], None] = lambda: None) -> str:
    """xxh3_128 of a file, read in pieces; `poll` is called after each and may raise."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            state.update(piece)
            poll()
    return state.hexdigest()


def build(
    folder: Path, write: Callable[[Path], dict], poll: Callable[[], None] = lambda: None
) -> dict:
    """Make `folder` whole or not at all: `write(temporary)` fills it and returns what its index
    shall say. The lock of the folder must be held.

    The index adds the size and digest of every file, and has one of its own, so a machine that lost
    power after the rename is noticed too.
    """
    for path in folder.parent.glob(f"{glob.escape(folder.name)}{TEMPORARY}*"):  # of killed ones
        shutil.rmtree(path, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}{TEMPORARY}{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        index = write(temporary)
        names = sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())
        files = {
            n: [(temporary / n).stat().st_size, file_digest(temporary / n, poll)] for n in names
        }
        index = index | {"files": files}
        (temporary / INDEX).write_bytes(sealed.dumps(index))
        for path in (*(temporary / name for name in names), temporary / INDEX):
            manifest.sync(path)
        for place, _, _ in os.walk(temporary):
            manifest.sync(place)
        _remove(folder)  # a damaged predecessor
        temporary.rename(folder)
        manifest.sync(folder.parent)
    except OSError as error:
        raise DataError(
            f"The cache folder {folder} cannot be written ({error.strerror or error}). "
            "Free some space, or set config.data.cache or $FMJAX_CACHE to another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return index


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def verified(
    folder: Path, log: Callable[[str], None], poll: Callable[[], None] = lambda: None
) -> dict | None:
    """The index of `folder`, or None where it is missing or differs from its index in size or
    digest, or the index from its own.
    """
    try:
        return checked(folder, poll)
    except FileNotFoundError as error:
        if folder.exists():
            log(f"data: {folder} is incomplete ({error.filename} is missing); preparing it again")
        return None
    except DAMAGE as error:
        log(f"data: {folder} is damaged ({error}); preparing it again")
        return None


def checked(folder: Path, poll: Callable[[], None] = lambda: None, prefix: str = "") -> dict:
    """The index of `folder`, whose files (those of them that begin with `prefix`) are as it says.

    Raises one of `DAMAGE` where they are not.
    """
    index = sealed.loads((folder / INDEX).read_bytes())
    for name, (size, content) in index["files"].items():
        if not name.startswith(prefix):
            continue
        found = (folder / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes instead of {size}")
        if file_digest(folder / name, poll) != content:
            raise ValueError(f"{name} differs from its digest")
    return index


@contextlib.contextmanager
def lock(path: Path, log: Callable[[str], None], poll: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path`. Others wait; the system frees it when its holder dies."""
    import filelock

    guard = filelock.FileLock(path)
    try:
        guard.acquire(timeout=0)
    except filelock.Timeout:
        log(f"data: another process prepares the same data; waiting for it ({path})")
        while True:
            poll()
            with contextlib.suppress(filelock.Timeout):
                guard.acquire(timeout=1)
                break
    except OSError as error:
        raise DataError(
            f"{path} cannot be locked ({error.strerror or error}). "
            "Set config.data.cache or $FMJAX_CACHE to a folder on a disk that supports file locks."
        ) from error
    try:
        yield
    finally:
        guard.release()


def remove_leftovers(root: Path) -> None:
    """Delete what killed preparations left in the cache folder, where nobody prepares the same."""
    import filelock

    for path in root.glob(f"*{TEMPORARY}*"):
        name, _, _ = path.name.partition(TEMPORARY)
        with contextlib.suppress(filelock.Timeout, OSError):
            with filelock.FileLock(root / f"{name}.lock", timeout=0):
                shutil.rmtree(path, ignore_errors=True)


def reserve(file: Path) -> None:
    """Takes the room of a file that was made with its size but is empty, as a memory map is: where
    there is none this is an OSError, later it would be the end of the process."""
    with file.open("r+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
