"""Lines of text files, which may be gzipped; memory is bounded, whatever a file unpacks to."""

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fmjax.data.records import EXCERPT, MAX_RECORD_BYTES, fault
from fmjax.errors import DataError

MAX_RATIO = 200  # prose packs 3 : 1; a bomb 1000 : 1
BLOCK = 1 << 17  # bytes that are read at once
# The marks that begin a file in another encoding than UTF-8; that of UTF-32 begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Line(NamedTuple):
    """One line; `bad` says what is wrong with it, and `text` is then an excerpt."""

    text: str
    number: int
    bad: str
    read: int  # bytes of the file, packed


class _Blocks(io.FileIO):
    """A file that calls `check` after each block that is read of it, and at its end."""

    def __init__(self, path: Path, check: Callable[[], None]):
        super().__init__(path)
        self._check = check

    def readinto(self, buffer) -> int | None:
        size = super().readinto(buffer)
        self._check()
        return size


@contextlib.contextmanager
def opened(path: Path, check: Callable[[], None]) -> Iterator[tuple[io.BufferedIOBase, ...]]:
    """(the content of a file, unpacked; its packed bytes, of which `tell` says how many were read).

    `check` is called after each block, before anything of it is used, and may raise.
    """
    with io.BufferedReader(_Blocks(path, check), BLOCK) as raw:
        yield (gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw), raw


def read(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[Line]:
    """Lines cut at LF only, without their end; a bad one has an excerpt for text.

    `check` is called after each block that is read of the file, and may raise.
    """
    with opened(path, check) as (file, raw):
        mark, unpacked, number = "", 0, 0
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            size, end = len(line), line[-1:]
            while size > MAX_RECORD_BYTES and end not in (b"\n", b""):  # past what is not kept
                rest = file.readline(MAX_RECORD_BYTES)
                size, end = size + len(rest), rest[-1:]
                check_ratio(path, unpacked + size, raw.tell())
            unpacked += size
            check_ratio(path, unpacked, raw.tell())
            if number == 1:
                mark, line = mark_of(line), line.removeprefix(codecs.BOM_UTF8)
            text, bad = decoded(line, size, mark)
            yield Line(text, number, bad, raw.tell())


def good(path: Path, key: str) -> Iterator[Line]:
    """The lines of the file that `config.<key>` names, without empty ones. Raises DataError for a
    line that is bad, and for a file that cannot be read."""
    with readable(path, key):
        for line in read(path):
            if line.bad:
                raise DataError(f"{path}:{line.number}: {line.bad}; config.{key}")
            if line.text.strip():
                yield line


@contextlib.contextmanager
def readable(path: Path, key: str) -> Iterator[None]:
    """Turn the errors of a file that cannot be read into DataError; `config.<key>` named it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); config.{key}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be read ({reason}); config.{key}") from error


def check_ratio(path: Path, unpacked: int, packed: int) -> None:
    """Raise DataError if `packed` bytes of a file unpack to implausibly many."""
    if unpacked > max(MAX_RECORD_BYTES, MAX_RATIO * packed):
        raise DataError(
            f"{path}: {packed:,} bytes unpack to more than {unpacked:,}, beyond the ratio of "
            f"{MAX_RATIO}: a decompression bomb? Unpack it yourself if you trust it."
        )


def mark_of(start: bytes) -> str:
    """The encoding that the first bytes of a file name, if it is not UTF-8."""
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "")


def not_utf8(error: UnicodeDecodeError, mark: str = "") -> str:
    """The problem with bytes that are not UTF-8; the first bytes of the file name the encoding
    `mark` or none."""
    place = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1} is not UTF-8"
    if mark:
        return f"{place}: the file begins as {mark.upper()} does (iconv -f {mark} -t utf-8)"
    return (
        f"{place} (convert the file: iconv -f ENCODING -t utf-8, with the encoding that it has, "
        "such as gb18030, big5, shift_jis, euc-kr, cp1251, cp1256 or cp1252)"
    )


def decoded(line: bytes, size: int, mark: str = "") -> tuple[str, str]:
    """(text without its line's end, "") of `size` bytes, or (an excerpt, what is wrong)."""
    if size > MAX_RECORD_BYTES:
        bad = f"a line of {size:,} bytes, the limit is {MAX_RECORD_BYTES:,}"
        return line[:EXCERPT].decode(errors="replace"), bad
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return line[:EXCERPT].decode(errors="replace"), not_utf8(error, mark)
    text = text.removesuffix("\n").removesuffix("\r")
    return text, fault(text)
