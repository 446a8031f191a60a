"""The first milliseconds of the program, before anything large is imported."""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from fmjax.distributed import signals
from fmjax.errors import FmjaxError, Preempted
from fmjax.io import output

LOOP_CLOSED = "Event loop is closed"  # asyncio's words
JOIN_SEC = 10.0  # what threads have to end when the program does


def prepare() -> None:
    """Make standard streams, memory and signals ready for a run. May start the program again."""
    output.open_missing()
    signals.end_at_once()
    use_huge_pages()
    output.protect()
    logging.basicConfig(format="%(levelname)s: %(message)s")  # else a library sets another format
    sys.unraisablehook = show_unraisable


def use_huge_pages() -> None:
    """Start the program again, once, with memory in pages of 2 MiB where Linux has them.

    On a CPU each training step takes its temporary arrays, gigabytes, from the system and gives
    them back; in pages of 4 KiB that was a tenth to a third of the step (benchmarks/RESULTS.md).
    The C library reads this setting only when a program starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        # A signal in between waits for the handlers of the new program.
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
        try:
            os.execv(sys.executable, sys.orig_argv)
        except OSError:  # The run is slower with small pages, and is all the same a run.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)


def show_unraisable(found: Any) -> None:
    """sys.unraisablehook without what tensorstore's threads report of a save that has failed: each
    write that nobody waits for any more, after checkpointer.py said what went wrong."""
    if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == LOOP_CLOSED):
        sys.__unraisablehook__(found)


def exit_code(main: Callable[[list[str]], None], words: list[str]) -> int:
    """Run `main(words)`; an error that a user can cause becomes one line and its exit code."""
    try:
        main(words)
        return 0
    except FmjaxError as error:
        print("" if isinstance(error, Preempted) else "error: ", error, sep="", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # Where nothing catches signals, because nothing could be saved.
        return 130


def bound_end(code: int) -> None:
    """End the program with an exit code `JOIN_SEC` after it has begun to end, if threads still run.

    Python joins all threads before it ends. Those of a save that has failed wait ten minutes for
    what never comes (orbax 0.12), while the run is over and its folder is free for others.
    """
    joined = threading.Event()
    atexit.register(joined.set)  # called first, once all threads are joined

    def give_up():
        if not joined.wait(JOIN_SEC):
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)

    threading.Thread(target=give_up, name="end", daemon=True).start()
