"""Whole runs in processes of their own: killed, stopped, repeated, refused. What `row12` in a name
means is in faults/test_table.py."""

import json
import os
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import saved_states
from runs import (
    KEEP_ALL,
    TOTAL,
    assert_same_end,
    contents,
    ended,
    final_state,
    history,
    reached,
    run,
    run_here,
    saving,
    start,
    status,
    wait,
    write_corpus,
)

from fmjax.checkpoints import checkpointer
from fmjax.config import load as configs
from fmjax.distributed import signals
from fmjax.errors import CheckpointError, NumericsError
from fmjax.evaluation import eval_loop
from fmjax.io import metrics_log, workdir
from fmjax.reports import run_report

pytest_plugins = ["runs"]


def test_a_straight_run_logs_each_line_once(straight):
    steps = [(row["step"], "validation/loss" in row) for row in history(straight)]
    expected = [(step, False) for step in range(5, TOTAL + 1, 5)] + [(20, True), (40, True)]
    assert steps == sorted(expected)
    assert status(straight)["step"] == TOTAL and status(straight)["exit_code"] == 0


def test_row01_row03_killed_five_times_ends_bit_identical(home, tmp_path, straight, abstract):
    folder, rng = tmp_path / "run", random.Random(0)
    kills = [  # (faults, what to wait for, most seconds to wait after it)
        ("", lambda: True, 4.0),  # start-up: imports, data, compilation
        ("", lambda: reached(folder, 5), 0.3),
        ("", lambda: reached(folder, 10) and saving(folder), 0.05),
        ("kill:delete", lambda: False, 0.0),  # the end
        ("", lambda: reached(folder, 25), 0.1),
    ]
    for faults, happened, most in kills:
        process = start(home, folder, faults=faults)
        wait(process, happened)
        time.sleep(rng.uniform(0, most))
        process.kill()
        assert ended(process).returncode == -signal.SIGKILL
        # Every step that is listed can be restored.
        assert not any(saved_states.problems(folder, step) for step in saved_states.steps(folder))
    done = run(home, folder)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert_same_end(folder, straight, abstract)


MOMENTS = [  # (what happens, the step that is then reached)
    ("term:prepare", [0]),
    ("term:compile", [1]),  # the step that it is compiled for is finished
    ("term:commit,term:commit,term:commit", range(5, 11)),  # three signals during one save
    ("term:evaluate", [20]),
    ("hang@28:data", [27, 28]),  # and a signal from outside while the loop waits for data
    ("term:evaluate", [40]),
]

PLANS = {"term:prepare": signals.PREPARING, "term:compile": signals.COMPILING}


@pytest.mark.parametrize(
    "which", [(0, 4), pytest.param(range(len(MOMENTS)), marks=pytest.mark.slow)], ids=str
)
def test_row04_row05_row06_stopped_at_every_moment_ends_bit_identical(
    which, home, tmp_path, straight, abstract
):
    folder = tmp_path / "run"
    # A cache of its own, so that there is data to prepare.
    cache = f"--config.data.cache={tmp_path}/cache"
    step = 0
    for faults, steps in (MOMENTS[i] for i in which):
        process = start(home, folder, cache, faults=faults)
        if "hang" in faults:
            wait(process, lambda: reached(folder, 25))
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
        done, resumed = ended(process), f"resuming at step {step} of {TOTAL}"
        assert done.returncode == 75, f"{faults}: {done.stderr}"
        assert status(folder)["state"] == "preempted" and status(folder)["exit_code"] == 75
        assert (resumed in done.stdout) == (step > 0)
        *notices, error = done.stderr.splitlines()
        assert set(notices) == {f"SIGTERM: {PLANS.get(faults, signals.STEPPING)}"}
        assert "stopped by SIGTERM" in error and "the same command goes on" in error
        step = status(folder)["step"]
        assert step in steps, faults
        assert step == 0 or step in saved_states.steps(folder) and f"after step {step}," in error
    done = run(home, folder, cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_end(folder, straight, abstract)


def test_row14_a_finished_run_is_left_as_it_is(home, straight):
    before = contents(straight)
    done = run(home, straight, KEEP_ALL)
    assert done.returncode == 0 and done.stdout.count("already finished at step 40") == 1
    assert "resuming" not in done.stdout
    assert contents(straight) == before


def test_row22_lost_checkpoints_are_not_a_silent_start_from_zero(home, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for _ in range(2):  # A refusal does not make the next start forget.
        again = run(home, tmp_path / "run")
        assert again.returncode == 4
        assert f"had a checkpoint of step {TOTAL}" in again.stderr and "--fresh" in again.stderr
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log


def test_row15_a_second_process_is_refused_and_told_who_works_there(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    with workdir.open(tmp_path, configs.load("small.py")):
        before = contents(tmp_path)
        done = run(home, tmp_path)
        assert contents(tmp_path) == before
    assert done.returncode == 2 and done.stdout == ""
    assert f"in use (host {os.uname().nodename}, pid {os.getpid()}" in done.stderr


def test_row28_another_config_is_refused_with_the_difference(home, straight):
    before = contents(straight)
    done = run(home, straight, "--config.optim.lr=0.5")
    assert done.returncode == 2 and "optim.lr: 0.001 -> 0.5" in done.stderr
    assert contents(straight) == before


def test_row51_other_data_under_the_same_name_are_refused(home, straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    shutil.copy(home / "small.py", tmp_path)
    write_corpus(tmp_path, seed=1)
    kept = contents(folder / "tokenizer") | contents(folder / "checkpoints")
    done = run(tmp_path, folder)
    assert done.returncode == 5 and "its data differ" in done.stderr
    assert kept.items() <= contents(folder).items()
    assert status(folder)["state"] == "failed" and status(folder)["exit_code"] == 5


def test_row24_a_folder_that_cannot_be_written_is_refused_before_any_work(home):
    done = run(home, "/dev/null/run")
    assert done.returncode == 4 and done.stdout == ""
    assert "/dev/null/run cannot be written" in done.stderr


def test_row33_a_loss_that_is_not_finite_ends_the_run(home, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(NumericsError) as caught:
        faults = "nan_loss@11x30"
        run_here(home, folder, "--config.max_skipped=5", faults=faults, monkeypatch=monkeypatch)
    assert status(folder)["state"] == "failed" and status(folder)["exit_code"] == 3

    (dump,) = (folder / "dumps").iterdir()
    assert str(dump) in str(caught.value)
    found = json.loads(dump.read_text())
    assert (dump.name, found["step"]) == ("step_15.json", 15)
    assert found["examples"] == list(range(112, 120))
    assert found["loss"] == found["gradient_norms"]["block_00/attn/query/kernel"] == "nan"
    skipped = [
        event["step"] for event in metrics_log.read(folder)[1] if event["event"] == "skipped_update"
    ]
    assert skipped == [11, 12, 13, 14, 15]

    # Nothing was applied: what was saved since is what there was before.
    assert saved_states.steps(folder) == [10, 15]
    before, after = (checkpointer.load_params(folder, step)[0] for step in (10, 15))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@pytest.mark.slow
def test_row29_the_best_checkpoint_is_kept(home, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, float("nan"), 2.5, float("nan"), 2.4, 2.6, 2.3])
    monkeypatch.setattr(eval_loop, "measured", lambda *args, **facts: {"loss": next(losses)})
    flags = "--config.eval_every=5", "--config.keep=1"
    run_here(home, tmp_path / "run", *flags, monkeypatch=monkeypatch)
    assert saved_states.steps(tmp_path / "run") == [10, 40]


@pytest.mark.slow
def test_row12_a_run_goes_on_with_another_number_of_devices(home, tmp_path, straight, abstract):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    for step in saved_states.steps(folder):
        if step > 10:
            shutil.rmtree(folder / "checkpoints" / str(step))
    done = run(home, folder, "--config.mesh.data=8", devices=8)
    assert done.returncode == 0, done.stderr
    assert "mesh.data: -1 -> 8" in done.stdout and "resuming at step 10 of 40" in done.stdout
    for ours, theirs in zip(history(folder), history(straight), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    ours, theirs = (final_state(path, abstract).params for path in (folder, straight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


@pytest.mark.slow
def test_row23_a_report_without_room_is_written_by_the_next_start(home, tmp_path, monkeypatch):
    folder, flags = tmp_path / "run", ["--config.total=5 steps", "--config.eval_every=0"]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="done and saved"):
        patch.setattr(run_report, "summarize", full)
        run_here(home, folder, *flags, monkeypatch=monkeypatch)
    assert saved_states.steps(folder) == [5] and status(folder)["exit_code"] == 4
    run_here(home, folder, *flags, monkeypatch=monkeypatch)
    assert status(folder)["exit_code"] == 0 and (folder / "report.html").exists()
