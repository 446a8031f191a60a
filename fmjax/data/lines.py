"""Lines of text files, which may be gzipped; memory is bounded, whatever a file unpacks to."""

import codecs
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fmjax.data.records import EXCERPT, MAX_RECORD_BYTES, fault
from fmjax.errors import DataError

MAX_RATIO = 200  # prose packs 3 : 1; a bomb 1000 : 1


class Line(NamedTuple):
    """One line; `bad` says what is wrong with it, and `text` is then an excerpt."""

    text: str
    number: int
    bad: str
    read: int  # bytes of the file, packed


def read(path: Path) -> Iterator[Line]:
    """Lines cut at LF only, without their end; a bad one has an excerpt for text."""
    with open(path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw
        unpacked = number = 0
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            size, end = len(line), line[-1:]
            while size > MAX_RECORD_BYTES and end not in (b"\n", b""):  # past what is not kept
                rest = file.readline(MAX_RECORD_BYTES)
                size, end = size + len(rest), rest[-1:]
                check_ratio(path, unpacked + size, raw.tell())
            unpacked += size
            check_ratio(path, unpacked, raw.tell())
            text, bad = decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, size)
            yield Line(text, number, bad, raw.tell())


def check_ratio(path: Path, unpacked: int, packed: int) -> None:
    """Refuses what `packed` bytes of a file should not unpack to."""
    if unpacked > max(MAX_RECORD_BYTES, MAX_RATIO * packed):
        raise DataError(
            f"{path}: {packed:,} bytes unpack to more than {unpacked:,}, beyond the ratio of "
            f"{MAX_RATIO}: a decompression bomb? Unpack it yourself if you trust it."
        )


def decoded(line: bytes, size: int) -> tuple[str, str]:
    """(text without its line's end, "") of `size` bytes, or (an excerpt, what is wrong)."""
    if size > MAX_RECORD_BYTES:
        bad = f"a line of {size:,} bytes, the limit is {MAX_RECORD_BYTES:,}"
        return line[:EXCERPT].decode(errors="replace"), bad
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        bad = (
            f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8 "
            "(convert the file: iconv -f latin1 -t utf-8)"
        )
        return line[:EXCERPT].decode(errors="replace"), bad
    text = text.removesuffix("\n").removesuffix("\r")
    return text, fault(text)
