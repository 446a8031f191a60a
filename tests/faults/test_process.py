"""The process and the machine under it."""

import functools
import random
import shutil
import signal
import time

import jax
import pytest
import runs
import saved_states

from fmjax.errors import ConfigError
from fmjax.io import metrics_log
from fmjax.params import sharding

pytest_plugins = ["runs"]


@pytest.mark.slow
def test_row01_row03_killed_forty_times_ends_bit_identical(home, tmp_path, abstract):
    """At every kind of moment, and at any; a save after each step lets every sitting get ahead."""
    flags = [f"--config.data.cache={tmp_path}/cache", "--config.total=200 steps"]
    flags += ["--config.eval_every=10"]
    straight, folder = tmp_path / "straight", tmp_path / "run"
    killed = functools.partial(runs.start, home, folder, *flags, "--config.save_every=1")
    done = runs.run(home, straight, *flags)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "cache")  # so that there is data to prepare
    rng = random.Random(0)
    places = ["compile", "data", "train", "evaluate", "save", "commit", "delete", "any", "any"]
    moments = [*places * 4, "any", "any"]
    rng.shuffle(moments)
    for place in ["prepare", "any", *moments]:
        before = saved_states.steps(folder)
        step = max(before, default=0) + rng.randint(0, 3)
        if place == "any":
            process = killed()
            kill_at_any_moment(process, folder, rng)
        else:
            first = place in ("prepare", "compile", "delete")  # which are about other steps
            process = killed(faults=f"kill:{place}" if first else f"kill@{step}:{place}")
        assert runs.ended(process).returncode == -signal.SIGKILL, place
        # Every step that is listed can be restored, and what was safe is not lost.
        there = saved_states.steps(folder)
        assert not any(saved_states.problems(folder, step) for step in there)
        assert max(there, default=0) >= max(before, default=0)
    done = runs.run(home, folder, *flags)
    assert done.returncode == 0, done.stderr
    runs.assert_same_end(folder, straight, abstract, total=200)


def kill_at_any_moment(process, folder, rng):
    """While it starts, or after it has written one to three lines."""
    lines, more = len(metrics_log.read(folder)[1]), rng.randrange(4)
    runs.wait(process, lambda: len(metrics_log.read(folder)[1]) >= lines + more)
    time.sleep(rng.uniform(0, 1.0 if more else 8.0))
    process.kill()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("mesh.data=3", r"'data': 3.* 8 devices.*\[1, 2, 4, 8\]"),
        ("mesh.tensor=5", r"'tensor': 5.* 8 devices.*\[1, 2, 4, 8\]"),
        ("batch_size=12", r"batch_size=12 .* 8 devices \(config.mesh.data .* multiple of 8"),
        ("accumulate=2", r"batch_size=8 .* 2 microbatches .* multiple of 16"),
    ],
)
def test_row13_a_layout_that_does_not_divide_is_refused_first(
    home, tmp_path, monkeypatch, wrong, message
):
    """Before data are prepared, let alone a step compiled."""
    cache = f"--config.data.cache={tmp_path}/cache"
    with pytest.raises(ConfigError, match=message):
        runs.run_here(home, tmp_path / "run", f"--config.{wrong}", cache, monkeypatch=monkeypatch)
    assert not (tmp_path / "cache").exists()


def test_row13_parameters_that_an_axis_does_not_divide_stay_whole():
    """30,522 words over 4 devices: the dimension is not cut, and that is no error."""
    mesh = sharding.make_mesh(data=2, tensor=4)
    words = jax.ShapeDtypeStruct((30522, 64), "float32")
    placed = sharding.shardings({"embed": {"token": {"embedding": words}}}, mesh)
    assert placed["embed"]["token"]["embedding"].shard_shape((30522, 64)) == (30522, 64)
