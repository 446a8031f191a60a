"""Signals that ask a run to stop: the handlers only set a flag, the loop decides when to honour it.

A scheduler sends SIGTERM or SIGUSR1 some seconds before the machine goes, a person presses Ctrl-C,
a terminal that closes sends SIGHUP. Saving inside a handler would run in the middle of anything, a
save included.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

from fmjax.distributed import watchdog

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PREEMPTED = 75  # the exit code of errors.Preempted
INTERRUPTED = 130
# What the first signal says will happen, after its name.
STEPPING = "finishing the step, then saving"
COMPILING = "compiling, then saving"
PREPARING = "stopping, while data is prepared"
STEPS_SEEN = 3  # from which the time of the next can be told; a host is a step ahead of its devices


class Stop:
    """`signal` is the name of the first signal, "" before; `requested` whether the last poll said
    to stop. With several processes both may come from another (fmjax/distributed/processes.py).

    `plan` is what a signal that comes now leads to. For fmjax/distributed/watchdog.py: `polls`
    counts the calls of `poll`, `longest_sec` is the longest time between two, compilation apart,
    `allowance_sec` what may pass before the next; `last_words` is called with the error that ends a
    stuck process. For fmjax/distributed/standstill.py: `left`.
    """

    def __init__(self):
        self.signal, self.requested, self.plan = "", False, STEPPING
        self.polls, self.longest_sec, self.allowance_sec = 0, 0.0, 0.0
        self._polled = self._progress_at = float("inf")
        self._stepping, self._steps_seen = False, 0
        self.peers = None  # the other processes, if there are any
        self.last_words: Callable[[BaseException], None] = lambda error: None

    def poll(self) -> bool:
        """True if it is time to stop; all processes poll equally often, and stop at the same
        poll."""
        self.requested = self.peers.poll() if self.peers else bool(self.signal)
        now = time.monotonic()
        self.longest_sec = max(self.longest_sec, now - self._polled)
        self.polls, self._polled, self._progress_at = self.polls + 1, now, now
        self._steps_seen += 1
        return self.requested

    def note_progress(self) -> None:
        """Count anew what `left` says, where a poll is not due in all processes."""
        self._progress_at = time.monotonic()

    def left(self, usual_sec: float) -> float:
        """Seconds before this process counts as standing still, infinite before any progress.

        A step may take `usual_sec`, or twice what the longest took; everything else an hour.
        """
        limit = watchdog.SLOW_SEC
        if self._stepping and self._steps_seen >= STEPS_SEEN:
            limit = max(usual_sec, 2 * self.longest_sec)
        return self._progress_at + max(limit, self.allowance_sec) - time.monotonic()

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Expect the next poll within the time of a step, in the block."""
        self._stepping = True
        self.note_progress()
        try:
            yield
        finally:
            self._stepping = False
            self.note_progress()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Let nobody expect a poll while the block compiles."""
        plan, self.plan, self.allowance_sec = self.plan, COMPILING, watchdog.COMPILING_SEC
        try:
            yield
        finally:
            self.plan, self.allowance_sec, self._polled = plan, 0.0, time.monotonic()
            self._steps_seen = 0  # The next are of another program.
            self.note_progress()


@contextlib.contextmanager
def catch(grace_sec: float = watchdog.GRACE_SEC) -> Iterator[Stop]:
    """Turns SIGTERM, SIGINT, SIGUSR1 and SIGHUP into `stop.signal` until the block ends.

    Poll it wherever the program waits: between steps, evaluation batches and pieces of data
    preparation. During compilation the signal is kept and seen at the next poll. Repeats change
    nothing, so that a save completes, except that a third SIGINT kills. A process that does not
    poll for `grace_sec` after a signal is stuck, and ended. Main thread only.
    """
    stop = Stop()
    interrupts = 0
    ways_out = {
        1: ". Ctrl-C twice more kills at once, without saving",
        2: ". Press Ctrl-C again to kill without saving",
    }

    def handle(number, frame):
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts == 2:
            # The default action is the kernel's: the third works even while Python is blocked.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        way_out = ways_out.get(interrupts, "") if number == signal.SIGINT else ""
        name = signal.Signals(number).name
        _say(f"{name}: {stop.plan}{way_out}")
        if not stop.signal:
            stop.signal = name
            watch()

    with watchdog.watching(stop, grace_sec) as watch:
        previous = {number: signal.signal(number, handle) for number in _heard()}
        try:
            yield stop
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def end_at_once() -> None:
    """Let signals end the process in silence, as long as nothing that it holds could be lost.

    A KeyboardInterrupt in the seconds that imports take would show dozens of frames of libraries,
    or be swallowed by a callback of theirs.
    """
    for number in _heard():
        signal.signal(number, _end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see startup.use_huge_pages


def raise_interrupts() -> None:
    """Undo `end_at_once`: Ctrl-C raises KeyboardInterrupt again, the others kill."""
    for number in SIGNALS:
        if signal.getsignal(number) is _end:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)


def _heard() -> list[signal.Signals]:
    """All SIGNALS, but for SIGHUP where nohup has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]


def _end(number, frame) -> None:
    os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)


def _say(text: str) -> None:
    """A line on standard error; on a terminal in place of the progress bar, which is drawn anew."""
    with contextlib.suppress(OSError):  # the terminal may be what has gone
        clear = "\r\x1b[2K\n" if os.isatty(2) else ""
        # os.write, because print may be what the signal interrupted.
        os.write(2, f"{clear}{text}\n".encode())
