"""Processes that stand still together end, whoever holds up the others; slow ones go on."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from common import ROOT

from fmjax.distributed import signals, standstill, watchdog
from fmjax.distributed.signals import STEPS_SEEN, Stop
from fmjax.distributed.standstill import RollCall, places
from fmjax.distributed.watchdog import SLOW_SEC

HEARTBEAT = 100.0


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    for module in (signals, standstill):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class Team:
    """Processes that answer each other at once, but for those in `deaf`."""

    def __init__(self, count):
        self.stops, self.deaf, self.calls, self.reasons = [Stop() for _ in range(count)], (), 0, []
        self.gone, self.blocks = threading.Event(), [contextlib.ExitStack() for _ in range(count)]
        self.rolls = [RollCall(self, stop, HEARTBEAT) for stop in self.stops]

    def call_roll(self, patience_sec):
        self.calls += 1
        answers = [
            roll.answer(stop.polls) for roll, stop in zip(self.rolls, self.stops, strict=True)
        ]
        return [None if i in self.deaf else answer for i, answer in enumerate(answers)]

    def tell_standstill(self, reason):
        self.reasons.append(reason)


def trained(clock, count=2, step_sec=1.0):
    """Processes that are in their fifth step."""
    team = Team(count)
    for _ in range(5):
        for stop in team.stops:
            stop.poll()
        clock.now += step_sec
    for stop, block in zip(team.stops, team.blocks, strict=True):
        block.enter_context(stop.stepping())
    return team


def test_those_that_only_step_on_never_call(clock):
    team = trained(clock)
    for _ in range(1000):
        clock.now += HEARTBEAT - 1
        for stop, roll in zip(team.stops, team.rolls, strict=True):
            stop.poll()
            roll.look()
    assert team.calls == 0


def test_where_nobody_moves_all_end(clock):
    team = trained(clock)
    team.stops[0].poll()
    clock.now += HEARTBEAT - 1
    team.rolls[0].look()
    assert team.reasons == []
    clock.now += 1
    team.rolls[0].look()
    (reason,) = team.reasons
    assert "(config.distributed.heartbeat_sec=100): process 1 at poll 5, process 0 at po" in reason


def test_whoever_waits_for_one_that_saves_waits_as_long_as_that_may_take(clock):
    team = trained(clock)
    team.blocks[1].close()
    clock.now += SLOW_SEC - 1
    team.rolls[0].look()
    assert team.calls == 1 and team.reasons == []
    team.rolls[0].look()
    assert team.calls == 1
    clock.now += HEARTBEAT + 1
    team.rolls[0].look()
    assert len(team.reasons) == 1


def test_a_process_that_moved_after_a_call_calls_again_as_soon_as_it_stands_still(clock):
    team = trained(clock)
    team.blocks[1].close()
    clock.now += HEARTBEAT
    team.rolls[0].look()  # which puts the next call off for most of an hour
    for stop in team.stops:
        stop.poll()
    team.blocks[1].enter_context(team.stops[1].stepping())
    team.rolls[0].look()
    clock.now += 2 * HEARTBEAT + 2
    team.rolls[0].look()
    assert len(team.reasons) == 1


def test_one_that_does_not_answer_has_no_time_left(clock):
    team = trained(clock, count=3)
    team.deaf = (1,)
    clock.now += HEARTBEAT
    team.rolls[0].look()
    assert team.reasons[0].endswith("process 1 without an answer, processes 0, 2 at poll 5")


def test_one_that_moves_during_the_call_ends_nobody(clock):
    team = trained(clock)
    clock.now += HEARTBEAT
    ask = team.call_roll
    team.call_roll = lambda patience_sec: (ask(patience_sec), team.stops[0].poll())[0]
    team.rolls[0].look()
    assert team.reasons == []


def test_a_slow_step_is_known_from_the_steps_before(clock):
    team = trained(clock, step_sec=400.0)
    clock.now += 799
    assert team.stops[0].left(HEARTBEAT) == 1


def test_the_first_steps_and_those_after_compiling_take_their_time(clock):
    stop = Stop()
    assert stop.left(HEARTBEAT) == float("inf")
    with stop.stepping():
        for _ in range(STEPS_SEEN):
            assert stop.left(HEARTBEAT) == SLOW_SEC
            stop.poll()
        assert stop.left(HEARTBEAT) == HEARTBEAT
        with stop.compiling():
            assert stop.left(HEARTBEAT) == watchdog.COMPILING_SEC
        assert stop.left(HEARTBEAT) == SLOW_SEC
    assert stop.left(HEARTBEAT) == SLOW_SEC


def test_of_many_processes_some_are_named():
    assert places([7] * 9 + [6]) == "process 9 at poll 6, processes 0, 1, 2 and 6 more at poll 7"


STUCK = """
import sys, threading
import jax
from jax._src import distributed
from fmjax.distributed import standstill
from fmjax.distributed.signals import Stop
from fmjax.distributed.coordination import Peers

def deadlock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

standstill.TICK_SEC, index, stop = 0.1, int(sys.argv[1]), Stop()
jax.distributed.initialize(sys.argv[2], 2, index)
peers = Peers(distributed.global_state.client, index, 2, stop, 1.0)
peers.last_words = lambda error: print("last words:", error, flush=True)
with stop.stepping():
    for _ in range(9 - index):
        stop.poll()
    deadlock()
"""


@pytest.mark.slow
def test_row10_two_processes_in_a_deadlock_end_and_show_where():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", STUCK, str(index), address],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [75, 75], said
    for index, (out, err) in enumerate(said):
        assert "in deadlock" in err and "process 1 at poll 8, process 0 at poll 9" in err
        assert f"The threads of process {index} are shown above" in err
        assert out.startswith("last words: no process makes progress")
