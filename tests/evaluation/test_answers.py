"""Answers that are written, and exams that are sat while a model is trained."""

import contextlib
import io
import json

import pytest
from common import ROOT

from fmjax.config import constraints
from fmjax.config import load as configs
from fmjax.errors import ConfigError
from fmjax.evaluation import exact_answer, multiple_choice
from fmjax.evaluation.multiple_choice import Item
from fmjax.tasks import fewshot, train


@pytest.mark.parametrize(
    "text, expected",
    [
        ("so 3 and 4 are 7.\n#### 18", "18"),
        ("#### 1,234 apples, of 2,000", "1234"),
        ("It is 5, no, -6.", "-6"),
        ("It costs $3.50", "3.5"),
        ("10-4 of (2)-3", "3"),
        ("#### .50 or #### -.5", "-0.5"),
        ("It costs $3.00.", "3"),
        ("none", ""),
        ("####", ""),
    ],
)
def test_the_number_that_a_text_comes_to(text, expected):
    assert exact_answer.number(text) == expected


def test_what_counts_is_the_number():
    items = [Item("", (" 2 + 2 = 4 #### 4",), 0), Item("", (" no number",), 0)]
    means = lambda *texts: exact_answer.metrics(items, texts)["accuracy"]["mean"]
    assert means("It is 4", "") == 0.5 and means("44", "no") == 0
    assert means("4 #### 5", "") == 0
    assert (
        exact_answer.metrics(items, ["4", ""])["accuracy"].keys()
        == multiple_choice.mean([1, 0], "").keys()
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that sat two exams each time it was evaluated."""
    folder = tmp_path_factory.mktemp("exams")
    good = dict(sentence_good="It is.", sentence_bad="It are.", UID="agreement")
    (folder / "blimp.jsonl").write_text("\n".join([json.dumps(good)] * 3))
    (folder / "dev.tsv").write_text("sentence\tlabel\nfine\t1\nbad\t0\n")
    asked = {"name": "blimp", "path": str(folder / "blimp.jsonl"), "limit": 2}
    asked = (asked, {"name": "sst2", "path": str(folder / "dev.tsv")})
    words = ["ledger=()", "total=4", "eval_every=2", "log_every=2", f"benchmarks={asked!r}"]
    words.append("best=validation/blimp/accuracy")
    config = configs.load(f"{ROOT}/configs/clm.py:tiny", [f"--config.{word}" for word in words])
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        train.run(config, folder / "run")
    return folder, config, shown.getvalue()


@pytest.mark.slow
def test_exams_are_sat_with_each_evaluation(trained):
    folder, _, shown = trained
    lines = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {x["step"]: x for x in lines if "validation/blimp/accuracy" in x}
    assert sorted(found) == [2, 4]
    words = [f"--config.folder={folder / 'run'}", f"--config.benchmark.path={folder}/blimp.jsonl"]
    config = configs.load(f"{ROOT}/configs/fewshot.py", [*words, "--config.benchmark.limit=2"])
    fewshot.run(config, folder / "asked")
    (line,) = (folder / "run" / fewshot.FILE).read_text().splitlines()
    mean = json.loads(line)["metrics"]["accuracy"]["mean"]
    assert mean == found[4]["validation/blimp/accuracy"]
    assert found[4]["validation/sst2/accuracy"] in (0, 0.5, 1)
    assert f"\nvalidation/blimp/accuracy {mean:.4f}\n" in shown


def test_sums_in_words_are_answered(trained, capsys):
    folder, *_ = trained
    row = dict(question="What is 1 + 1?", answer="1 + 1 = 2\n#### 2")
    (folder / "gsm8k.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    words = [f"--config.folder={folder / 'run'}", f"--config.benchmark.path={folder}/gsm8k.jsonl"]
    words += ["--config.benchmark.name=gsm8k", "--config.length=4"]
    fewshot.run(configs.load(f"{ROOT}/configs/fewshot.py", words), folder / "sums")
    assert "of 3" in capsys.readouterr().out
    words[-1] = "--config.length=40"
    with pytest.raises(ConfigError, match="make one of them shorter, or set config.long='cut'"):
        fewshot.run(configs.load(f"{ROOT}/configs/fewshot.py", words), folder / "sums")


@pytest.mark.parametrize(
    "given, words",
    [
        ({"name": "blump"}, r"benchmarks.0..name='blump'.*Did you mean 'blimp'"),
        ({"name": "blimp", "paht": "x"}, "has 'paht'.*Did you mean 'path'"),
        ({"name": "blimp", "path": "nowhere"}, "no such file or folder"),
        ({"name": "blimp", "path": 3}, "path=3: no such file or folder"),
        ({"name": ["blimp"]}, "name=.'blimp'.* cannot be asked here"),
        ({"name": "blimp", "path": ".", "limit": "20"}, "limit='20': give a whole number"),
        ({"name": "gsm8k", "path": "x"}, "name='gsm8k' cannot be asked here"),
    ],
)
def test_exams_that_cannot_be_sat_are_refused_before_training(trained, given, words):
    folder, config, _ = trained
    config = config.copy_and_resolve_references()
    config.benchmarks = (given,)
    with pytest.raises(ConfigError, match=words):
        constraints.check(config.to_dict())
