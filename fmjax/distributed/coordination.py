"""The other processes of a run: what each tells all, and what they agree on.

Everything goes through the key-value store that jax.distributed brings, beside the devices and
their computations.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from fmjax.distributed import standstill, watchdog
from fmjax.distributed.signals import Stop
from fmjax.errors import FmjaxError, of_exit_code

ECHO_SEC = 5.0
PATIENCE_SEC = 10.0  # of waiting for another in silence


class Peers:
    """The other processes, for one that has them.

    News, which are a signal, a failure, a standstill or the end, are the keys news/0, news/1, …;
    everybody reads them in this order, in a thread. `failure` is the first error that ended a
    process. `heartbeat_sec` is what a process is granted that stands still or does not end.
    """

    def __init__(self, client: Any, index: int, count: int, stop: Stop, heartbeat_sec: float):
        self.index, self.count, self._client = index, count, client
        self.last_words: Callable[[BaseException], None] = lambda error: None
        self.failure: FmjaxError | None = None
        self._heartbeat_sec, self._own_error = heartbeat_sec, None
        self._stop, self._told = stop, False
        self._polls, self._stop_at, self._polling = 0, None, threading.Lock()
        self._meetings = itertools.count()  # the same in all processes
        self._failed, self.gone = threading.Event(), threading.Event()
        self._roll = standstill.RollCall(self, stop, heartbeat_sec)
        self._listener = threading.Thread(target=self._listen, name="peers", daemon=True)
        self._listener.start()
        self._watch = threading.Thread(target=self._roll.watch, name="standstill", daemon=True)
        self._watch.start()
        stop.peers = self

    def poll(self) -> bool:
        """True if all processes stop here. All of them must call it equally often.

        Communicates nothing before a signal comes. Then all tell how often they have polled, and
        stop at the first poll that nobody has passed: see `_agree`.
        """
        self._look_up()
        with self._polling:
            self._polls += 1
            return self._stop_at is not None and self._polls >= self._stop_at

    def meet(self) -> None:
        """Waits for all processes, or raises what one of them has failed with."""
        key = f"meeting/{next(self._meetings)}"
        self._set(f"{key}/{self.index}", None)
        self.first(lambda: [self._wait(f"{key}/{index}", index) for index in range(self.count)])

    def first(self, call: Callable[[], Any]) -> Any:
        """The result of `call()` in process 0, in all of them."""
        key = f"meeting/{next(self._meetings)}"
        if self.index == 0:
            self._set(key, call())
        return self._wait(key, 0)

    def fail(self, error: BaseException) -> BaseException:
        """Tells the others of an error, and returns it; unless it only follows from one of theirs,
        which is then returned."""
        if error is self._own_error:
            return error
        if isinstance(error, jax.errors.JaxRuntimeError):
            # A broken connection may come before the news of what broke it.
            self._failed.wait(ECHO_SEC)
        if self.failure is not None and not isinstance(error, FmjaxError):
            return self.failure
        if self.failure is None:
            self._own_error = error
            kind = "" if isinstance(error, FmjaxError) else f"{type(error).__name__}: "
            code = getattr(error, "exit_code", 1)
            self._tell(failure=f"{kind}{error}", process=self.index, code=code)
        return error

    def leave(self) -> None:
        """Ends the threads. To be called when all have met, or one has failed."""
        self.gone.set()
        if self.index == 0:
            self._tell(end=True)
        self._listener.join()
        self._watch.join()

    def call_roll(self, patience_sec: float) -> list[dict[str, float] | None]:
        """For each process, how often it has polled and the seconds that it has left (see
        standstill.py); None for one that does not answer within `patience_sec`."""
        call, limit = self._tell(roll=self.index), time.monotonic() + patience_sec

        def look_up():
            if time.monotonic() > limit or self.gone.is_set():
                raise TimeoutError

        def answer(index):
            with contextlib.suppress(TimeoutError):
                return self._get(f"roll/{call}/{index}", 1, look_up)

        return [answer(index) for index in range(self.count)]

    def tell_standstill(self, reason: str) -> None:
        """Ends all processes, each of which shows where its threads are."""
        self._tell(standstill=reason)

    def _listen(self) -> None:
        for number in itertools.count():
            try:
                news = self._get(f"news/{number}")
            except jax.errors.JaxRuntimeError:
                return  # Process 0 has died, and jax is about to abort this one.
            if "end" in news:
                return
            if "failure" in news:
                return self._end(**news)
            if "standstill" in news:
                return self._end_stuck(news["standstill"])
            if "roll" in news:
                self._set(f"roll/{number}/{self.index}", self._roll.answer(self._polls))
            elif self._stop_at is None:
                self._agree(**news)

    def _agree(self, signal: str, process: int) -> None:
        """On the first poll that no process has passed.

        Until then nobody polls, but whoever is between two polls continues, so that no process
        waits here for one that waits for its part of a computation.
        """
        with self._polling:
            self._set(f"polls/{self.index}", self._polls)
            if self.index == 0:
                polls = [self._get(f"polls/{index}") for index in range(self.count)]
                self._set("stop_at", max(polls) + 1)
            self._stop_at = self._get("stop_at")
        if self.index == 0 and not self._stop.signal:
            print(f"{signal} to process {process}: all finish the step, then save", file=sys.stderr)
        self._stop.signal = self._stop.signal or signal

    def _end(self, failure: str, process: int, code: int) -> None:
        """Ends this process some time after one has failed, if it does not end by itself."""
        source = "" if process == self.index else f"process {process} of {self.count}: "
        self.failure = of_exit_code(code)(f"{source}{failure}")
        self._failed.set()
        if not self.gone.wait(self._heartbeat_sec):
            self.last_words(self.failure)
            print(f"error: {self.failure}", file=sys.stderr, flush=True)
            jax.distributed.shutdown()
            os._exit(code)

    def _end_stuck(self, reason: str) -> None:
        def disconnect(error):
            # Keeps process 0, which has the store, until the others have read the reason.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                jax.distributed.shutdown()

        reason = f"{reason}. The threads of process {self.index} are shown above"
        watchdog.end(reason, self.last_words, disconnect)

    def _look_up(self) -> None:
        """Tells the others of a signal; raises what one of them has failed with."""
        if self._stop.signal and not self._told:
            self._told = True
            self._tell(signal=self._stop.signal, process=self.index)
        if self.failure is not None:
            raise self.failure

    def _tell(self, **news: Any) -> int:
        """Tells all, and returns which of the news it has become."""
        for number in itertools.count():
            try:
                self._set(f"news/{number}", news)
                return number
            except jax.errors.JaxRuntimeError as error:
                if "ALREADY_EXISTS" not in str(error):
                    raise

    def _wait(self, key: str, source: int) -> Any:
        """The value of a key that the process `source` sets; looks up once a second what else there
        is, and says after a while for whom it waits."""
        limit = time.monotonic() + PATIENCE_SEC

        def look_up():
            nonlocal limit
            self._look_up()
            if time.monotonic() > limit:
                limit = math.inf
                print(
                    f"process {self.index} waits for process {source} of {self.count}, which may "
                    "still prepare its data or compile",
                    file=sys.stderr,
                    flush=True,
                )

        return self._get(key, 1, look_up)

    def _set(self, key: str, value: Any) -> None:
        self._client.key_value_set(f"fmjax/{key}", json.dumps(value))

    def _get(self, key: str, every_sec: int = 3600, look_up: Callable = lambda: None) -> Any:
        """The value of a key, once a process has set it."""
        while True:
            look_up()
            try:
                text = self._client.blocking_key_value_get(f"fmjax/{key}", 1000 * every_sec)
                return json.loads(text)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
