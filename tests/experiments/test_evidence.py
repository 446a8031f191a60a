"""Contracts: what a row of evidence says of the runs that it is made of, and when it is stale."""

import json
import re

import numpy as np
import pytest
from common import ROOT

from fmjax import dispatch
from fmjax.errors import Broken, ConfigError, NumericsError
from fmjax.experiments import evidence, sweep_results

FILE = """
import runpy
from fmjax.experiments import sweep

def get_config(arg=None):
    return runpy.run_path({path!r})["get_config"]("tiny")

def get_expected(arg=None):
    return [dict(
        metric="validation/loss", value={value}, tolerance=0.25, seeds={seeds}, budget=1,
        source="by hand", group={group!r}, given=("optim.lr",),
    )]
"""
SWEEP = "def get_sweep(): return sweep.product(sweep.grid('optim.lr', (1e-3, 2.0)), SEEDS)\n"
SEEDS = "SEEDS = sweep.grid('seed', (0, 1, 2))\n"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """written(value, …): a config file that expects it; rows go to a folder of the test."""
    monkeypatch.setattr(evidence, "FOLDER", tmp_path / "evidence")

    def write(value, body="", seeds=(0, 1, 2), group="", name="trying.py"):
        file = tmp_path / name
        given = dict(path=str(ROOT / "configs/mlm.py"), value=value, seeds=seeds, group=group)
        file.write_text(FILE.format(**given) + body)
        return str(file)

    return write


@pytest.fixture
def ran(monkeypatch):
    """In the place of a task: the loss is the rate and a tenth of the seed."""
    ran = []

    def start(config, folder, *, file, **flags):
        ran.append(config)
        if config.optim.lr > 100:
            raise NumericsError("not finite")
        arms = dict(config.arms).get("seed", [config.seed])
        for number, seed in enumerate(arms):
            own = folder / f"arms/{number}" if config.arms else folder
            own.mkdir(parents=True)
            metrics = {"validation/loss": config.optim.lr + seed / 10, "train/loss": 0.0}
            facts = {
                "data_digest": "d",
                "environment": {"fmjax": "0.1 abc", "jax": "1"},
                "seconds": 30.0,
            }
            facts |= {"trainable_parameters": 7}
            (own / "summary.json").write_text(json.dumps({"metrics": metrics, **facts}))

    monkeypatch.setattr(dispatch, "start", start)
    return ran


def row_of(spec):
    return json.loads(evidence.file_of(spec).read_text())


def test_a_row_says_what_the_seeds_came_to(written, ran, tmp_path, capsys):
    spec = written(0.25)
    evidence.verify(spec, ["--config.optim.lr=0.2"], tmp_path / "runs")
    row = row_of(spec)
    (one,) = row["expected"]
    assert one["values"] == pytest.approx([0.2, 0.3, 0.4]) and one["mean"] == pytest.approx(0.3)
    # Student's: 4.303 of the error of the mean, 0.1 / √3.
    assert one["interval"] == pytest.approx([0.3 - 0.2484, 0.3 + 0.2484], abs=1e-4)
    assert one["verdict"] == "kept" and row["failed"] == ""
    assert row["digests"]["data"] == ["d"] and row["environment"] == {
        "fmjax": "0.1 abc",
        "jax": "1",
    }
    assert row["digests"]["code"] == ["abc"]
    assert row["groups"] == {
        "the config": {
            "validation/loss": pytest.approx([0.2, 0.3, 0.4]),
            "gap": pytest.approx([0.2, 0.3, 0.4]),
            "trains": [7, 7, 7],
        }
    }
    assert len(ran) == 1 and ran[0].arms == (("seed", (0, 1, 2)),)
    assert "kept" in capsys.readouterr().out
    evidence.verify(spec, ["--config.optim.lr=0.2"], tmp_path / "runs")
    assert len(ran) == 1  # what is there already is not run again
    assert evidence.stale(spec) == ""


def test_what_does_not_come_to_it_is_broken(written, ran, tmp_path):
    spec = written(0.6)
    with pytest.raises(Broken, match=r"validation/loss is 0.3\d*, expected 0.6 within 0.2"):
        evidence.verify(spec, ["--config.optim.lr=0.2"], tmp_path / "runs")
    assert row_of(spec)["expected"][0]["verdict"] == "broken"
    assert "was not what is expected" in evidence.stale(spec)


def test_one_that_failed_is_broken_whatever_the_others_say(written, ran, tmp_path):
    body = SEEDS + SWEEP.replace("2.0", "200.0")
    spec = written(0.1, body, group="0.001")
    with pytest.raises(Broken, match="not finite"):
        evidence.verify(spec, (), tmp_path / "runs")
    assert row_of(spec)["failed"] == "not finite"


def test_what_takes_longer_is_late(written, ran, tmp_path, monkeypatch):
    kept = sweep_results.found
    slow = lambda *args: [one | {"seconds": 61.0} for one in kept(*args)]
    monkeypatch.setattr(sweep_results, "found", slow)
    spec = written(0.1)
    evidence.verify(spec, ["--config.optim.lr=0.0"], tmp_path / "runs")
    assert row_of(spec)["expected"][0]["verdict"] == "late"
    assert row_of(spec)["minutes"] == 1.0


def test_a_sweep_says_of_what_the_number_is(written, ran, tmp_path):
    spec = written(2.1, SEEDS + SWEEP, group="2.0")
    evidence.verify(spec, (), tmp_path / "runs")
    row = row_of(spec)
    assert row["expected"][0]["values"] == pytest.approx([2.0, 2.1, 2.2])
    assert list(row["groups"]) == ["0.001", "2.0"] and len(ran) == 6
    with pytest.raises(ConfigError, match="nothing has validation/loss in the group '3.0'.*2.0"):
        evidence.verify(written(2.1, SEEDS + SWEEP, group="3.0"), (), tmp_path / "runs")
    with pytest.raises(ConfigError, match="of a sweep say of which group"):
        evidence.verify(written(2.1, SEEDS + SWEEP), (), tmp_path / "runs")


def test_fewer_seeds_than_were_promised_keep_nothing(written, ran, tmp_path):
    spec = written(2.1, SEEDS + SWEEP, group="2.0", seeds=(0, 1, 2, 3))
    with pytest.raises(Broken):
        evidence.verify(spec, (), tmp_path / "runs")


def test_a_row_is_stale_once_the_config_or_what_it_expects_changes(written, ran, tmp_path):
    spec = written(0.1)
    assert evidence.stale(spec) == "trying.json is missing"
    evidence.verify(spec, (), tmp_path / "runs")
    assert evidence.stale(spec) == ""
    assert "another config" in evidence.stale(written(0.2))
    assert evidence.stale(written(0.1)) == ""
    text = (tmp_path / "trying.py").read_text()
    (tmp_path / "trying.py").write_text(text.replace('("tiny")', '("tiny,runlocal")'))
    assert "another config" in evidence.stale(spec)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("value=", "valeu="), "valeu.*expected a dict with metric, value"),
        (("tolerance=0.25", "tolerance=0"), "tolerance > 0"),
        (("source='by hand'", "source=''"), "source not empty"),
        (("    return [dict(", "    return []\n    return [dict("), "expected a list"),
        (("get_expected", "got_expected"), r"defines no get_expected\(arg=None\)"),
    ],
)
def test_what_is_no_expectation_is_refused(change, said, written, tmp_path):
    file = tmp_path / "trying.py"
    text = (written(0.1), file.read_text())[1].replace('"by hand"', "'by hand'")
    assert change[0] in text
    file.write_text(text.replace(*change))
    with pytest.raises(ConfigError, match=said):
        evidence.verify(str(file), (), tmp_path / "runs")


def test_paths_of_one_machine_are_shortened():
    word = "--config.data.train=/home/me/data/imdb/train.jsonl.gz"
    assert evidence._short(word) == "--config.data.train=…/train.jsonl.gz"
    assert evidence._short("x=/minilm y='/a/b'") == "x=…/minilm y='…/b'"
    for kept in ("--config.total=3 epochs", "--config.init=runs/big/arms/0", "a/b", "1/2"):
        assert evidence._short(kept) == kept


def test_another_config_is_no_evidence_of_this_one(written, ran, tmp_path):
    spec = written(0.1)
    with pytest.raises(ConfigError, match="total=7 would change its numbers.*only optim.lr"):
        evidence.verify(spec, ["--config.total=7"], tmp_path / "runs")
    evidence.verify(spec, ["--config.optim.lr=0.0", "--config.log_every=3"], tmp_path / "runs")
    assert len(ran) == 1
    evidence.verify(spec, ["--config.optim.lr=0.0"], tmp_path / "runs", fresh=True)
    assert len(ran) == 2


def test_a_sweep_that_is_told_of_its_trials_is_stale_with_its_file(written, ran, tmp_path):
    body = (
        "def get_sweep():\n    for seed in (0, 1, 2):\n        yield {'group': 'a', 'seed': seed}\n"
    )
    spec = written(0.1, body, group="a")
    evidence.verify(spec, (), tmp_path / "runs")
    assert row_of(spec)["expected"][0]["values"] == pytest.approx([0.003, 0.103, 0.203])
    assert evidence.stale(spec) == ""
    written(0.1, body.replace("(0, 1, 2)", "(0, 1, 3)"), group="a")
    assert "another config" in evidence.stale(spec)


def test_texts_are_made_from_rows(written, tmp_path):
    evidence.FOLDER.mkdir()
    told = {"validation/loss": [1.0, 2.0], "peak": [2**21], "validation/accuracy": [0.5]}
    row = {"groups": {"a": {}, "b c": told}}
    (evidence.FOLDER / "x.json").write_text(json.dumps(row))
    mark = lambda what, text: f"so <!-- evidence x {what} b c -->{text}<!-- --> it is"
    assert evidence.render(mark("validation/loss .2f", "old")) == mark(
        "validation/loss .2f", f"1.50 ± {np.sqrt(0.5):.2f}"
    )
    assert evidence.render(mark("validation/accuracy .1%", "")) == mark(
        "validation/accuracy .1%", "50.0 %"
    )
    assert evidence.render(mark("peak cost", "")) == mark("peak cost", "2 MiB")
    assert evidence.render("nothing <!-- else -->") == "nothing <!-- else -->"


# ---- the contracts of this project ----


def trains(spec):
    """Whether a config trains, by itself or in a sweep."""
    return evidence.configs.load(spec).task == "train"


ABLATIONS = [
    f"{ROOT}/configs/ablations/{name}"
    for name in (
        "depth.py:depth=6",
        "depth.py:tiny",
        "in_context.py",
        "masking.py",
        "pretraining.py",
        "pretraining.py:more=books+minilm",
    )
]
FILES = [file for folder in ("", "vision/") for file in (ROOT / "configs").glob(f"{folder}*.py")]
SPECS = [str(file) for file in sorted(FILES) if trains(str(file))]


@pytest.mark.parametrize("spec", SPECS + ABLATIONS, ids=lambda spec: spec.rpartition("/")[2])
def test_every_config_that_trains_has_come_to_what_it_says(spec):
    assert evidence.stale(spec) == ""


@pytest.mark.parametrize("file", ["README.md", "docs/results.md"])
def test_documents_are_made_of_the_rows(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.count("<!-- evidence ") > 2 and evidence.render(text) == text


def test_rows_name_no_machine():
    for file in evidence.FOLDER.glob("*.json"):
        assert not re.search(r"[\s='\"]/(?!\s)", file.read_text(encoding="utf-8")), file
