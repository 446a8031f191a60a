"""Signals only set a flag; nothing is lost until the third Ctrl-C."""

import os
import signal
import subprocess
import sys

import pytest

from fmjax import interrupt

CHILD = """
import os, signal, sys
from fmjax import interrupt

with interrupt.catch() as stop:
    for name in sys.argv[1:]:
        os.kill(os.getpid(), signal.Signals[name])
    print(stop.poll(), stop.signal)
"""


def child(*signals):
    return subprocess.run(
        [sys.executable, "-c", CHILD, *signals], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_row07_a_signal_is_noted_and_its_handler_given_back(number, capfd):
    before = signal.getsignal(number)
    with interrupt.catch() as stop:
        assert not stop.poll() and stop.signal == ""
        os.kill(os.getpid(), number)
        assert not stop.requested and stop.signal == number.name
        assert stop.poll() and stop.requested
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.startswith(f"{number.name}: finishing the step")


def test_handlers_are_given_back_after_an_error():
    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    with pytest.raises(KeyError), interrupt.catch():
        raise KeyError
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == before


def test_row06_the_first_signal_is_remembered_and_repeats_do_not_break_the_block():
    done = child("SIGUSR1", *["SIGTERM"] * 5, "SIGINT", "SIGINT")
    assert (done.returncode, done.stdout) == (0, "True SIGUSR1\n")
    assert done.stderr.count("Press Ctrl-C again to kill") == 1


def test_row06_the_third_interrupt_kills():
    done = child("SIGINT", "SIGINT", "SIGINT")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "")
