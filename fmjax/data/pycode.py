"""The source code of the standard library that every CPython carries: one document a module.

It is read where it is installed, under the PSF's licence; nothing of it is part of this project.
"""

import functools
import sys
import sysconfig
from pathlib import Path

import xxhash

from fmjax.data import pydocs
from fmjax.errors import DataError

# Beside what pydocs leaves out: an editor and demonstrations, tables that a program has written,
# and what describes one machine's Python.
SKIPPED = ("idlelib/", "turtledemo/", "pydoc_data/", "_sysconfigdata", "sitecustomize.py")


def digest() -> str:
    """Changes whenever the texts may."""
    state = xxhash.xxh3_128(sys.version.encode())
    for path in _files():
        state.update(path.read_bytes())
    return state.hexdigest()


@functools.cache
def texts() -> list[tuple[str, str]]:
    """(where, text) of every module in UTF-8, each once, in the same order in every process."""
    root, unique = sysconfig.get_path("stdlib"), {}
    for path in _files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            unique.setdefault(text, f"code of {path.relative_to(root)}")
    if not unique:
        raise DataError(
            "This Python does not carry the sources of its standard library. Set "
            "config.data.name='text' and config.data.train to your own files."
        )
    return [(where, text) for text, where in unique.items()]


def _files() -> list[Path]:
    root = sysconfig.get_path("stdlib")
    files = pydocs.library_files()
    return [path for path in files if not str(path.relative_to(root)).startswith(SKIPPED)]
