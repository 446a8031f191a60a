"""What every source yields, and what a text must be to become a document."""

from typing import NamedTuple

MAX_RECORD_BYTES = 1 << 24  # a long book is 4 MB
EXCERPT = 1000  # characters of a bad record that quarantine keeps


class Record(NamedTuple):
    """One text; or, where `bad` says what is wrong with it, the beginning of what was read."""

    text: str
    where: str  # file:line or the like
    done: float  # the share of the source read so far, 0 to 1
    bad: str = ""


def fault(value) -> str:
    """What is wrong with a value that should be text; empty when nothing is."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        return f"the value is {kind}, not text"
    if "\0" in value:
        return "NUL character (a binary or UTF-16 file?)"
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        return f"lone surrogate at character {error.start}"
    return f"{size:,} bytes, the limit is {MAX_RECORD_BYTES:,}" if size > MAX_RECORD_BYTES else ""
