"""The config of a run folder: compared with config.json, else with the newest checkpoint."""

import json
from pathlib import Path

import pytest
import runs
from ml_collections import ConfigDict

from fmjax.config import load as configs
from fmjax.errors import CheckpointError, ConfigError, DataError
from fmjax.io import manifest, run_config, workdir

pytest_plugins = ["runs"]


def config(**changes):
    section = {"name": "bert", "dropout": 0.1, "depth": None}
    return ConfigDict({"seed": 0, "log_every": 10, "model": section} | changes).lock()


def write_checkpoint(folder: Path, saved: ConfigDict, step=5) -> None:
    """A finished step that says which config it was made by."""
    meta = folder / "checkpoints" / str(step) / "meta" / "metadata"
    meta.parent.mkdir(parents=True)
    own = {"format": 1, "step": step, "metrics": {}, "arrays": {}}
    meta.write_text(json.dumps(own | {"config": configs.flatten(configs.redact(saved))}))
    manifest.write(meta.parent.parent)


def finish(path, config, log=print):
    with workdir.open(path, config, log=log) as folder:
        folder.update(step=5)


LOST = [None, b"", b"{", b"[]", b'{"seed": "\xff"}', b"[" * 100_000]


@pytest.mark.parametrize("content", LOST)
def test_row28_without_config_json_the_checkpoint_is_compared(tmp_path, content):
    finish(tmp_path, config())
    write_checkpoint(tmp_path, config())
    file = tmp_path / "config.json"
    file.unlink() if content is None else file.write_bytes(content)
    for _ in range(2):  # A refused start leaves nothing that the next one would take for the run's.
        with pytest.raises(ConfigError, match=r"another config \(seed: 0 -> 1\).*--workdir"):
            workdir.check(tmp_path, config(seed=1))
        with pytest.raises(ConfigError, match=r"another config \(seed: 0 -> 1\).*--workdir"):
            finish(tmp_path, config(seed=1))
    said = []
    finish(tmp_path, config(log_every=3), said.append)
    assert said[0].startswith(f"{file} {'is missing' if content is None else 'cannot be read'}")
    assert said[0].endswith(": compared with checkpoint 5")
    assert said[1:] == ["continuing with changed settings: log_every: 10 -> 3"]
    assert configs.load(str(file)).log_every == 3


def test_a_flipped_bit_in_a_name_makes_no_other_run(tmp_path):
    finish(tmp_path, config())
    file, right = tmp_path / "config.json", (tmp_path / "config.json").read_text()
    file.write_text(right.replace('"seed"', '"seee"'))
    write_checkpoint(tmp_path, config())
    with pytest.raises(ConfigError, match=r"another config \(.*seee"):
        workdir.check(tmp_path, config(seed=1))
    workdir.check(tmp_path, config())
    said = []
    finish(tmp_path, config(), said.append)
    assert said == [f"{file} is not of this run: compared with checkpoint 5"]
    assert file.read_text() == right


def test_a_forgotten_override_of_a_fine_tune_is_another_run(tmp_path):
    """The model of its checkpoint is not compared, since it is that of the base."""
    model = {"name": "init", "dropout": 0.1}
    finish(tmp_path, config(model=model))
    write_checkpoint(tmp_path, config(model=model | {"name": "bert"}))
    with pytest.raises(ConfigError, match=r"another config \(model.dropout: 0.1 -> None"):
        workdir.check(tmp_path, config(model={"name": "init", "dropout": None}))


def test_a_changed_checkpoint_is_no_witness(tmp_path):
    finish(tmp_path, config())
    write_checkpoint(tmp_path, config())
    (tmp_path / "config.json").unlink()
    meta = tmp_path / "checkpoints" / "5" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        finish(tmp_path, config(seed=1))


def test_what_a_run_took_from_its_base_is_compared_with_what_the_config_says():
    saved = config(model={"name": "bert", "dropout": 0.1, "depth": 12, "width": 64})
    meta = {"config": configs.flatten(saved)}
    named = {"name": "init", "dropout": 0.1, "depth": None}
    assert run_config.changes_since(meta, config(model=named)) == []
    wrong = run_config.changes_since(meta, config(model=named | {"dropout": 0.2}))
    assert wrong == [("model.dropout", 0.1, 0.2)]


def test_row28_the_checkpoint_is_compared_whatever_config_json_says(home, tmp_path, monkeypatch):
    """Somebody has put another run's config.json there."""
    runs.run_here(home, tmp_path, "--config.total=2 steps", monkeypatch=monkeypatch)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"lr": 0.001', '"lr": 0.5'))
    with pytest.raises(ConfigError, match="optim.lr: 0.001 -> 0.5"):
        other = ["--config.total=2 steps", "--config.optim.lr=0.5"]
        runs.run_here(home, tmp_path, *other, monkeypatch=monkeypatch)


# ---- A folder in which nothing has been trained --------------------------------------------


def fail(path, config, log=print, files=()):
    with pytest.raises(DataError):
        with workdir.open(path, config, log=log) as folder:
            for name, text in files:
                (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
                (folder.path / name).write_text(text)
            raise DataError("typo.txt: no such file")


BEGUN = [
    ("tokenizer/vocab.txt", "a"),
    ("checkpoints/frozen/MANIFEST.json", "{}"),
    ("metrics.jsonl", '{"event": "start", "step": 0, "time": 1.0}\n'),
    ("arms/0/config.json", "{}"),
]


@pytest.mark.parametrize("files", [[], BEGUN])
def test_a_run_that_failed_before_its_first_step_gives_way(tmp_path, files):
    fail(tmp_path, config(), files=files)
    (tmp_path / "notes.txt").write_text("mine")
    said = []
    fail(tmp_path, config(seed=1), said.append)
    assert said == [f"{tmp_path} holds no step of a run yet: starting over (seed: 0 -> 1)"]
    left = {item.name for item in tmp_path.iterdir()}
    assert left == {"notes.txt", "lock.json", "config.json", "status.json"}
    assert configs.load(str(tmp_path / "config.json")).seed == 1


@pytest.mark.parametrize(
    "name, text",
    [
        ("checkpoints/5/state", ""),
        ("checkpoints/5.corrupt/state", ""),
        ("metrics.jsonl", '{"step": 1, "time": 1.0, "train/loss": 2.0}\n'),
        ("metrics.jsonl", '{"stdp": 1, "time": 1.0, "train/loss": 2.0}\n'),
        ("dumps/step_3.json", "{}"),
        ("arms/0/summary.json", "{}"),
        ("status.json", '{"step": 3, "checkpoint": 0}'),
    ],
)
def test_a_run_of_which_anything_is_left_does_not(tmp_path, name, text):
    fail(tmp_path, config())
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="holds a run with another config"):
        finish(tmp_path, config(seed=1))
    assert (tmp_path / name).exists()


def test_an_arm_that_another_process_continues_does_not_give_way(tmp_path):
    fail(tmp_path, config())
    with workdir.open(tmp_path / "arms" / "0", config()):
        with pytest.raises(ConfigError, match="arms/0 is in use"):
            finish(tmp_path, config(seed=1))


@pytest.mark.parametrize("status", ["[]", '{"state": "done"}', '{"step": "x", "checkpoint": 0}'])
def test_a_damaged_status_is_none(tmp_path, status):
    finish(tmp_path, config())
    (tmp_path / "status.json").write_text(status)
    with workdir.open(tmp_path, config()) as folder:
        assert folder.previous == {} and folder.step == 0
