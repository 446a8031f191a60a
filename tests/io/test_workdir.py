"""One folder, one run, one process: and never anybody else's files."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from ml_collections import ConfigDict

from fmjax.errors import CheckpointError, ConfigError, NumericsError, Preempted, ResourceError
from fmjax.io import atomic, workdir


def config(**changes):
    return ConfigDict({"seed": 0, "log_every": 10, "hub_token": "abc"} | changes).lock()


def status(path):
    return json.loads((path / "status.json").read_text())


def finish(path, **options):
    with workdir.open(path, config(), **options) as folder:
        folder.update(step=5)


# ---- status.json ---------------------------------------------------------------------------


def test_a_new_run_records_its_config_and_how_it_ended(tmp_path):
    path = tmp_path / "runs" / "a"
    with workdir.open(path, config()) as folder:
        assert folder.path == path and folder.previous == {} and folder.step == 0
        assert status(path)["state"] == "running" and status(path)["exit_code"] is None
        folder.update(step=3, loss=1.5)
        assert (status(path)["step"], status(path)["loss"]) == (3, 1.5)
    assert status(path).items() >= {"state": "done", "step": 3, "exit_code": 0}.items()
    saved = json.loads((path / "config.json").read_text())
    assert saved == {"seed": 0, "log_every": 10, "hub_token": "***"}


@pytest.mark.parametrize(
    "error, state, code",
    [
        (Preempted("SIGTERM"), "preempted", 75),
        (NumericsError("loss is nan"), "failed", 3),
        (KeyError("bug"), "failed", 1),
        (KeyboardInterrupt(), "failed", 130),
    ],
)
def test_an_error_is_recorded_and_passed_on(tmp_path, error, state, code):
    with pytest.raises(type(error)) as caught, workdir.open(tmp_path, config()) as folder:
        folder.update(step=2)
        raise error
    assert caught.value is error
    assert status(tmp_path).items() >= {"state": state, "step": 2, "exit_code": code}.items()
    assert type(error).__name__ in status(tmp_path)["reason"]


def test_row16_out_of_memory_says_what_to_change_and_exits_6(tmp_path):
    with pytest.raises(ResourceError, match="batch_size.*accumulate.*remat.*mesh") as caught:
        with workdir.open(tmp_path, config()):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\n...")
    assert "allocating 99 bytes" in str(caught.value) and "\n" not in str(caught.value)
    assert status(tmp_path)["exit_code"] == 6


def test_a_full_disk_is_not_taken_for_memory():
    with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"), workdir.memory_errors():
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")


def test_a_continued_run_starts_from_the_recorded_step(tmp_path, capsys):
    with pytest.raises(Preempted), workdir.open(tmp_path, config()) as folder:
        folder.update(step=4)
        raise Preempted
    with workdir.open(tmp_path, config()) as folder:
        assert folder.previous["state"] == "preempted" and folder.step == 4
    assert capsys.readouterr().out == ""


def test_looking_at_a_finished_run_changes_no_file(tmp_path, monkeypatch):
    finish(tmp_path)
    monkeypatch.setattr(workdir, "_now", lambda: "2099-01-01T00:00:00+0000")
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    with workdir.open(tmp_path, config()) as folder:
        assert folder.previous["state"] == "done"
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


def test_a_finished_run_that_goes_on_is_recorded_anew(tmp_path):
    finish(tmp_path)
    with workdir.open(tmp_path, config()) as folder:
        folder.update(step=6)
    assert status(tmp_path)["step"] == 6


def test_a_status_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with workdir.open(tmp_path, config()) as folder:
        monkeypatch.setattr(os, "replace", full)
        folder.update(step=1)
    assert status(tmp_path)["state"] == "running"


def test_a_reader_never_sees_a_part(tmp_path, monkeypatch):
    file = tmp_path / "status.json"
    atomic.write_atomic(file, "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(CheckpointError, match="status.json cannot be written"):
        atomic.write_atomic(file, "new")
    assert file.read_text() == "old\n"


# ---- config.json ---------------------------------------------------------------------------


def test_row28_another_config_is_refused_with_the_difference(tmp_path):
    finish(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"\(seed: 0 -> 1\).*--workdir.*--fresh"):
        workdir.check(tmp_path, config(seed=1, log_every=3))
    with pytest.raises(ConfigError, match="seed: 0 -> 1"), workdir.open(tmp_path, config(seed=1)):
        raise AssertionError
    assert (tmp_path / "config.json").read_bytes() == before
    assert status(tmp_path)["state"] == "done"


def test_row28_settings_that_do_not_change_the_numbers_may_change(tmp_path):
    said = []
    finish(tmp_path, log=said.append)
    assert said == []
    with workdir.open(tmp_path, config(log_every=3, hub_token="x"), log=said.append):
        pass
    assert said == ["continuing with changed settings: log_every: 10 -> 3"]
    assert json.loads((tmp_path / "config.json").read_text())["log_every"] == 3


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_config_is_never_taken_for_a_new_run(tmp_path, content):
    finish(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json cannot be read.*--fresh"):
        finish(tmp_path)
    finish(tmp_path, fresh=True)


def test_fresh_removes_what_fmjax_wrote_and_nothing_else(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("mine")
    path = tmp_path / "run"
    finish(path)
    (path / "checkpoints" / "5").mkdir(parents=True)
    (path / "tokenizer").symlink_to(elsewhere)
    (path / "metrics.jsonl").write_text("{}")
    (path / "notes.txt").write_text("mine")
    with workdir.open(path, config(seed=1), fresh=True) as folder:
        assert folder.previous == {} and folder.step == 0
        left = {item.name for item in path.iterdir()}
        assert left == {"notes.txt", "lock.json", "config.json", "status.json"}
    assert (elsewhere / "weights").read_text() == "mine"


def test_fresh_refuses_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds no run.*nothing was removed"):
        finish(tmp_path, fresh=True)
    assert {item.name for item in tmp_path.iterdir()} == {"checkpoints", "thesis.tex"}


def test_fresh_starts_an_empty_or_missing_folder(tmp_path):
    finish(tmp_path, fresh=True)
    finish(tmp_path / "new", fresh=True)
    assert status(tmp_path / "new")["state"] == "done"


# ---- access --------------------------------------------------------------------------------


def test_row15_a_second_run_is_refused_at_once_and_told_who_is_here(tmp_path):
    with workdir.open(tmp_path, config()):
        start = time.monotonic()
        with pytest.raises(ConfigError, match=f"in use .*pid {os.getpid()}, start 2"):
            finish(tmp_path)
        assert time.monotonic() - start < 2
        assert status(tmp_path)["state"] == "running"
    finish(tmp_path)


def test_fresh_leaves_an_arm_alone_in_which_somebody_works(tmp_path):
    finish(tmp_path)
    with workdir.open(tmp_path / "arms" / "1", config()):
        with pytest.raises(ConfigError, match="arms/1 is in use"):
            finish(tmp_path, fresh=True)
        assert (tmp_path / "arms" / "1" / "config.json").exists()
    finish(tmp_path, fresh=True)
    assert not (tmp_path / "arms").exists()


HOLD = """
import sys, time
from ml_collections import ConfigDict
from fmjax.io import workdir
with workdir.open(sys.argv[1], ConfigDict({"seed": 0, "log_every": 10, "hub_token": "abc"})):
    print("open", flush=True)
    time.sleep(60)
"""


def test_row15_the_lock_of_a_killed_run_is_stale(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match=f"pid {holder.pid},"):
            finish(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    said = []
    finish(tmp_path, log=said.append)
    assert len(said) == 1 and f"pid {holder.pid}" in said[0] and "did not end by itself" in said[0]
    finish(tmp_path, log=said.append)
    assert len(said) == 1


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    said = []
    finish(tmp_path, log=said.append)
    assert len(said) == 1 and "no locks" in said[0]


def test_other_processes_neither_look_nor_lock_nor_write(tmp_path):
    """They know what process 0 has found, and are refused where it is."""
    others = dict(writes=False, first=lambda call: {"state": "done", "step": 4, "exit_code": 0})
    with workdir.open(tmp_path, config()):
        with workdir.open(tmp_path, config(seed=1), **others) as folder:
            assert folder.step == 4 and folder.finished
            folder.update(step=9)
        assert status(tmp_path).items() >= {"state": "running", "step": 0}.items()

    def refuse(call):
        raise ConfigError("process 0 of 2: in use")

    with pytest.raises(ConfigError, match="process 0 of 2"):
        with workdir.open(tmp_path / "other", config(), writes=False, first=refuse):
            raise AssertionError
    assert not (tmp_path / "other").exists()


def test_row24_a_folder_that_cannot_be_made_or_written_is_an_error_of_its_own(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        finish(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written.*--workdir"):
        finish(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_row24_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        finish(tmp_path)


def test_row23_a_status_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    folder = workdir.Folder(tmp_path, {}, None, writes=True)
    with monkeypatch.context() as patch:
        patch.setattr(workdir.os, "fsync", full)
        for step in (1, 2):
            folder.update(step=step)
    assert capsys.readouterr().err.count("status.json cannot be written") == 1
    folder.update(step=3)
    assert '"step": 3' in (tmp_path / "status.json").read_text()
