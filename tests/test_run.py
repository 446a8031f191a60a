"""Whole runs in processes of their own: killed, stopped, repeated, refused.

All share one small config and one cache, so that after the first a start takes seconds. A driver
wraps a function of fmjax where something has to happen at an exact moment; the code under test has
no hooks.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import saved_states
from common import CACHE, ROOT

from fmjax import checkpoint, logs, setup, sharding, step_folders, workdir
from fmjax import config as configs

TOTAL = 40
KEEP_ALL = "--config.keep=99"
# configs/mlm.py with a tiny model, dropout, a small corpus, and everything more often.
CONFIG = f"""
from configs import mlm

def get_config():
    config = mlm.get_config()
    config.total = "{TOTAL} steps"
    config.batch_size = 8
    config.precision = "float32"
    config.data.update(name="text", train="text.txt", seq_len=32)
    config.tokenizer.vocab_size = 300
    config.model.update(variant="tiny", width=32, mlp=64, max_len=32)
    config.model.update(dropout=0.1, attention_dropout=0.1)
    config.optim.lr = 1e-3
    config.optim.args.eps = 1e-3  # so that rounding noise is not scaled up to a step of size lr
    config.log_every, config.save_every, config.eval_every = 5, 5, 20
    config.tensorboard = False
    return config
"""
DRIVER = """
import importlib, itertools, os, runpy, signal, sys, time

def before(module, name, act, call=1):
    module = importlib.import_module(module)
    original, calls = getattr(module, name), itertools.count(1)
    def wrapped(*args, **kwargs):
        if next(calls) == call:
            act()
        return original(*args, **kwargs)
    setattr(module, name, wrapped)

def sigterm(times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # or the kernel may deliver two as one

{patch}
runpy.run_path({run!r}, run_name="__main__")
"""


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The folder where commands are typed: a config and its corpus."""
    home = tmp_path_factory.mktemp("runs")
    (home / "small.py").write_text(CONFIG)
    write_corpus(home, seed=0)
    return home


@pytest.fixture(scope="session")
def straight(home):
    """A run that nothing happened to, with all its checkpoints."""
    folder = home / "straight"
    done = run(home, folder, KEEP_ALL)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


@pytest.fixture(scope="session")
def abstract(home, straight):
    """The training state's shapes, to read checkpoints with."""
    mesh = sharding.make_mesh()
    config = configs.load(str(straight / "config.json"), [f"--config.data.train={home}/text.txt"])
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMJAX_CACHE", str(CACHE))
        return setup.setup(config, mesh).abstract


def write_corpus(folder: Path, seed: int) -> None:
    """400 documents of two-syllable words."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.sample(syllables, 2)) for _ in range(200)]
    documents = [" ".join(rng.choices(words, k=rng.randint(10, 40))) for _ in range(400)]
    (folder / "text.txt").write_text("\n\n".join(documents))


def start(home: Path, folder: Path | str, *flags: str, patch="", devices=1) -> subprocess.Popen:
    """`python run.py` typed in `home`, with `patch` done to fmjax before."""
    program = ROOT / "run.py"
    command = ["-c", DRIVER.format(patch=patch, run=str(program))] if patch else [str(program)]
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *command, "--config=small.py", f"--workdir={folder}", *flags],
        cwd=home,
        env=os.environ | {"FMJAX_CACHE": str(CACHE), "XLA_FLAGS": xla, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return ended(start(*args, **kwargs))


def wait(process: subprocess.Popen, happened) -> None:
    """Until `happened()`, or the process has ended."""
    while process.poll() is None and not happened():
        time.sleep(0.002)


def reached(folder: Path, step: int) -> bool:
    return any(row["step"] >= step for row in logs.read(folder)[0])


def saving(folder: Path) -> bool:
    directory = folder / "checkpoints"
    there = {path.name for path in directory.glob("[0-9]*")}
    return bool(there - set(map(str, step_folders.finished(directory))))


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def final_state(folder: Path, abstract):
    saver = checkpoint.Checkpointer(folder)
    try:
        state, meta = saver.restore(abstract)
    finally:
        saver.close()
    assert meta["step"] == int(state.step) == TOTAL
    return state


def digest(state) -> str:
    """sha256 over the names and bytes of step, parameters, optimizer state and random key."""
    found = hashlib.sha256()
    state = state.replace(rng=jax.random.key_data(state.rng))
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} ".encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def history(folder: Path) -> list[dict]:
    """The metrics of a run without what depends on the clock and the machine."""
    rows, _ = logs.read(folder)
    machine = ("perf/", "memory/", "time", "spent")
    return [{k: v for k, v in row.items() if not k.startswith(machine)} for row in rows]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock.json")
    return {str(path): path.read_bytes() for path in files}


def assert_same_end(folder: Path, straight: Path, abstract) -> None:
    """The same bits in the state, and every logged line once, with the same numbers."""
    assert digest(final_state(folder, abstract)) == digest(final_state(straight, abstract))
    assert history(folder) == history(straight)
    assert status(folder)["state"] == "done" and (folder / "report.html").exists()


def test_a_straight_run_logs_each_line_once(straight):
    steps = [(row["step"], "validation/loss" in row) for row in history(straight)]
    expected = [(step, False) for step in range(5, TOTAL + 1, 5)] + [(20, True), (40, True)]
    assert steps == sorted(expected)
    assert status(straight)["step"] == TOTAL and status(straight)["exit_code"] == 0


def test_a_run_killed_five_times_ends_bit_identical(home, tmp_path, straight, abstract):
    folder, rng = tmp_path / "run", random.Random(0)
    kills = [  # (what to wait for, most seconds to wait after it)
        (lambda: True, 4.0),  # start-up: imports, data, compilation
        (lambda: reached(folder, 5), 0.3),
        (lambda: reached(folder, 10) and saving(folder), 0.05),
        (lambda: reached(folder, 15) and saving(folder), 0.2),
        (lambda: reached(folder, 25), 0.1),
    ]
    for happened, most in kills:
        process = start(home, folder)
        wait(process, happened)
        time.sleep(rng.uniform(0, most))
        process.kill()
        assert ended(process).returncode == -signal.SIGKILL
    done = run(home, folder)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert_same_end(folder, straight, abstract)


def test_a_run_stopped_at_every_moment_ends_bit_identical(home, tmp_path, straight, abstract):
    folder = tmp_path / "run"
    # A cache of its own, so that there is data to prepare.
    cache = f"--config.data.cache={tmp_path}/cache"
    moments = [  # (the call to interrupt, the step that is then reached)
        ('before("fmjax.data.store", "tokenise", sigterm)', [0]),
        ('before("fmjax.flops", "count", sigterm)', [0]),  # part of compilation
        ('before("fmjax.manifest", "write", lambda: sigterm(times=3))', range(5, 11)),  # a save
        ('before("fmjax.evaluate", "evaluate", sigterm)', [20]),
        ("", range(25, 40)),  # from outside
        ('before("fmjax.evaluate", "evaluate", sigterm)', [40]),
    ]
    step = 0
    for patch, steps in moments:
        process = start(home, folder, cache, patch=patch)
        if not patch:
            wait(process, lambda: reached(folder, 25))
            process.send_signal(signal.SIGTERM)
        done, resumed = ended(process), f"resuming at step {step} of {TOTAL}"
        assert done.returncode == 75, f"{patch}: {done.stderr}"
        assert status(folder)["state"] == "preempted" and status(folder)["exit_code"] == 75
        assert (resumed in done.stdout) == (step > 0)
        *notices, error = done.stderr.splitlines()
        assert set(notices) == {"SIGTERM: finishing the step, then saving"}
        assert "stopped by SIGTERM" in error and "the same command goes on" in error
        step = status(folder)["step"]
        assert step in steps, patch
        assert step == 0 or step in saved_states.steps(folder) and f"after step {step}," in error
    done = run(home, folder, cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_end(folder, straight, abstract)


def test_a_finished_run_is_left_as_it_is(home, straight):
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


def test_a_second_process_is_refused_and_told_who_works_there(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    with workdir.open(tmp_path, configs.load("small.py")):
        before = contents(tmp_path)
        done = run(home, tmp_path)
        assert contents(tmp_path) == before
    assert done.returncode == 2 and done.stdout == ""
    assert f"in use (host {os.uname().nodename}, pid {os.getpid()}" in done.stderr


def test_another_config_is_refused_with_the_difference(home, straight):
    before = contents(straight)
    done = run(home, straight, "--config.optim.lr=0.5")
    assert done.returncode == 2 and "optim.lr: 0.001 -> 0.5" in done.stderr
    assert contents(straight) == before


def test_other_data_under_the_same_name_are_refused(home, straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    shutil.copy(home / "small.py", tmp_path)
    write_corpus(tmp_path, seed=1)
    kept = contents(folder / "tokenizer") | contents(folder / "checkpoints")
    done = run(tmp_path, folder)
    assert done.returncode == 5 and "its data differ" in done.stderr
    assert kept.items() <= contents(folder).items()
    assert status(folder)["state"] == "failed" and status(folder)["exit_code"] == 5


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(home):
    done = run(home, "/dev/null/run")
    assert done.returncode == 4 and done.stdout == ""
    assert "/dev/null/run cannot be written" in done.stderr


def test_a_loss_that_is_not_finite_ends_the_run(home, tmp_path):
    patch = """
import jax.numpy as jnp
from fmjax import objectives
original = objectives.metrics

def poisoned(*args, train):
    found = original(*args, train=train)
    bad = jnp.where(train & jnp.any(args[3]["index"] >= 80), jnp.nan, 1.0)
    return {name: (value * bad, weight) for name, (value, weight) in found.items()}

objectives.metrics = poisoned
"""
    folder = tmp_path / "run"
    done = run(home, folder, "--config.max_skipped=5", patch=patch)
    assert done.returncode == 3, done.stderr
    assert status(folder)["state"] == "failed" and status(folder)["exit_code"] == 3

    (dump,) = (folder / "dumps").iterdir()
    assert str(dump) in done.stderr
    found = json.loads(dump.read_text())
    assert (dump.name, found["step"]) == ("step_15.json", 15)
    assert found["examples"] == list(range(112, 120))
    assert found["loss"] == found["gradient_norms"]["block_00/attn/query/kernel"] == "nan"
    skipped = [
        event["step"] for event in logs.read(folder)[1] if event["event"] == "skipped_update"
    ]
    assert skipped == [11, 12, 13, 14, 15]

    # Nothing was applied: what was saved since is what there was before.
    assert saved_states.steps(folder) == [10, 15]
    before, after = (checkpoint.load_params(folder, step)[0] for step in (10, 15))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_the_best_checkpoint_is_kept(home, tmp_path):
    patch = """
from fmjax import evaluate
losses = iter([3.0, 2.0, float("nan"), 2.5, float("nan"), 2.4, 2.6, 2.3])
evaluate.evaluate = lambda *args: {"loss": next(losses)}
"""
    done = run(home, tmp_path, "--config.eval_every=5", "--config.keep=1", patch=patch)
    assert done.returncode == 0, done.stderr
    assert saved_states.steps(tmp_path) == [10, 40]


def test_a_run_goes_on_with_another_number_of_devices(home, tmp_path, straight, abstract):
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
