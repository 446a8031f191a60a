"""Patterns of file names; what they leave out is never left out in silence."""

import glob
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from fmjax.errors import ConfigError, DataError, quoted

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
NAMES = 5  # that a message lists


def matches(pattern: Path, key: str, endings: Sequence[str]) -> list[Path]:
    """The files that a glob matches, sorted. Folders are passed over, unless they are named as data
    are and no match is in them.

    Raises ConfigError where nothing matches, and DataError for a match that is no file, and for a
    folder that cannot be listed.
    """
    _check_folders(str(pattern), key)
    found = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    files = [path for path in found if os.path.isfile(path)]
    inside = {folder for path in files for folder in path.parents}
    lost = []
    for path in found:
        data = path.name.lower().endswith(tuple(endings)) and path not in inside
        if not os.path.isfile(path) and (data or not os.path.isdir(path)):
            lost.append(f"{path.name} ({kind_of(path)})")
    if lost:
        more = f" and {len(lost) - NAMES} more" if len(lost) > NAMES else ""
        raise DataError(
            f"config.{key}: {len(lost)} of {len(found)} matches of {quoted(str(pattern))} are no "
            f"files that can be read: {', '.join(lost[:NAMES])}{more}."
        )
    if not files:
        raise ConfigError(f"config.{key}: the pattern {quoted(str(pattern))} matches no file.")
    return files


def _check_folders(pattern: str, key: str) -> None:
    """Raises DataError for a folder in the way of a pattern that may not be listed: `glob` passes
    over what it holds."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
        magic = glob.has_magic(pattern)
        folders = glob.glob(pattern, recursive=True) if magic else [pattern or os.curdir]
        for folder in filter(os.path.isdir, folders):
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        entry.stat(follow_symlinks=False)
                        break
            except OSError as error:
                raise _not_listed(folder, error, key) from error


def kind_of(path: Path) -> str:
    """The kind of a path that is no file: a folder, a pipe, a dead link, or why it cannot be
    told."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "a dead link"
    except OSError as error:
        return error.strerror or str(error)
    return "a folder" if stat.S_ISDIR(mode) else KINDS.get(stat.S_IFMT(mode), "no plain file")


def tree(folder: Path, key: str) -> list[Path]:
    """The files in a folder and in the folders below it, sorted. Raises DataError for what is no
    file, and for a folder that cannot be listed."""

    def refuse(error: OSError) -> None:
        raise _not_listed(error.filename, error, key)

    found = []
    for place, _, names in os.walk(folder, onerror=refuse):
        found += [Path(place, name) for name in names]
    if lost := [path for path in found if not os.path.isfile(path)]:
        raise DataError(f"config.{key}: {quoted(str(lost[0]))} is {kind_of(lost[0])}, no file.")
    return sorted(found)


def _not_listed(folder: str, error: OSError, key: str) -> DataError:
    reason = error.strerror or error
    return DataError(f"config.{key}: the folder {quoted(folder)} cannot be listed ({reason}).")
