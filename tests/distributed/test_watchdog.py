"""A process that a signal finds stuck ends by itself, whatever it is stuck in."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from common import ROOT

from fmjax.distributed import signals, watchdog

STUCK = """
import ctypes, os, re, signal, sys, time
from fmjax.distributed import signals
from fmjax.distributed import watchdog

watchdog.TICK_SEC = 0.1

def mutex(library):  # locked twice, which ends never; no signal interrupts it
    lock = ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)

def sleep():
    while True:
        time.sleep(1)

def match():
    re.match("(([a-z]+)+)+X", "a" * 60)

def collective():
    mutex(ctypes.CDLL(None))

with signals.catch(grace_sec=0.5) as stop:
    stop.last_words = lambda error: print("last words:", error, flush=True)
    print("ready", flush=True)
    globals()[sys.argv[1]]()
"""


@pytest.mark.parametrize("place", ["sleep", "match", "collective"])
def test_row10_a_stuck_process_says_where_and_ends(place):
    command, environment = [sys.executable, "-c", STUCK, place], {"PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=os.environ | environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"in {place}" in err and "File " in err
    assert "the process is stuck" in err.splitlines()[-1]
    assert out.startswith("last words: stopped by")


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: self.now))


def watched(monkeypatch, grace_sec=60.0):
    """(clock, stop, watchdog, reasons for which it would have ended the process)."""
    clock, stop, reasons = Clock(monkeypatch), signals.Stop(), []
    return clock, stop, watchdog.Watchdog(stop, grace_sec, reasons.append), reasons


def test_a_run_that_polls_is_not_stuck(monkeypatch):
    clock, stop, dog, reasons = watched(monkeypatch)
    for _ in range(5):
        assert dog.look() == 60
        clock.now += 29
        assert dog.look() == 31 and reasons == []
        stop.poll()
    dog.look()
    clock.now += 60
    dog.look()
    assert reasons == ["nothing has moved for 60 s"]


def test_a_slow_step_is_not_stuck(monkeypatch):
    clock, stop, dog, reasons = watched(monkeypatch)
    for _ in range(2):
        stop.poll()
        clock.now += 100
    stop.poll()
    assert dog.look() == 200
    clock.now += 199
    dog.look()
    assert reasons == []


def test_compilation_takes_its_time_and_says_nothing_about_steps(monkeypatch):
    clock, stop, dog, reasons = watched(monkeypatch)
    stop.poll()
    with stop.compiling():
        assert stop.plan == signals.COMPILING
        assert dog.look() == watchdog.COMPILING_SEC
        clock.now += 500
        dog.look()
    stop.poll()
    assert reasons == [] and stop.longest_sec == 0.0 and stop.plan == signals.STEPPING


def test_a_save_that_was_begun_is_waited_for(monkeypatch):
    clock, stop, dog, reasons = watched(monkeypatch)
    stop.signal = "SIGTERM"
    assert stop.poll()
    dog.look()
    clock.now += watchdog.SLOW_SEC - 1
    dog.look()
    assert reasons == []
    clock.now += 1  # on storage that has gone it never ends
    dog.look()
    assert len(reasons) == 1


def test_all_is_given_back(monkeypatch):
    alarm, threads = signal.getsignal(signal.SIGALRM), watchdog.threading.active_count()
    with signals.catch():
        assert watchdog.threading.active_count() == threads + 1
    assert signal.getsignal(signal.SIGALRM) is alarm
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert watchdog.threading.active_count() == threads
