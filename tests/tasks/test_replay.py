"""A step done again is the step that was done."""

import json
import shutil

import numpy as np
import pytest
from common import ROOT
from test_finetune import encoder, files, home  # noqa: F401

from fmjax.config import load as configs
from fmjax.errors import CheckpointError, ConfigError, DataError
from fmjax.tasks import replay, train

WORDS = ["log_every=1", "save_every=3", "keep=9", "keep_best=0", "tensorboard=False", "total=8"]


def again(folder, step, *words):
    given = [f"--config.folder={folder}", f"--config.step={step}", *words]
    replay.run(configs.load(f"{ROOT}/configs/replay.py", given), folder)
    return json.loads((folder / f"dumps/replay_{step}.json").read_text())


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay") / "run"
    words = [f"--config.{word}" for word in WORDS]
    train.run(configs.load(f"{ROOT}/configs/mlm.py:tiny", words), folder)
    return folder


@pytest.fixture(scope="module")
def tuned(home, encoder, tmp_path_factory):  # noqa: F811
    """A run over a frozen base, with the dropout that needs the seeds of each example."""
    folder = tmp_path_factory.mktemp("replay") / "tuned"
    own = [*WORDS, "batch_size=8", "data.seq_len=24", "model.dropout=0.1"]
    words = [*files(home), f"--config.init={encoder}", *(f"--config.{word}" for word in own)]
    train.run(configs.load(f"{ROOT}/configs/finetune_lora.py", words), folder)
    return folder


@pytest.mark.parametrize(("step", "start"), [(1, 0), (4, 3), (8, 6)])
@pytest.mark.slow
def test_the_loss_and_the_gradient_are_those_of_the_log(pretrained, step, start):
    found, row = again(pretrained, step), logged(pretrained)[step]
    assert found["checkpoint"] == start
    assert found["loss"] == row["train/loss"]
    assert found["grad_norm"] == row["optim/grad_norm"]


def test_losses_of_examples_make_the_loss(pretrained):
    found = again(pretrained, 5)
    weights = [len(one["targets"]) for one in found["examples"]]
    values = [one["mlm/loss"] for one in found["examples"]]
    assert np.average(values, weights=weights) == pytest.approx(found["loss"], rel=1e-5)
    assert [one["index"] for one in found["examples"]] == list(range(32, 40))
    assert all("[MASK]" in one["seen"] and one["seen"] != one["text"] for one in found["examples"])


def test_norms_of_layers_make_the_norm(pretrained):
    found = again(pretrained, 5)
    squares = sum(one["gradient"] ** 2 for one in found["layers"].values())
    assert squares**0.5 == pytest.approx(found["grad_norm"], rel=1e-5)
    assert all(one["update"] > 0 and one["parameter"] > 0 for one in found["layers"].values())


@pytest.mark.slow
def test_what_is_frozen_comes_from_beside_the_checkpoints(tuned):
    found, row = again(tuned, 5), logged(tuned)[5]
    assert found["checkpoint"] == 3
    assert found["loss"] == row["train/loss"] and found["grad_norm"] == row["optim/grad_norm"]
    values = [one["classify/loss"] for one in found["examples"]]
    assert np.mean(values) == pytest.approx(found["loss"], rel=1e-5)  # each with its own dropout
    assert all("lora_" in name or name.startswith("head/") for name in found["layers"])
    assert {"label", "text"} <= found["examples"][0].keys()


def test_it_prints_the_worst_examples_and_all_layers(pretrained, capsys):
    found = again(pretrained, 2, "--config.top_k=2")
    out = capsys.readouterr().out
    worst = max(found["examples"], key=lambda one: one["mlm/loss"])
    assert out.count("\nexample ") == 2 and f"example {worst['index']}: mlm/loss" in out
    assert "block_00" in out and "step 2, from the checkpoint of step 0" in out


def test_what_is_no_step_or_no_run_is_refused(pretrained, tmp_path):
    for step in (0, 9):
        with pytest.raises(ConfigError, match="the run has the steps 1 to 8"):
            again(pretrained, step)
    with pytest.raises(ConfigError, match="not a run folder"):
        again(tmp_path, 1)


def test_a_damaged_checkpoint_is_refused(pretrained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pretrained, copy)
    file = max((copy / "checkpoints/6/state").rglob("*"), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        again(copy, 8)
    assert (copy / "checkpoints/6").exists()  # left as it is


def test_what_is_not_finite_is_the_worst():
    each = [{"loss": 3.0}, {"loss": float("nan")}, {"loss": None}]
    assert [replay._height(one, ["loss"]) for one in each] == [3.0, float("inf"), 0.0]


def test_other_data_are_refused(pretrained, tmp_path):
    copy = shutil.copytree(pretrained, tmp_path / "copy")
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"data_digest": "other"}))
    with pytest.raises(DataError, match="data with the digest other"):
        again(copy, 2)
