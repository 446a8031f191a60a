"""The frozen prefix, computed once an example: the same numbers for the cost of what trains."""

import json
import os

import numpy as np
import pytest
from test_finetune import both_ways, decoder, encoder, files, home, load  # noqa: F401

from fmjax.data.token_rows import TokenRows
from fmjax.errors import ConfigError, DataError
from fmjax.io import metrics_log
from fmjax.io.mapped import MappedFiles
from fmjax.params import sharding
from fmjax.tasks import train
from fmjax.training import flops, setup

LAST = "(('block_-1/.*|head/.*', 'train'), ('.*', 'freeze'))"
SECOND = "(('block_01/.*|head/.*', 'train'), ('.*', 'freeze'))"
HEAD = "(('head/.*', 'train'), ('.*', 'freeze'))"
STILL = ["--config.model.dropout=0.0", "--config.model.attention_dropout=0.0"]


def config_of(home, encoder, groups, *words):  # noqa: F811
    words = [*files(home), f"--config.init={encoder}", f"--config.groups={groups}", *words]
    return load("finetune.py", *words, "--config.total=12", "--config.optim.lr=3e-3")


@pytest.mark.parametrize(
    "groups, base",
    [
        (LAST, "encoder"),
        pytest.param(HEAD, "encoder", marks=pytest.mark.slow),
        pytest.param(LAST, "decoder", marks=pytest.mark.slow),
        pytest.param(SECOND, "both_ways", marks=pytest.mark.slow),
    ],
)
def test_losses_are_the_same_with_and_without(home, request, groups, base, tmp_path):  # noqa: F811
    base, found, shown = request.getfixturevalue(base), {}, {}
    for cached in (False, True):
        config = config_of(home, base, groups, *STILL, f"--config.cache_prefix={cached}")
        train.run(config, tmp_path / str(cached))
        rows, _ = metrics_log.read(tmp_path / str(cached))
        keys = ("train/loss", "optim/grad_norm", "validation/loss", "validation/classify/accuracy")
        found[cached] = [[row[key] for key in keys if key in row] for row in rows]
        shown[cached] = (tmp_path / str(cached) / "predictions.json").read_text()
    assert len(found[True]) == len(found[False]) > 6
    for one, other in zip(found[True], found[False], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert [shown[True].count(key) for key in ("text", "said")] == [5, 5]
    texts = [[one["text"] for one in json.loads(each)] for each in shown.values()]
    assert texts[0] == texts[1]


def test_a_step_costs_only_what_lies_behind_the_prefix(home, encoder):  # noqa: F811
    mesh = sharding.make_mesh()
    run = setup.setup(config_of(home, encoder, LAST, *STILL), mesh)
    assert run.model.cfg.depth == 2
    whole = flops.of_step(run, setup.batch_spec(run))
    spec = setup.batch_spec(run)
    states = spec["input_ids"].shape, run.model.cfg.width
    spec["input_ids"] = spec["segment_ids"].update(shape=(*states[0], states[1]), dtype="float32")
    behind = flops.of_step(run._replace(model=run.model.clone(start=1)), spec)
    layer = flops.of_step(run._replace(model=run.model.clone(stop=1)), setup.batch_spec(run))
    head = flops.of_step(run._replace(model=run.model.clone(start=2)), spec)
    # Frozen, a layer costs its forward pass.
    assert whole - behind == layer - head


@pytest.mark.slow
def test_a_damaged_cache_is_made_again_and_a_second_run_reads_it(home, encoder, tmp_path, capsys):  # noqa: F811
    words = [*STILL, "--config.cache_prefix=True", f"--config.data.cache={tmp_path}/cache"]
    config = config_of(home, encoder, LAST, *words)
    said = "1 frozen layers: 64 of 64"
    train.run(config, tmp_path / "one")
    first = json.loads((tmp_path / "one" / "summary.json").read_text())["metrics"]
    capsys.readouterr()
    train.run(config, tmp_path / "two")
    assert said not in capsys.readouterr().out
    for file in (tmp_path / "cache").glob("prefix-*/states"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    train.run(config, tmp_path / "three")
    assert "is damaged" in capsys.readouterr().out
    last = json.loads((tmp_path / "three" / "summary.json").read_text())["metrics"]
    assert first["validation/loss"] == last["validation/loss"]


def test_states_are_those_of_their_row_in_any_order(tmp_path):
    from fmjax.training.feature_cache import PrefixSplit

    class Split(TokenRows):
        seq_len, tokens = 3, 5

        def extent(self, index):
            return np.array([0, 2])[index], np.array([2, 5])[index]

        def rows(self, index, examples=None, seed=0):
            real = np.array([[1, 1, 0], [1, 1, 1]])[index]
            return {"input_ids": real, "segment_ids": real}

    states = np.arange(10, dtype=np.float32).reshape(5, 2)
    (tmp_path / "states").write_bytes(states.tobytes())
    os.utime(tmp_path / "states", (0, 0))
    split = PrefixSplit(Split(), MappedFiles(tmp_path), np.float32, 2)
    rows = split.rows(np.array([1, 0]))["input_ids"]
    np.testing.assert_array_equal(rows[0], states[2:])
    np.testing.assert_array_equal(rows[1], [[0, 1], [2, 3], [0, 0]])
    trimmed = split.trim({"input_ids": rows, "segment_ids": np.ones((2, 3))}, 2)
    assert trimmed["input_ids"].shape == (2, 2, 2)
    with (tmp_path / "states").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="states has been changed while it was read"):
        split.rows(np.array([1, 0]))
    split = PrefixSplit(Split(), MappedFiles(tmp_path), np.float32, 2)
    os.truncate(tmp_path / "states", 0)  # beyond its end the process would die of reading it
    with pytest.raises(DataError, match="states has been changed while it was read"):
        split.rows(np.array([1, 0]))


@pytest.mark.parametrize(
    "groups, words, said",
    [
        (LAST, [], "config.model.dropout is 0.1: set it to 0.0"),
        ("(('.*', 'train'),)", STILL, "trains the embeddings or the first layer"),
        ("(('embed/.*|head/.*', 'train'), ('.*', 'freeze'))", STILL, "trains the embeddings or"),
    ],
)
def test_a_prefix_that_cannot_be_kept_is_refused(home, encoder, groups, words, said, tmp_path):  # noqa: F811
    config = config_of(home, encoder, groups, *words, "--config.cache_prefix=True")
    with pytest.raises(ConfigError, match=said):
        train.run(config, tmp_path / "run")
