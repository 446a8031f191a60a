"""Several processes that act as one: they start together, stop at the same step, end together.

jax.distributed makes their devices one mesh and aborts all of them, after config.distributed.
heartbeat_sec, when one has died. What it leaves open is settled here through the key-value store
that it brings: who is missing at the start, who speaks, at which step a signal to one stops all,
and what the others do when one has failed. A single process needs none of this and pays nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from fmjax.distributed.coordination import Peers

_peers: Peers | None = None  # None with a single process


@contextlib.contextmanager
def together(last_words: Callable[[BaseException], None] | None = None) -> Iterator[None]:
    """All processes end the block well, or all raise: the others, what the first failed with.

    `last_words` is called with that error where the process has to be ended from outside, because
    it is stuck in a computation that needs the one that failed.
    """
    if _peers is not None and last_words is not None:
        _peers.last_words = last_words
    try:
        yield
        meet()
    except BaseException as error:
        failure = _peers.fail(error) if _peers else error
        if failure is error:
            raise
        raise failure from error


def first(call: Callable[[], Any]) -> Any:
    """`call()` of process 0, in all of them: JSON, or the error that it raises."""
    return call() if _peers is None else _peers.first(call)


def meet() -> None:
    """Waits for all processes, or raises what one of them has failed with.

    To be called before a computation of all that some may reach much later than others: here
    signals are heard, and whoever waits says for whom.
    """
    if _peers is not None:
        _peers.meet()


@contextlib.contextmanager
def joined(peers: Peers) -> Iterator[None]:
    """Act as one with the other processes in the block."""
    global _peers
    _peers = peers
    try:
        yield
    finally:
        _peers = None
        peers.leave()
