"""Damaged and unfinished checkpoints. What `row02` in a name means is in faults/test_table.py."""

import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from saved_states import (
    abstract,
    array_file,
    assert_equal,
    flip,
    make_state,
    problems,
    save,
    step_folder,
    steps,
)

from fmjax.checkpoints.checkpointer import Checkpointer, load_params
from fmjax.errors import CheckpointError
from fmjax.io import retention


@pytest.fixture
def ckpt(tmp_path):
    with contextlib.closing(Checkpointer(tmp_path)) as ckpt:
        yield ckpt


def test_row02_sigkill_between_the_arrays_and_the_manifest(tmp_path, ckpt, caplog):
    """Step 1 is whole; the process dies when step 2 has its arrays and not its manifest."""
    script = f"""
import os, signal, jax.numpy as jnp
from fmjax.checkpoints import checkpointer
from fmjax.io import manifest
ckpt = checkpointer.Checkpointer({str(tmp_path)!r})
ckpt.save(1, dict(w=jnp.full((4,), 1.0)), dict()); ckpt.wait()
manifest.write = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
ckpt.save(2, dict(w=jnp.full((4,), 2.0)), dict()); ckpt.wait()
"""
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == -signal.SIGKILL
    assert (step_folder(tmp_path, 2) / "commit_success.txt").exists()
    with caplog.at_level(logging.WARNING):
        state, meta = ckpt.restore(abstract({"w": jnp.zeros(4)}))
    assert meta["step"] == 1
    np.testing.assert_array_equal(state["w"], [1.0, 1.0, 1.0, 1.0])
    assert [r.message for r in caplog.records if r.name.startswith("fmjax")] == [
        f"{tmp_path / 'checkpoints'}: ignoring unfinished steps [2]"
    ]
    ckpt.save(3, {"w": jnp.zeros(4)}, {})
    ckpt.wait()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "3"]


def test_row03_kill_while_deleting_leaves_an_unfinished_step(ckpt, monkeypatch, tmp_path):
    save(ckpt, 1, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
    retention.remove(step_folder(tmp_path, 1))
    assert steps(tmp_path) == [2] and array_file(step_folder(tmp_path, 1)).exists()


def test_row18_flipped_bit_falls_back_and_quarantines(ckpt, tmp_path, caplog):
    save(ckpt, 1, 2)
    damaged = array_file(step_folder(tmp_path, 2))
    flip(damaged, 8 * (damaged.stat().st_size // 2))
    with pytest.raises(CheckpointError, match=f"{damaged.name}: its bytes have changed"):
        ckpt.restore(abstract(make_state()), step=2)
    assert steps(tmp_path) == [1, 2]  # an explicit request changes nothing
    with caplog.at_level(logging.ERROR):
        state, meta = ckpt.restore(abstract(make_state()))
    assert meta["step"] == 1
    assert_equal(state, make_state(1))
    assert "IS DAMAGED, kept as 2.corrupt" in caplog.text and damaged.name in caplog.text
    save(ckpt, 2)
    flip(array_file(step_folder(tmp_path, 2)), 0)
    assert ckpt.restore(abstract(make_state()))[1]["step"] == 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2.corrupt", "2.corrupt.2"]


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_row18_every_flipped_bit_is_found(ckpt, tmp_path, count):
    """Over all files of a step, the manifest included; then the step before is used. And no whole
    step is called damaged."""
    save(ckpt, 1, 2)
    newest = lambda: retention.newest(tmp_path / "checkpoints", quarantine=False)
    files = [path for path in step_folder(tmp_path, 2).rglob("*") if path.is_file()]
    assert len(files) > 10
    rng = random.Random(0)
    for trial in range(count):
        path = files[trial % len(files)]
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        found = problems(tmp_path, 2)
        name = path.relative_to(step_folder(tmp_path, 2))
        assert len(found) == 1 and found[0].startswith(f"{name}: "), (path, bit, found)
        assert newest() == 1
        flip(path, bit)
        assert newest() == 2


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), r"\d+ bytes, \d+ were written"),
        (lambda path: os.truncate(path, 0), r"0 bytes, \d+ were written"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["truncated", "empty", "deleted"],
)
def test_row19_damaged_array_file(ckpt, tmp_path, caplog, damage, text):
    save(ckpt, 1, 2)
    path = array_file(step_folder(tmp_path, 2))
    damage(path)
    with pytest.raises(CheckpointError, match=f"{path.name}: {text}"):
        ckpt.restore(abstract(make_state()), step=2)
    assert_equal(ckpt.restore(abstract(make_state()))[0], make_state(1))
    assert path.name in caplog.text and (tmp_path / "checkpoints" / "2.corrupt").is_dir()


def test_row20_stray_files_and_empty_folders_are_ignored(ckpt, tmp_path):
    save(ckpt, 1)
    step_folder(tmp_path, 7).mkdir()
    for name in ("9", ".DS_Store", "1/.DS_Store", "notes.txt"):
        (tmp_path / "checkpoints" / name).write_text("stray")
    assert ckpt.restore(abstract(make_state()))[1]["step"] == 1
    assert steps(tmp_path) == [1] and step_folder(tmp_path, 7).is_dir()  # not called damaged
    save(ckpt, 7, 9)
    assert steps(tmp_path) == [7, 9]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\x00", b'{"format": 1}', None])
def test_row21_damaged_manifest(ckpt, tmp_path, caplog, content):
    save(ckpt, 1, 2)
    path = step_folder(tmp_path, 2) / "MANIFEST.json"
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    assert ckpt.restore(abstract(make_state()))[1]["step"] == 1
    assert "MANIFEST.json" in caplog.text and (tmp_path / "checkpoints" / "2.corrupt").is_dir()


def test_row22_all_damaged_never_starts_from_zero(ckpt, tmp_path):
    save(ckpt, 1, 2)
    for step in (1, 2):
        flip(array_file(step_folder(tmp_path, step)), 5)
    for _ in range(2):  # the second start finds only quarantined folders
        with pytest.raises(CheckpointError, match="all are damaged.*--fresh") as caught:
            ckpt.restore(abstract(make_state()))
        assert caught.value.exit_code == 4
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1.corrupt", "2.corrupt"]
    with pytest.raises(CheckpointError, match="no finished step 2. There are: none"):
        ckpt.restore(abstract(make_state()), step=2)


def test_load_params_passes_over_damage_and_changes_nothing(ckpt, tmp_path, caplog):
    save(ckpt, 1, 2)
    flip(array_file(step_folder(tmp_path, 2)), 3)
    assert load_params(tmp_path)[1]["step"] == 1
    assert "IS DAMAGED" in caplog.text
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    with pytest.raises(CheckpointError, match="is damaged"):
        load_params(tmp_path, 2)
