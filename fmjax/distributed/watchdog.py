"""The end of a process that is stuck, with a word about where.

After a signal a run stops at its next poll. One that waits for ever, for a file system that went
away or for a process that never enters a collective, does not poll, and a scheduler would kill it
without a trace. Several processes need no signal for that: fmjax/distributed/standstill.py.

Two things watch, since each is blind where the other sees. A thread cannot run while C code holds
the interpreter's lock, such as a regular expression that backtracks without end; the handler of an
alarm cannot run while the main thread waits inside of C code.
"""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from fmjax.errors import Preempted

GRACE_SEC = 60.0
SLOW_SEC = 3600.0  # that anything but a step may take: to read a model, to save a state
COMPILING_SEC = 900.0  # large models take minutes
TICK_SEC = 1.0
_ENDING = threading.Lock()  # taken by the first of the two that watch
LAST_WORDS_SEC = 5.0  # for writing down how it ended, on storage that may be what is stuck


class Watchdog:
    """Ends the process `grace_sec` after a signal without a poll of `stop`: later where polls took
    longer than half of that before, or where `stop` allows more, since slow is not stuck."""

    def __init__(self, stop: Any, grace_sec: float, end: Callable[[str], None]):
        self._stop, self._grace_sec, self._end = stop, grace_sec, end
        self._polls, self._since = -1, 0.0

    def look(self) -> float:
        """Seconds until this process counts as stuck; ends it where they are over.

        To be called again and again once a signal has come.
        """
        now = time.monotonic()
        if self._polls != self._stop.polls:
            self._polls, self._since = self._stop.polls, now
        limit = max(self._grace_sec, 2 * self._stop.longest_sec, self._stop.allowance_sec)
        if self._stop.requested:  # a save has begun, which is worth waiting for
            limit = max(limit, SLOW_SEC)
        if now - self._since >= limit:
            self._end(f"nothing has moved for {now - self._since:.0f} s")
        return max(self._since + limit - now, TICK_SEC)


@contextlib.contextmanager
def watching(stop: Any, grace_sec: float = GRACE_SEC) -> Iterator[Callable[[], None]]:
    """Watch until the block ends. Yields what the handler of a signal has to call. Main thread."""

    def end_stuck(reason):
        error = f"stopped by {stop.signal or 'a signal'}, but {reason}: the process is stuck where"
        end(f"{error} its threads are shown above", stop.last_words)

    watchdog = Watchdog(stop, grace_sec, end_stuck)
    arrived, written = os.pipe()
    for descriptor in (arrived, written):
        os.set_blocking(descriptor, False)
    closed = threading.Event()

    def watch():
        signalled = False
        while not closed.wait(TICK_SEC):
            # The handler itself may not have run: a number in the pipe shows that it should have.
            signalled = signalled or bool(stop.signal) or _asks_to_stop(arrived)
            if signalled:
                watchdog.look()

    def look_again(number=None, frame=None):
        signal.setitimer(signal.ITIMER_REAL, watchdog.look())

    before = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    alarm = signal.signal(signal.SIGALRM, look_again)
    signal.siginterrupt(signal.SIGALRM, False)
    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield look_again
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        signal.set_wakeup_fd(before)
        closed.set()
        thread.join()
        os.close(arrived)
        os.close(written)


def end(reason: str, *last_words: Callable[[BaseException], Any]) -> None:
    """End the process with the exit code of a preemption, after saying where its threads are.

    `last_words` are called with the error, and given up where they take too long.
    """
    if not _ENDING.acquire(blocking=False):
        return
    error = Preempted(f"{reason}. What was saved is safe; the same command goes on")
    with contextlib.suppress(OSError, ValueError):
        faulthandler.dump_traceback(file=2, all_threads=True)
    with contextlib.suppress(OSError):
        os.write(2, f"{error}\n".encode())
    for speak in last_words:
        words = threading.Thread(target=speak, args=(error,), daemon=True)
        words.start()
        words.join(LAST_WORDS_SEC)
    os._exit(error.exit_code)


def _asks_to_stop(arrived: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        return any(number != signal.SIGALRM for number in os.read(arrived, 4096))
    return False
