"""Storage that fails under a run, and checkpoints from the past."""

import contextlib
import json
import logging
import tarfile
from pathlib import Path

import jax
import pytest
import runs
import saved_states

from fmjax.checkpoints import checkpointer, pretrained
from fmjax.checkpoints.checkpointer import Checkpointer, load_params
from fmjax.errors import CheckpointError
from fmjax.io import retention

pytest_plugins = ["runs"]


def test_row23_a_disk_that_is_full_for_a_while_ends_no_run(home, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(checkpointer, "RETRY_SEC", 0.0)
    with caplog.at_level(logging.ERROR):
        runs.run_here(home, tmp_path, faults="io_error@10x2", monkeypatch=monkeypatch)
    said = [record.message for record in caplog.records if record.name.startswith("fmjax")]
    assert len(said) == 2 and all("No space left on device" in message for message in said)
    assert said[0].startswith("saving step 10 failed (1 of 3)") and "(2 of 3)" in said[1]
    assert runs.status(tmp_path)["state"] == "done"
    there = saved_states.steps(tmp_path)
    assert there[-2:] == [35, 40]
    assert not any(saved_states.problems(tmp_path, step) for step in there)


def test_row27_counts_and_digests_of_older_checkpoints_are_read(tmp_path):
    """A run of before data of any kind goes on counting, and its tokenizer is still checked."""
    facts = {"format": 1, "step": 3, "metrics": {}, "arrays": {}}
    (tmp_path / "meta").mkdir()
    file = tmp_path / "meta" / "metadata"
    file.write_text(json.dumps(facts | {"tokens": 640, "tokenizer": {"tokenizer.json": "ab"}}))
    found = retention.read_meta(tmp_path)
    assert found == facts | {"units": 640, "processors": {"tokenizer": {"tokenizer.json": "ab"}}}
    with pytest.raises(CheckpointError, match="tokenizer.json is not what it was"):
        pretrained.check_unchanged(tmp_path, found)


@pytest.mark.parametrize("number", range(1, checkpointer.manifest.FORMAT + 1))
def test_row27_every_format_there_was_can_be_read(tmp_path, number):
    """checkpoint_format_<number>.tar.gz holds step 3 of saved_states.py, kept when it was new."""
    stored = Path(__file__).with_name(f"checkpoint_format_{number}.tar.gz")
    with tarfile.open(stored) as archive:
        archive.extractall(tmp_path, filter="data")
    with contextlib.closing(Checkpointer(tmp_path)) as saver:
        state, meta = saver.restore(saved_states.abstract(saved_states.make_state()))
    saved_states.assert_equal(state, saved_states.make_state(3))
    assert (meta["format"], meta["step"], meta["position"]) == (number, 3, 3)
    saved_states.assert_equal(
        load_params(tmp_path)[0], jax.device_get(saved_states.make_state(3).params)
    )
