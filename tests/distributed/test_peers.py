"""What processes tell each other, with threads for processes and a dict for the coordinator."""

import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from fmjax.distributed import coordination
from fmjax.distributed.coordination import Peers
from fmjax.distributed.signals import Stop
from fmjax.errors import CheckpointError, ConfigError, FmjaxError, Preempted

COUNT = 4


class Store:
    """The key-value store of jax.distributed; `calls` counts the requests."""

    def __init__(self):
        self.values, self.changed, self.calls = {}, threading.Condition(), 0

    def key_value_set(self, key, value):
        with self.changed:
            self.calls += 1
            if key in self.values:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            self.calls += 1
            if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            return self.values[key]


class Device:
    """Runs a step when all processes have dispatched it, as a collective does."""

    def __init__(self, count):
        self.steps, self.changed = [0] * count, threading.Condition()

    def dispatch(self, index):
        with self.changed:
            self.steps[index] += 1
            self.changed.notify_all()

    def wait(self, step):
        with self.changed:
            assert self.changed.wait_for(lambda: min(self.steps) >= step, 20), "a deadlock"


@pytest.fixture
def team():
    """Makes the processes of a run, which share a store."""
    made = []

    def make(count=COUNT, heartbeat_sec=30.0):
        store = Store()
        made.extend(Peers(store, index, count, Stop(), heartbeat_sec) for index in range(count))
        return made

    yield make
    with ThreadPoolExecutor(COUNT) as pool:
        for peer in made:
            pool.submit(peer.leave)
    assert not any(peer._listener.is_alive() for peer in made)


def in_all(team, act):
    """What `act(peer)` returns or raises in each process."""

    def caught(peer):
        try:
            return act(peer)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(team)) as pool:
        return list(pool.map(caught, team))


@pytest.mark.parametrize("seed", range(12))
def test_a_signal_to_some_stops_all_at_the_same_step(team, seed):
    """Hosts run ahead of their devices, by a step, as in fmjax.training.loop.loop."""
    rng, team = random.Random(seed), team()
    signalled = rng.sample(range(COUNT), rng.choice([1, 1, 2, COUNT]))
    at, device = rng.randint(0, 20), Device(COUNT)

    def train(peer):
        pause, step = random.Random(seed + peer.index), 0
        while step < 1000 and not peer._stop.poll():
            if peer.index in signalled and step == at:
                peer._stop.signal = "SIGTERM"
            device.dispatch(peer.index)
            device.wait(step)  # the metrics of the step before
            step += 1
            time.sleep(pause.choice([0.0, 0.0, 0.002]))
        return step

    steps = in_all(team, train)
    assert len(set(steps)) == 1 and at < steps[0] < at + 200, steps
    assert all(peer._stop.requested and peer._stop.signal == "SIGTERM" for peer in team)
    assert all(peer.poll() for peer in team)  # It stays so.


def test_a_signal_after_the_last_poll_stops_nobody(team):
    one, other = team = team(2)
    assert not any(in_all(team, Peers.poll))
    one._stop.signal = "SIGTERM"
    assert in_all(team, Peers.meet) == [None, None]
    deadline = time.monotonic() + 20  # The news comes by a thread of its own.
    while not other._stop.signal and time.monotonic() < deadline:
        time.sleep(0.001)
    assert other._stop.signal == "SIGTERM" and not other._stop.requested


def test_polls_cost_no_request(team):
    one, other = team(2)
    in_all([one, other], Peers.meet)
    before = one._client.calls
    assert not any(one.poll() for _ in range(1000))
    assert one._client.calls == before


def test_a_signal_reaches_those_who_wait_and_those_who_prepare_data(team):
    waits, prepares = team(2)
    waits._stop.signal = "SIGUSR1"

    def prepare(peer):
        while not peer._stop.signal:
            time.sleep(0.001)
        raise peer.fail(Preempted(f"stopped by {peer._stop.signal} while preparing data"))

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(waits.meet)
        with pytest.raises(Preempted, match="SIGUSR1"):
            prepare(prepares)
        with pytest.raises(Preempted, match="^process 1 of 2: stopped by SIGUSR1 while preparing"):
            waiting.result(20)


def test_whoever_waits_says_for_whom(team, monkeypatch, capsys):
    monkeypatch.setattr(coordination, "PATIENCE_SEC", 0.5)
    one, late = team(2)

    def come_late(peer):
        time.sleep(2.0 if peer is late else 0.0)
        peer.meet()

    assert in_all([one, late], come_late) == [None, None]
    said = capsys.readouterr().err
    assert said.startswith("process 0 waits for process 1 of 2, which may still prepare its data")
    assert said.count("\n") == 1


def test_all_get_what_process_0_finds(team):
    team = team()
    assert in_all(team, lambda peer: peer.first(lambda: {"from": peer.index})) == [{"from": 0}] * 4
    assert in_all(team, lambda peer: peer.first(lambda: peer.index + 1)) == [1] * 4


@pytest.mark.parametrize("error", [ConfigError, CheckpointError])
def test_a_refusal_of_process_0_is_that_of_all(team, error):
    def refuse(peer):
        def call():
            raise peer.fail(error("in use"))

        return peer.first(call)

    found = in_all(team(), refuse)
    assert [type(each) for each in found] == [error] * COUNT
    assert [str(each) for each in found] == ["in use"] + ["process 0 of 4: in use"] * 3


@pytest.mark.parametrize("wait", [Peers.poll, Peers.meet])
def test_a_failure_ends_the_others_where_they_next_look(team, wait):
    bug, *others = team()
    error = KeyError("x")
    assert bug.fail(error) is error and bug.fail(error) is error
    assert all(other._failed.wait(5) for other in others)
    for found in in_all(others, wait):
        assert type(found) is FmjaxError and found.exit_code == 1
        assert str(found) == "process 0 of 4: KeyError: 'x'"
    assert len([key for key in bug._client.values if "news" in key]) == 1


def test_a_broken_connection_is_the_fault_of_what_broke_it(team, monkeypatch):
    monkeypatch.setattr(coordination, "ECHO_SEC", 5.0)
    one, other = team(2)
    gloo = jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer")
    with ThreadPoolExecutor(1) as pool:
        echo = pool.submit(one.fail, gloo)
        time.sleep(0.05)
        other.fail(CheckpointError("disk full"))
        assert str(echo.result(5)) == "process 1 of 2: disk full"
    assert isinstance(echo.result(), CheckpointError)


def test_a_broken_connection_that_nobody_explains_is_told(team, monkeypatch):
    monkeypatch.setattr(coordination, "ECHO_SEC", 0.05)
    one, other = team(2)
    gloo = jax.errors.JaxRuntimeError("Gloo all-reduce failed")
    assert one.fail(gloo) is gloo
    assert other._failed.wait(5) and "Gloo" in str(other.failure)


def test_a_process_that_is_stuck_is_ended_with_the_same_code(team, monkeypatch, capsys):
    ended, words = threading.Event(), []
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: words.append("goodbye"))
    monkeypatch.setattr(os, "_exit", lambda code: (words.append(code), ended.set()))
    one, other = team(2, heartbeat_sec=0.1)
    other.gone.set()  # This one ends by itself.
    one.last_words = lambda error: words.append(str(error))
    other.fail(CheckpointError("disk full"))
    assert ended.wait(5)
    assert words == ["process 1 of 2: disk full", "goodbye", 4]
    assert capsys.readouterr().err == "error: process 1 of 2: disk full\n"


def test_two_failures_at_once_keep_their_own_words(team):
    team = team()
    errors = [ConfigError(str(peer.index)) for peer in team]
    assert in_all(team, lambda peer: peer.fail(errors[peer.index])) == errors
    assert json.loads(team[0]._client.values["fmjax/news/0"])["code"] == 2


def test_processes_that_stand_still_say_where_and_end_together(team, monkeypatch):
    reasons, told = [], threading.Barrier(3)

    def end(reason, *last_words):
        reasons.append(reason)
        told.wait(5)

    monkeypatch.setattr(coordination.watchdog, "end", end)
    one, other = team(2, heartbeat_sec=10.0)
    monkeypatch.setattr(other._stop, "left", lambda usual_sec: 1.0)
    monkeypatch.setattr(one._stop, "left", lambda usual_sec: 0.0)
    other.poll()
    assert one.call_roll(5) == [{"polls": 0, "left": 0.0}, {"polls": 1, "left": 1.0}]
    one._roll.look()
    assert one._listener.is_alive() and reasons == []
    monkeypatch.setattr(other._stop, "left", lambda usual_sec: -1.0)
    one._roll._next = 0.0
    one._roll.look()
    told.wait(5)
    for peer, reason in zip([one, other], sorted(reasons), strict=True):
        assert "process 0 at poll 0, process 1 at poll 1" in reason
        assert reason.endswith(f"The threads of process {peer.index} are shown above")


def test_one_whose_threads_cannot_run_does_not_answer_the_roll(team, monkeypatch):
    one, deaf = team(2)
    monkeypatch.setattr(deaf._roll, "answer", lambda polls: deaf._get("never", 1, deaf._look_up))
    begin = time.monotonic()
    assert one.call_roll(0.5)[1] is None and time.monotonic() - begin < 5
    deaf._client.key_value_set("fmjax/never", "0")
