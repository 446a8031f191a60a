"""The log of a run: exact numbers, one history across resumes, and time that adds up."""

import errno
import importlib.util
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from common import ROOT

from fmjax.errors import CheckpointError, ConfigError
from fmjax.io import metrics_log, trackers


@pytest.fixture
def clock(monkeypatch):
    """A clock moved by hand: `clock.now += 2`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics_log, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def open_log(workdir, **options):
    return metrics_log.Logger(workdir, **{"tensorboard": False, **options})


def lines(workdir):
    return [json.loads(line) for line in (workdir / metrics_log.FILE).read_text().splitlines()]


def test_lines_are_on_disk_at_once(tmp_path, clock):
    log = open_log(tmp_path)
    clock.now += 1.5
    log.write(10, {"train/loss": 2.5, "tokens": 640})
    assert lines(tmp_path)[1] == {"step": 10, "time": 1.5, "train/loss": 2.5, "tokens": 640}
    log.close()


def test_row39_numbers_become_python_numbers(tmp_path):
    big = 2**53 + 1  # Not a float64.
    with open_log(tmp_path) as log:
        log.write(1, {"tokens": np.int64(big), "loss": np.float32(0.5), "n": np.array(3)})
        log.write(2, {"tokens": 2**70})
    (first, second), _ = metrics_log.read(tmp_path)
    assert (first["tokens"], first["loss"], first["n"]) == (big, 0.5, 3)
    assert (type(first["tokens"]), type(first["loss"])) == (int, float)
    assert second["tokens"] == 2**70


def test_non_finite_values_stay_visible_in_valid_json(tmp_path):
    with open_log(tmp_path) as log:
        log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
        log.event("skipped_update", step=1, loss=math.nan)
    strict = json.JSONDecoder(parse_constant=pytest.fail)
    texts = (tmp_path / metrics_log.FILE).read_text().splitlines()
    assert strict.decode(texts[1])["c"] == "-Infinity"
    assert strict.decode(texts[2])["loss"] == "NaN"
    (row,), _ = metrics_log.read(tmp_path)
    assert math.isnan(row["a"]) and (row["b"], row["c"]) == (math.inf, -math.inf)


def test_names_of_the_log_itself_are_refused(tmp_path):
    with open_log(tmp_path) as log, pytest.raises(AssertionError, match="'time'"):
        log.write(1, {"time": 3.0})


def test_other_processes_write_nothing(tmp_path):
    with metrics_log.Logger(tmp_path, process_index=1) as log:
        log.write(1, {"loss": 1.0})
        log.event("done")
        with log.timed("evaluation"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_resume_cuts_what_came_after_the_restored_step(tmp_path, clock):
    with open_log(tmp_path) as log:
        for step in (10, 20, 30):
            clock.now += 2
            log.write(step, {"loss": float(step)})
            log.event("checkpoint", step=step)
    clock.now += 500  # Not running.
    with open_log(tmp_path, resume_step=20) as log:
        clock.now += 3
        log.write(30, {"loss": 3.0})
    rows, events = metrics_log.read(tmp_path)
    assert [(row["step"], row["time"], row["loss"]) for row in rows] == [
        (10, 2, 10),
        (20, 4, 20),
        (30, 9, 3),  # 6 s had been reached, and 3 more went by.
    ]
    assert [event["event"] for event in events] == ["start", "checkpoint", "checkpoint", "resume"]
    assert (events[-1]["step"], events[-1]["lost_sec"]) == (20, 2)


def test_resume_from_the_start_keeps_only_the_first_line(tmp_path):
    with open_log(tmp_path) as log:
        log.write(10, {"loss": 1.0})
    open_log(tmp_path, resume_step=0).close()
    rows, events = metrics_log.read(tmp_path)
    assert rows == [] and [event["event"] for event in events] == ["start", "resume"]


@pytest.mark.parametrize("torn", [b'{"step": 20, "ti', b'{"step": 20, "time": 3}', b"\0\0\0\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    with open_log(tmp_path) as log:
        log.write(10, {"loss": 1.0})
    with open(tmp_path / metrics_log.FILE, "ab") as file:
        file.write(torn)
    assert [row["step"] for row in metrics_log.read(tmp_path)[0]] == [10]
    with open_log(tmp_path, resume_step=20) as log:
        log.write(30, {"loss": 2.0})
    assert [line.get("event", line["step"]) for line in lines(tmp_path)] == [
        "start",
        10,
        "resume",
        30,
    ]


def test_reading_a_folder_without_a_log(tmp_path):
    assert metrics_log.read(tmp_path) == ([], [])
    assert sum(metrics_log.goodput([], []).values()) == 0


def test_goodput_adds_up_to_the_running_time(tmp_path, clock):
    started = clock.now
    clock.now += 5  # Imports and data.
    with open_log(tmp_path, started=started) as log:
        with log.timed("compile"):
            clock.now += 7
        clock.now += 20
        with log.timed("data_wait"):
            clock.now += 0.5
        log.write(10, {})
        with log.timed("evaluation"):
            clock.now += 3
            with log.timed("data_wait"):  # Part of the evaluation.
                clock.now += 1
        with log.timed("saving"):
            clock.now += 2
        log.event("checkpoint", step=10)
        clock.now += 6  # Lost: the run is killed before step 30 is saved.
        with log.timed("saving"):
            clock.now += 4
        log.write(20, {})
    with open_log(tmp_path, resume_step=10) as log:
        with log.timed("restore"):
            clock.now += 1
        clock.now += 8
        log.event("done", step=30)
    assert metrics_log.goodput(*metrics_log.read(tmp_path)) == pytest.approx(
        {
            "step": 28,
            "init": 5,
            "compile": 7,
            "restore": 1,
            "data_wait": 0.5,
            "evaluation": 4,
            "saving": 2,
            "lost": 10,
        }
    )


def test_reading_the_checkpoint_is_no_part_of_the_start_up(tmp_path, clock):
    started = clock.now
    clock.now += 5
    with open_log(tmp_path, started=started, restore_sec=3):
        pass
    found = metrics_log.goodput(*metrics_log.read(tmp_path))
    assert (found["init"], found["restore"]) == (2, 3)


def test_losing_the_same_steps_twice_is_counted_twice(tmp_path, clock):
    for _ in range(3):
        with open_log(tmp_path, resume_step=0) as log:
            clock.now += 4
            log.write(10, {})
    assert metrics_log.goodput(*metrics_log.read(tmp_path)) == pytest.approx(
        dict.fromkeys(metrics_log.SPENT, 0) | {"step": 4, "lost": 8}
    )


def test_short_waits_are_not_rounded_away(tmp_path, clock):
    with open_log(tmp_path) as log:
        for step in range(1, 101):
            with log.timed("data_wait"):
                clock.now += 0.0001
            log.write(step, {})
    assert metrics_log.goodput(*metrics_log.read(tmp_path))["data_wait"] == pytest.approx(
        0.01, abs=5e-4
    )


def test_a_full_disk_delays_lines(tmp_path, capsys):
    log = open_log(tmp_path)
    real = log._file

    def refuse(data):
        raise OSError(errno.ENOSPC, "No space left on device")

    log._file = SimpleNamespace(write=refuse, close=real.close, fileno=real.fileno)
    log.write(1, {"loss": 1.0})
    assert "No space left" in capsys.readouterr().err
    log._file = real
    log.write(2, {"loss": 2.0})
    assert [row["step"] for row in metrics_log.read(tmp_path)[0]] == [1, 2]
    log._file = SimpleNamespace(write=refuse, close=real.close, fileno=real.fileno)
    log.write(3, {"loss": 3.0})
    with pytest.raises(CheckpointError, match="free some space"):
        log.close()


def test_the_command_is_kept_without_secrets(tmp_path, monkeypatch):
    words = ["run.py", "--config=c.py", "--fresh", "--config.hub_token=s3cret", "--config.a=x y"]
    monkeypatch.setattr(sys, "argv", words)
    open_log(tmp_path).close()
    command = metrics_log.read(tmp_path)[1][0]["command"]
    assert command == "python run.py --config=c.py '--config.hub_token=***' '--config.a=x y'"


def test_tensorboard_gets_the_metrics(tmp_path):
    with metrics_log.Logger(tmp_path, tensorboard=True) as log:
        log.write(7, {"train/loss": 2.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()


def test_tensorboard_does_not_load_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise AssertionError")
    program = (
        "import sys; from pathlib import Path; from fmjax.io import trackers; "
        "trackers.TensorBoard(Path(sys.argv[1]), None); print('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_wandb_resumes_one_run_and_has_our_step(tmp_path, monkeypatch):
    calls = []
    record = lambda name: lambda *args, **kwargs: calls.append((name, args, kwargs))
    names = ("init", "define_metric", "log", "finish")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**{n: record(n) for n in names}))
    for resume_step in (0, 5):
        with open_log(tmp_path, wandb=True, config={"seed": 0}, resume_step=resume_step) as log:
            log.write(5, {"loss": 1.0})
    first, second = (kwargs for name, _, kwargs in calls if name == "init")
    assert first == second and first["resume"] == "allow" and first["config"] == {"seed": 0}
    assert ("define_metric", ("*",), {"step_metric": "step"}) in calls
    assert ("log", ({"step": 5, "loss": 1.0},), {}) in calls


def test_missing_wandb_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        open_log(tmp_path, wandb=True)


def test_a_disk_that_is_full_for_a_time_costs_tensorboard_that_time(tmp_path, monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    times = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 1e9 + clock.now)
    monkeypatch.setattr(trackers, "time", times)
    board = trackers.TensorBoard(tmp_path, None)
    board.write(1, {"before": 1.0})
    writer = board._writer

    def refuse(event):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_event", refuse)
    for step in range(2, 100):  # more than any queue holds
        board.write(step, {"meanwhile": 1.0})
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device); the run continues" in said
    clock.now += trackers.RETRY_SEC
    board.write(100, {"after": 1.0})
    board.close()
    first, second = sorted(tmp_path.iterdir())
    assert b"before" in first.read_bytes() and b"after" in second.read_bytes()
    assert b"meanwhile" not in first.read_bytes() + second.read_bytes()


def test_a_folder_of_tensorboard_that_cannot_be_made_is_left_out(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    with metrics_log.Logger(tmp_path, tensorboard=True) as log:
        log.write(1, {"loss": 1.0})
    assert capsys.readouterr().err.count("TensorBoard's files") == 1
    assert len(metrics_log.read(tmp_path)[0]) == 1


def broken_wandb(monkeypatch, name):
    def fail(*args, **kwargs):
        raise RuntimeError("no network\nand more")

    names = ("init", "define_metric", "log", "finish")
    fake = SimpleNamespace(**dict.fromkeys(names, lambda *args, **kwargs: None) | {name: fail})
    monkeypatch.setitem(sys.modules, "wandb", fake)


@pytest.mark.parametrize("name", ["log", "finish"])
def test_wandb_that_fails_is_left_out_and_the_run_continues(tmp_path, monkeypatch, capsys, name):
    broken_wandb(monkeypatch, name)
    with open_log(tmp_path, wandb=True) as log:
        for step in (1, 2):
            log.write(step, {"loss": 1.0})
    said = capsys.readouterr().err
    assert said.count("Weights & Biases is left out from here on (no network); the run") == 1
    assert len(metrics_log.read(tmp_path)[0]) == 2


def test_wandb_that_does_not_begin_refuses_a_new_run_and_not_one_that_resumes(
    tmp_path, monkeypatch, capsys
):
    broken_wandb(monkeypatch, "init")
    with pytest.raises(ConfigError, match="config.wandb=True: .*no network. Run `wandb login`"):
        open_log(tmp_path, wandb=True)
    open_log(tmp_path).close()
    open_log(tmp_path, wandb=True).close()
    assert "left out from here on" in capsys.readouterr().err


def test_a_log_that_was_removed_between_two_sessions_is_missed(tmp_path, capsys):
    open_log(tmp_path, resume_step=7).close()
    assert "metrics.jsonl is gone: it will lack the 7 steps before" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    open_log(tmp_path / "new").close()
    assert not capsys.readouterr().err


def test_a_log_that_is_removed_is_written_again(tmp_path, capsys):
    with open_log(tmp_path) as log:
        log.write(1, {"loss": 2.0})
        before = (tmp_path / metrics_log.FILE).read_bytes()
        (tmp_path / metrics_log.FILE).unlink()
        log.write(2, {"loss": 1.0})
    assert (tmp_path / metrics_log.FILE).read_bytes().startswith(before)
    rows, _ = metrics_log.read(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert "metrics.jsonl was removed: it is written again" in capsys.readouterr().err


def test_lines_go_to_the_file_that_replaces_the_log(tmp_path):
    with open_log(tmp_path) as log:
        log.write(1, {"loss": 2.0})
        (tmp_path / "other").write_bytes((tmp_path / metrics_log.FILE).read_bytes())
        (tmp_path / "other").rename(tmp_path / metrics_log.FILE)
        log.write(2, {"loss": 1.0})
    assert [row["step"] for row in metrics_log.read(tmp_path)[0]] == [1, 2]


def test_a_disk_that_stays_full_is_said_once(tmp_path, capsys):
    log = open_log(tmp_path)
    real = log._file

    def refuse(data):
        raise OSError(errno.ENOSPC, "No space left on device")

    log._file = SimpleNamespace(write=refuse, close=real.close, fileno=real.fileno)
    for step in range(5):
        log.write(step, {})
    assert capsys.readouterr().err.count("cannot write") == 1
    log._file = real
    log.close()
