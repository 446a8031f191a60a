"""Signals only set a flag; nothing is lost until the third Ctrl-C."""

import os
import signal
import subprocess
import sys

import pytest

from fmjax.distributed import signals

CHILD = """
import os, signal, sys
from fmjax.distributed import signals

with signals.catch() as stop:
    for name in sys.argv[1:]:
        os.kill(os.getpid(), signal.Signals[name])
    print(stop.poll(), stop.signal)
"""


def child(*sent):
    return subprocess.run(
        [sys.executable, "-c", CHILD, *sent], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_row07_a_signal_is_noted_and_its_handler_given_back(number, capfd):
    before = signal.getsignal(number)
    with signals.catch() as stop:
        assert not stop.poll() and stop.signal == ""
        os.kill(os.getpid(), number)
        assert not stop.requested and stop.signal == number.name
        assert stop.poll() and stop.requested
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.startswith(f"{number.name}: finishing the step")


def test_handlers_are_given_back_after_an_error():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with pytest.raises(KeyError), signals.catch():
        raise KeyError
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


def test_row06_the_first_signal_is_remembered_and_repeats_do_not_break_the_block():
    done = child("SIGUSR1", *["SIGTERM"] * 5, "SIGINT", "SIGINT")
    assert (done.returncode, done.stdout) == (0, "True SIGUSR1\n")
    assert done.stderr.count("Press Ctrl-C again to kill") == 1


def test_row06_the_third_interrupt_kills():
    done = child("SIGINT", "SIGINT", "SIGINT")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "")


def test_the_first_ctrl_c_says_how_to_leave_at_once():
    assert (
        "SIGINT: finishing the step, then saving. Ctrl-C twice more kills" in child("SIGINT").stderr
    )


def test_on_a_terminal_the_bar_makes_room_for_the_message(monkeypatch):
    written = []
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    monkeypatch.setattr(os, "write", lambda descriptor, text: written.append((descriptor, text)))
    with signals.catch() as stop, stop.compiling():
        signal.raise_signal(signal.SIGTERM)
    assert written == [(2, b"\r\x1b[2K\nSIGTERM: compiling, then saving\n")]


def test_a_terminal_that_has_gone_does_not_break_the_handler(monkeypatch):
    def fail(*_):
        raise OSError("Input/output error")

    with signals.catch() as stop:
        monkeypatch.setattr(os, "write", fail)
        signal.raise_signal(signal.SIGHUP)
        assert stop.poll() and stop.signal == "SIGHUP"
