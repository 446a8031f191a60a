"""Calls of other libraries that take minutes and hear no signal."""

import queue
import threading
from collections.abc import Callable
from typing import Any

SECONDS = 0.2  # between two polls


def polled(call: Callable[[], Any], poll: Callable[[], None]) -> Any:
    """`call()`, made in a thread while `poll` is called, which may raise to stop waiting for it.

    The thread then ends with the process.
    """
    outcomes: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def work() -> None:
        try:
            outcomes.put((call(), None))
        except BaseException as error:
            outcomes.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    while True:
        poll()
        try:
            result, error = outcomes.get(timeout=SECONDS)
        except queue.Empty:
            continue
        if error is not None:
            raise error
        return result
