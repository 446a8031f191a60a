"""Signals that ask a run to stop: the handlers only set a flag, the loop decides when to honour it.

A scheduler sends SIGTERM or SIGUSR1 some seconds before the machine goes, a person presses Ctrl-C.
Saving inside a handler would run in the middle of anything, a save included.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """`signal` is the name of the first signal, "" before; `requested` whether the last poll said
    to stop. With several processes both may come from another (fmjax/processes.py)."""

    def __init__(self):
        self.signal, self.requested = "", False
        self.peers = None  # the other processes, if there are any

    def poll(self) -> bool:
        """Whether to stop now; all processes poll equally often, and stop at the same poll."""
        self.requested = self.peers.poll() if self.peers else bool(self.signal)
        return self.requested


@contextlib.contextmanager
def catch() -> Iterator[Stop]:
    """Turns SIGTERM, SIGINT and SIGUSR1 into `stop.signal` until the block ends.

    Poll it wherever the program waits: between steps, evaluation batches and pieces of data
    preparation. During compilation the signal is kept and seen at the next poll. Repeats change
    nothing, so that a save completes, except that a third SIGINT kills. Main thread only.
    """
    stop = Stop()
    interrupts = 0

    def handle(number, frame):
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts == 2:
            # The default action is the kernel's: the third works even while Python is blocked.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        again = ". Press Ctrl-C again to kill without saving" if interrupts == 2 else ""
        name = signal.Signals(number).name
        stop.signal = stop.signal or name
        # os.write, because print may be what the signal interrupted.
        os.write(2, f"{name}: finishing the step, then saving{again}\n".encode())

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
