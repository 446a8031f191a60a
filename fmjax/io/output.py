"""Standard output and standard error whose failure does not end a run.

On a full disk, a closed pipe or a terminal that has gone every `print` raises. What a run prints is
worth less than what it computes: such text is dropped, and one line on the other stream says so.
Nothing here imports more than the standard library: it comes before everything else.
"""

import contextlib
import io
import os
import sys

from fmjax.errors import CheckpointError

NAMES = {1: "standard output", 2: "standard error"}


class DroppingFile(io.FileIO):
    """A file descriptor that drops what cannot be written; `error` is the first reason."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if self.error is None:
                self.error = error
                _warn(self.fileno(), error)
            return memoryview(data).nbytes


def open_missing() -> None:
    """Open the null device as each of the descriptors 0, 1 and 2 that the parent process closed.

    The next file to be opened, a checkpoint or a socket, would get the number otherwise, and
    libraries in C would print into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(opened, True)


def protect() -> None:
    """Replace sys.stdout and sys.stderr by streams that drop what they cannot write."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        protected = io.TextIOWrapper(
            io.BufferedWriter(DroppingFile(descriptor)),
            encoding=getattr(stream, "encoding", "utf-8"),
            errors="backslashreplace",  # for texts that the terminal cannot show
            line_buffering=name == "stderr" or getattr(stream, "line_buffering", True),
            write_through=getattr(stream, "write_through", False),
        )
        setattr(sys, name, protected)


def check() -> None:
    """Raise CheckpointError if text for standard output was lost, which was all the command makes.

    A reader that closes the pipe, such as `head`, has had enough and loses nothing.
    """
    sys.stdout.flush()
    file = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = file.error if isinstance(file, DroppingFile) else None
    if error is not None and not isinstance(error, BrokenPipeError):
        raise CheckpointError(f"standard output cannot be written: {error.strerror}")


def _warn(descriptor: int, error: OSError) -> None:
    text = f"warning: {NAMES[descriptor]} cannot be written and is dropped: {error.strerror}\n"
    with contextlib.suppress(OSError):
        os.write(3 - descriptor, text.encode())
