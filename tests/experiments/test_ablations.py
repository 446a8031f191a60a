"""The shipped ablations: their trials, and some of them run on a small encoder."""

import json

import numpy as np
import pytest
from common import ROOT
from test_finetune import encoder, files, home  # noqa: F401

from fmjax.config import load as configs
from fmjax.experiments import sweep_results, trials

DEPTH = f"{ROOT}/configs/ablations/depth.py"


def test_the_trials_of_depth(tmp_path):
    words = ["--config.init=some/base", "--config.data.train=some.tsv"]
    found = list(trials.walk(f"{DEPTH}:depth=6,steps=7", words, tmp_path))
    methods = [trial.settings["arg"].partition(",")[0] for trial in found]
    last = [f"last{layers}" for layers in (5, 4, 3, 2, 1)]
    probes = ["words", "features"]
    assert methods == ["full", *last, "head", *probes, "lora", "houlsby", "bitfit", "prompt"]
    for method, trial in zip(methods, found, strict=True):
        config = trial.config
        assert config.init == "some/base" and config.data.train == "some.tsv"
        assert config.data.seq_len == 128
        if method in probes:
            assert config.task == "probe" and config.folder == config.init
            continue
        assert config.task == "train" and config.total == 7 and config.batch_size == 32
        assert config.arms == (("seed", (0, 1, 2)),)
        assert configs.load(f"{DEPTH}:{method},depth=6,steps=7", words) == config
    assert "block_(-1|-2|-3)" in dict(zip(methods, found, strict=True))["last3"].config.groups[0][0]


@pytest.mark.slow
def test_trials_of_depth_run_and_are_compared(home, encoder, tmp_path, capsys):  # noqa: F811
    words = [*files(home), f"--config.init={encoder}", "--config.data.seq_len=12"]
    spec = f"{DEPTH}:tiny,steps=3,seeds=2"
    for number in ("1", "4"):
        trials.start(spec, words, number, tmp_path)
    told = {t.number: trials.read(tmp_path, t) for t in trials.walk(spec, words, tmp_path)}
    assert {number for number, record in told.items() if record} == {1, 4}
    assert [result["arm"] for result in told[1]["results"]] == [{"seed": 0}, {"seed": 1}]
    assert [result["seed"] for result in told[4]["results"]] == [None]
    lines = capsys.readouterr().out.splitlines()
    start = max(i for i, line in enumerate(lines) if "less full" in line)
    shown = [line.split()[:2] for line in lines[start + 1 : start + 3]]
    assert shown == [["full", "2"], ["words", "1"]]
    assert "2 of 9 trials have ended" in lines[-2]


@pytest.mark.slow
def test_all_trials_of_depth_run(home, encoder, tmp_path):  # noqa: F811
    words = [*files(home), f"--config.init={encoder}", "--config.data.seq_len=12"]
    words.append("--config.ledger=('slices',)")  # no room for a prompt before pretraining's rows
    trials.start(f"{DEPTH}:tiny,steps=2,seeds=2", words, "all", tmp_path)
    assert len(list(tmp_path.glob("*-*.json"))) == 9


def test_the_trials_of_pretraining(tmp_path):
    spec = f"{ROOT}/configs/ablations/pretraining.py:more=books+minilm,seeds=2"
    found = list(trials.walk(spec, (), tmp_path))
    assert len(found) == 4 * 5
    of = {base: [t.config for t in found if f"base={base}," in t.settings["arg"]] for base in BASES}
    docs = of["docs"][0].init
    assert {c.init for c in of["scratch"]} == {""} and docs.startswith("runs/mlm-")
    assert {c.tokenizer.name for c in of["scratch"]} == {f"{docs}/tokenizer"}
    assert {c.model.variant for c in of["scratch"]} == {"modernbert_tiny"}
    assert {c.init for c in of["books"]} == {"runs/books"}
    assert {c.init for c in of["minilm"]} == {"runs/minilm"}
    for each in of.values():
        assert [c.data.examples for c in each] == [16, 64, 256, 1024, 3000]
        assert {(c.total, c.batch_size, c.arms) for c in each} == {(200, 16, (("seed", (0, 1)),))}


BASES = ("scratch", "docs", "books", "minilm")


def test_the_trials_of_masking():
    """Each recipe, and then each of its encoders that has not failed, fine-tuned."""
    spec = f"{ROOT}/configs/ablations/masking.py"
    sweep = configs.sweep(spec)
    told = next(sweep)
    first = []
    while told["group"] not in first:
        first.append(told["group"])
        trial = configs.load(f"{spec}:{told['arg']}")
        assert trial.objectives.mlm.validation == configs.load(spec).objectives.mlm.validation
        assert trial.total == "7T flops" and trial.arms == (("seed", (0, 1, 2)),)
        failed = "diverged" if told["group"] == "span" else ""
        results = [dict(seed=s, folder=f"arms/{s}", failed=failed) for s in (0, 1)]
        told = sweep.send({"folder": f"there/{told['group']}", "results": results})
    assert first == ["rate15", "rate30", "rate40", "rate15-all", "rate30-all", "rate40-all"] + [
        "word",
        "span",
        "nsp",
        "sop",
    ]
    second = [told, *sweep]
    assert len(second) == 2 * 9 and "span" not in {one["group"] for one in second}
    assert second[1]["init"] == "there/rate15/arms/1" and second[1]["seed"] == 1
    tuned = configs.load(f"{spec}:{second[1]['arg']}")
    assert tuned.total == 200 and list(tuned.objectives) == ["classify"]


@pytest.mark.slow
def test_recipes_of_masking_pretrain_and_are_tuned(tmp_path, monkeypatch):
    spec = f"{ROOT}/configs/ablations/masking.py:only=rate15+sop,flops=20G,steps=2,seeds=2"
    trials.start(spec, ("--config.log_every=1",), "all", tmp_path)
    trials_of = json.loads((tmp_path / "sweep.json").read_text())["trials"]
    names = [one["name"] for one in trials_of]
    ended = [(name, json.loads((tmp_path / f"{name}.json").read_text())) for name in names]
    assert len(names) == 2 + 4 and {record["state"] for _, record in ended} == {"done"}
    families = dict(sweep_results.families(ended, tmp_path))
    assert list(families) == ["validation/mlm/loss", "validation/classify/accuracy"]
    for groups in families.values():
        assert [group.name for group in groups] == ["rate15", "sop"]
        assert all(list(group.results) == [0, 1] for group in groups)


def test_a_search_is_told_of_each_trial_and_goes_on_the_same_way():
    pytest.importorskip("optuna", reason="pip install optuna")

    def search(count):
        sweep, asked = configs.sweep(f"{ROOT}/configs/ablations/search.py:trials={count}"), []
        told = next(sweep)
        while told:
            asked.append(told)
            failed = len(asked) % 5 == 0
            # The best rate is 1e-3, the decay is of no account.
            value = -abs(np.log10(told["optim.lr"]) + 3)
            results = [{"metrics": {"validation/classify/accuracy": value}}]
            record = (
                dict(state="failed", results=[]) if failed else dict(state="done", results=results)
            )
            try:
                told = sweep.send(record)
            except StopIteration:
                return asked

    many = search(30)
    assert search(12) == many[:12] and len(many) == 30
    away = [abs(np.log10(one["optim.lr"]) + 3) for one in many]
    assert np.mean(away[-10:]) < np.mean(away[:10])
    assert configs.load(f"{ROOT}/configs/ablations/search.py").arms == ()
