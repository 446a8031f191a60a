"""Faults at exact moments of a run, for tests only: fmjax has no hooks, its functions are wrapped.

    python tests/inject.py kill@12:commit --config=small.py …      run.py with a fault

A fault is an act, the first step it may happen at, how many times, and the place; a comma separates
several. Left out, it is any step, one time, and the place that the act belongs to.

    kill@12:commit            SIGKILL before the checkpoint of step 12 gets its manifest
    term:compile              SIGTERM when compilation begins
    io_error@9x3              saving fails three times, from step 9 on: the disk is full
    hang:evaluate             the first evaluation stands still for HANG_SEC seconds
    deadlock@7:data           reading the batch of step 7 never ends
    raise@7:data              reading the batch of step 7 fails
    nan_loss@7x2              loss and gradients of the steps 7 and 8 are NaN
    nan_grad@7:head/mlm/bias  one leaf of the gradient is NaN, the loss is not
    spike@7                   loss and gradients are a thousand times what they are
"""

import errno
import importlib
import os
import re
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HANG_SEC = 3.0
FAULT = re.compile(r"(?P<act>[a-z_]+)(@(?P<step>\d+))?(x(?P<times>\d+))?(:(?P<place>[\w/]+))?")

# place: (module, function, the step that a call is about). Steps count from 1, as in the log; what
# happens between steps belongs to the last one that this process has started.
PLACES: dict[str, tuple[str, str, Callable[..., int]]] = {
    "connected": ("fmjax.params.devices", "require", lambda *_: started[0]),
    "prepare": ("fmjax.data.store", "tokenise", lambda *_: started[0]),
    "compile": ("fmjax.training.flops", "of_step", lambda *_: started[0]),
    "data": ("fmjax.data.batches", "_Steps.__getitem__", lambda _, step: step + 1),
    "train": ("fmjax.training.monitor", "Monitor.step", lambda _, step, *rest: step),
    "evaluate": ("fmjax.evaluation.eval_loop", "collect", lambda *_, **__: started[0]),
    "save": ("fmjax.io.retention", "make_room", lambda _, step: step),
    "commit": ("fmjax.io.manifest", "write", lambda folder: int(folder.name)),
    "delete": ("fmjax.io.retention", "remove", lambda folder: int(folder.name)),
}
# act: (what it does, its place).
ACTS: dict[str, tuple[Callable[[], Any], str]] = {
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), "train"),
    "term": (lambda: _send(signal.SIGTERM), "train"),
    "deadlock": (lambda: _deadlock(), "train"),
    "hang": (lambda: time.sleep(HANG_SEC), "train"),
    "raise": (lambda: _raise(RuntimeError("injected")), "train"),
    "io_error": (lambda: _raise(OSError(errno.ENOSPC, "No space left on device")), "commit"),
}
NUMBERS = ("nan_loss", "nan_grad", "spike")  # acts on the numbers of a step, compiled into it
started = [0]


def install(faults: str, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Wraps the functions of fmjax that `faults` names; undone if `patch` is pytest's setattr."""
    started[0] = 0
    _wrap(*PLACES["train"][:2], _note_step, patch)
    for text in faults.split(","):
        fault = FAULT.fullmatch(text.strip())
        assert fault, f"{text!r} is no fault: act@step x times:place"
        act, place = fault["act"], fault["place"]
        step, times = int(fault["step"] or 0), int(fault["times"] or 1)
        if act in NUMBERS:
            for module in ("fmjax.training.step", "fmjax.training.loop"):
                change = _numbers(act, step, times, place)
                _wrap(module, "make_gradient", change, patch)
        else:
            does, usual = ACTS[act]
            module, name, step_of = PLACES[place or usual]
            _wrap(module, name, _from(step, times, step_of, does), patch)


def _wrap(module: str, name: str, change: Callable, patch: Callable) -> None:
    """Replaces a function, or a method "Class.name", by `change(it)`."""
    holder = importlib.import_module(module)
    *owners, name = name.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    patch(holder, name, change(getattr(holder, name)))


def _note_step(original: Callable) -> Callable:
    def wrapped(monitor, step, *rest):
        started[0] = step
        return original(monitor, step, *rest)

    return wrapped


def _from(step: int, times: int, step_of: Callable, does: Callable) -> Callable:
    """Does it before the first `times` calls that are about `step` or a later one."""
    left = [None] * times

    def change(original):
        def wrapped(*args, **kwargs):
            if left and step_of(*args, **kwargs) >= step:
                left.pop()
                does()
            return original(*args, **kwargs)

        return wrapped

    return change


def _numbers(act: str, step: int, times: int, leaf: str | None) -> Callable:
    """Changes what `make_gradient` returns, in the steps `step` to `step` + `times` - 1."""

    def change(make_gradient):
        import jax
        import jax.numpy as jnp

        from fmjax.params import paths

        def make(*args):
            gradient = make_gradient(*args)

            def wrapped(state, batch):
                (loss, sums), grads = gradient(state, batch)
                now = (state.step + 1 >= step) & (state.step + 1 < step + times)
                worse = lambda x: jnp.where(now, 1e3 * x if act == "spike" else jnp.nan, x)
                if act == "nan_grad":
                    flat = paths.flatten(grads)
                    return (loss, sums), paths.unflatten({**flat, leaf: worse(flat[leaf])})
                return (worse(loss), sums), jax.tree.map(worse, grads)

            return wrapped

        return make

    return change


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.1)  # so that the next one is not delivered as one with it


def _deadlock() -> None:
    lock = threading.Lock()
    for _ in range(2):
        lock.acquire()


def _raise(error: Exception) -> None:
    raise error


if __name__ == "__main__":
    install(sys.argv[1])
    program = str(Path(__file__).parent.parent / "run.py")
    sys.argv = [program, *sys.argv[2:]]
    runpy.run_path(program, run_name="__main__")
