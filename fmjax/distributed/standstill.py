"""The end of several processes that stand still together, though none of them has died.

A thread that waits for a lock, a file system that went away or a computation that only some
processes have holds up all: the others wait for it in their next computation. A process that waits
looks like the one that it waits for, and the latter may save or compile, which takes its time. So
nobody is judged alone: a process that is overdue calls the roll, and where nobody has time left,
all end.
"""

import contextlib
import time
from typing import Any

import jax

from fmjax.distributed.signals import Stop

TICK_SEC = 5.0
NAMED = 3  # processes at one poll that a message names


class RollCall:
    """A roll call, started by a process that is overdue: where each of them is. Costs nothing
    before."""

    def __init__(self, peers: Any, stop: Stop, heartbeat_sec: float):
        self._peers, self._stop, self._heartbeat_sec = peers, stop, heartbeat_sec
        self._next = 0.0  # time of the next call

    def watch(self) -> None:
        """Look every few seconds until the process leaves. In a thread."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # Process 0 has died.
            while not self._peers.gone.wait(TICK_SEC):
                self.look()

    def look(self) -> None:
        """Call the roll if this process is overdue; end all if everybody is."""
        if self._left() > 0:
            self._next = 0.0
            return
        if time.monotonic() < self._next:
            return
        answers = self._peers.call_roll(self._heartbeat_sec)
        left = max([answer["left"] for answer in answers if answer], default=0.0)
        # This one may have moved while others were slow to answer.
        if left <= 0 and self._left() <= 0 and not self._peers.gone.is_set():
            polls = [answer and answer["polls"] for answer in answers]
            granted = f"config.distributed.heartbeat_sec={self._heartbeat_sec:g}"
            self._peers.tell_standstill(f"no process makes progress ({granted}): {places(polls)}")
        self._postpone(left)

    def answer(self, polls: int) -> dict[str, float]:
        """The answer of this process to the roll call of another, which then need not be
        repeated."""
        self._postpone(self._heartbeat_sec)
        return {"polls": polls, "left": self._left()}

    def _left(self) -> float:
        return self._stop.left(self._heartbeat_sec)

    def _postpone(self, seconds: float) -> None:
        self._next = time.monotonic() + max(seconds, self._heartbeat_sec)


def places(polls: list[int | None]) -> str:
    """At which poll the processes stand, those behind first; None is one that did not answer."""
    at: dict[int | None, list[int]] = {}
    for index, number in enumerate(polls):
        at.setdefault(number, []).append(index)
    said = []
    for number in sorted(at, key=lambda number: -1 if number is None else number):
        who, more = ", ".join(map(str, at[number][:NAMED])), len(at[number]) - NAMED
        who = f"process{'es' * (len(at[number]) > 1)} {who}{f' and {more} more' * (more > 0)}"
        said.append(f"{who} {'without an answer' if number is None else f'at poll {number}'}")
    return ", ".join(said)
