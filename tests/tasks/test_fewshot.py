"""Questions to models: what is asked, what counts as right, and the whole task."""

import gzip
import json

import numpy as np
import pytest
from common import ROOT

from fmjax.config import load as configs
from fmjax.errors import ConfigError, DataError
from fmjax.evaluation import benchmarks, multiple_choice, scoring
from fmjax.evaluation.loglikelihood import Likely
from fmjax.evaluation.multiple_choice import Found, Item
from fmjax.tasks import fewshot, train


def found(nats, tokens=None, text=None, greedy=False):
    n = len(nats)
    return Found(tuple(nats), tuple(tokens or (1,) * n), tuple(text or (1,) * n), (greedy,) * n)


def test_the_likeliest_choice_is_taken_by_sum_by_token_and_by_byte():
    one = found([4.0, 6.0, 5.0], tokens=[1, 3, 2], text=[8, 11, 20])
    assert [one.choice(norm) for norm in multiple_choice.NORMS[:3]] == [0, 1, 2]


def test_means_have_errors_intervals_and_groups():
    items = [Item("", ("a", "b"), 0, group) for group in "xxyy"]
    right, wrong = found([1.0, 2.0]), found([2.0, 1.0])
    told = multiple_choice.metrics(items, [right, right, right, wrong])["accuracy"]
    assert told["mean"] == 0.75 and told["items"] == 4
    assert told["error"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert told["groups"] == {"x": 1.0, "y": 0.5}
    low, high = told["interval"]
    assert 0 <= low < 0.75 < high <= 1
    alone = multiple_choice.metrics([Item("a", (" b",), 0)] * 2, [found([1.5], greedy=True)] * 2)
    assert alone["accuracy"]["mean"] == 1 and alone["nats"]["mean"] == 1.5
    with pytest.raises(ConfigError, match="one choice"):
        multiple_choice.metrics([items[0], Item("a", ("b",), 0)], [right, found([1.0])])


def test_the_space_before_a_choice_belongs_to_it():
    words = lambda text, add_special_tokens: {"input_ids": [len(w) for w in text.split(" ")]}
    encode = multiple_choice.encoder(words)
    assert encode("aaa bb ", "c") == encode("aaa bb", " c") == ([3, 2], [1])


def test_each_choice_is_judged_behind_its_context():
    asked = []

    def scorer(pairs):
        asked.extend(pairs)
        return [Likely(float(len(said)), False, len(said)) for _, said in pairs]

    encode = lambda context, said: ([context], list(said))
    items = [Item("p", ("abc", "d"), 1), Item("q", ("é",), 0)]
    first, second = multiple_choice.judged(scorer, encode, items)
    assert asked == [(["p"], ["a", "b", "c"]), (["p"], ["d"]), (["q"], ["é"])]
    assert first.nats == (3.0, 1.0) and first.choice("sum") == 1 and second.bytes == (2,)


def test_the_space_that_joins_a_choice_to_its_context_is_none_of_its_bytes():
    """4 nats of "cat" are 1.33 a byte, 6 of "house" 1.2; with the space 1.0 and 1.0."""
    nats = {" cat": 4.0, " house": 6.0}
    items = [Item("q", tuple(nats), 1)]
    scorer = lambda pairs: [Likely(nats[said], False, 1) for _, said in pairs]
    (told,) = multiple_choice.judged(scorer, lambda context, said: (context, said), items)
    assert told.bytes == (3, 5) and told.choice("byte") == 1 and told.choice("sum") == 0


def test_a_gain_is_over_what_is_said_anyway():
    """Behind nothing " no" is likelier by 3 nats, behind the question by 2 alone: " yes" gained."""
    nats = {("q", " no"): 1.0, ("q", " yes"): 3.0, ("", " no"): 2.0, ("", " yes"): 5.0}
    asked = []

    def scorer(pairs):
        asked.extend(pairs)
        return [Likely(nats[pair], False, 1) for pair in pairs]

    items = [Item("q", (" no", " yes"), 1, bare="-"), Item("q", (" no", " yes"), 0, bare="-")]
    told = multiple_choice.judged(scorer, lambda context, said: (context.strip("-"), said), items)
    assert len(asked) == 4  # each pair once
    assert [one.choice("sum") for one in told] == [0, 0]
    assert [one.choice("gain") for one in told] == [1, 1]
    means = multiple_choice.metrics(items, told)
    assert means["accuracy_by_gain"]["mean"] == means["accuracy"]["mean"] == 0.5
    assert "accuracy_by_gain" not in multiple_choice.metrics(
        [Item("", ("a", "b"), 0)], [found([1.0, 2.0])]
    )


def test_examples_are_others_than_what_is_asked_and_more_go_on_with_fewer():
    items = [Item(f"q{i}", (" a", " b"), i % 2) for i in range(6)]
    one, three = (scoring.with_shots(items, items, k, seed=0) for k in (1, 3))
    for i, (short, long) in enumerate(zip(one, three, strict=True)):
        parts = long.context.split("\n\n")
        assert (
            len(parts) == 4 and parts[-1] == f"q{i}" and short.context.split("\n\n")[0] == parts[0]
        )
        assert f"q{i} {'ab'[i % 2]}" not in parts[:3]
        assert all(part[3:] == "ab"[int(part[1]) % 2] for part in parts[:3])
    assert scoring.with_shots(items, items, 1, seed=1) != one
    with pytest.raises(ConfigError, match="give a file of more"):
        scoring.with_shots(items, items, 6, seed=0)


ROWS = {
    "blimp": dict(sentence_good="It is.", sentence_bad="It are.", UID="agreement"),
    "lambada": dict(text="He went to the shop"),
    "hellaswag": dict(ctx="He", endings=["sits.", "runs."], label="1"),
    "choices": dict(context="1 + 1 =", choices=[" 2", " 3"], label=0),
}


def test_files_become_items(tmp_path):
    (tmp_path / "b").mkdir()
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    read = lambda name, **how: benchmarks.items(name, tmp_path / f"{name}.jsonl", **how)
    assert read("blimp")[0] == Item("", ("It is.", "It are."), 0, "agreement")
    assert read("lambada", limit=1) == [Item("He went to the", (" shop",), 0)]
    assert read("hellaswag")[1] == Item("He", (" sits.", " runs."), 1)
    with gzip.open(tmp_path / "b" / "one.jsonl.gz", "wt") as file:
        file.write(json.dumps(ROWS["blimp"]))
    assert len(benchmarks.items("blimp", tmp_path / "b")) == 1


@pytest.mark.parametrize(
    "row, words",
    [
        ("{}", "is no row of 'choices' .no 'context'"),
        ("[1", "not a JSON object .*Expecting"),
        ("[1]", "not a JSON object .*a JSON list"),
        ("[" * 100_000, "not a JSON object .*nested too deeply"),
        ('{"context": "a", "choices": ["b"], "label": 1e400}', "the label inf is no whole number"),
        ('{"context": "a", "choices": ["b"], "label": Infinity}', "label inf is no whole number"),
        ('{"context": "a", "choices": ["b", "c"], "label": 0.5}', "label 0.5 is no whole number"),
        ('{"context": "a", "choices": ["b"], "label": 1%s}' % ("0" * 400), "label 10.* of 1 choic"),
        (
            '{"context": "a", "choices": ["b"], "label": %s}' % ("9" * 5000),
            "not a JSON object .*digits",
        ),
        ('{"context": "a", "choices": "bc", "label": 0}', "choices is str, not a list"),
        ('{"context": "a", "choices": ["\\ud800"], "label": 0}', "lone surrogate at character 0"),
        ('{"context": "a", "choices": ["b"], "label": 1}', "label 1 of 1 choices"),
        ('{"context": "a", "choices": ["b", ""], "label": 0}', "choices of something"),
        ('{"context": 1, "choices": ["b"], "label": 0}', "a context and its choices are texts"),
    ],
)
def test_rows_that_are_no_items_are_named(tmp_path, row, words):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(ROWS["choices"]) + "\n" + row)
    with pytest.raises(DataError, match=f"bad.jsonl:2.*{words}") as error:
        benchmarks.items("choices", file)
    assert len(str(error.value)) < 500 + len(str(file)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["clm", "mlm"])
@pytest.mark.slow
def test_a_run_is_asked_and_its_folder_keeps_the_answers(tmp_path, name, capsys):
    words = ["--config.total=2", "--config.log_every=2", "--config.ledger=()"]
    train.run(configs.load(f"{ROOT}/configs/{name}.py:tiny", words), tmp_path / "run")
    for kind in ROWS:
        rows = [json.dumps(ROWS[kind])] * 3
        if kind == "choices":
            rows = [json.dumps(ROWS[kind] | dict(context=f"{i} + 1 =")) for i in range(3)]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(rows))
        words = [f"--config.folder={tmp_path / 'run'}", f"--config.benchmark.name={kind}"]
        words += [f"--config.benchmark.path={tmp_path / kind}.jsonl", "--config.batch_size=4"]
        if kind == "choices":
            words += ["--config.shots=(0, 2)"]
            words += [f"--config.benchmark.examples={tmp_path / kind}.jsonl"]
        fewshot.run(configs.load(f"{ROOT}/configs/fewshot.py", words), tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "run" / fewshot.FILE).read_text().splitlines()]
    assert [(x["benchmark"]["name"], x["shots"]) for x in lines] == [
        ("blimp", 0), ("lambada", 0), ("hellaswag", 0), ("choices", 0), ("choices", 2),
    ]  # fmt: skip
    for line in lines:
        assert line["metrics"]["accuracy"]["items"] == 3
        assert np.isfinite(line["metrics"]["accuracy"]["mean"])
    assert lines[0]["metrics"]["accuracy"]["groups"].keys() == {"agreement"}
    assert "examples before each" in capsys.readouterr().out


def test_no_file_is_named():
    with pytest.raises(ConfigError, match="config.benchmark.path='x'"):
        benchmarks.items("blimp", "x")


def test_classes_in_words_leave_what_a_sweep_compares(tmp_path, capsys):
    words = ["--config.total=2", "--config.log_every=2", "--config.ledger=()"]
    train.run(configs.load(f"{ROOT}/configs/clm.py:tiny", words), tmp_path / "run")
    rows = [f"text {i}\t{'ab'[i % 2]}" for i in range(12)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (tmp_path / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows[:5]]) + "\n")
    words = [f"--config.folder={tmp_path / 'run'}", "--config.benchmark.name=classes"]
    words += [f"--config.data.train={tmp_path / 'train.tsv'}", "--config.data.columns=sentence"]
    words += [f"--config.data.validation={tmp_path / 'dev.tsv'}", "--config.batch_size=4"]
    load = lambda *more: configs.load(f"{ROOT}/configs/fewshot.py", [*words, *more])
    template = r"--config.templates=('{sentence}', 'Say {sentence}:')"
    fewshot.run(load(template, "--config.shots=(0, 2)"), tmp_path / "several")
    assert capsys.readouterr().out.count("examples before each") == 4
    assert not (tmp_path / "several" / "summary.json").exists()
    one = (template.replace(", 'Say {sentence}:'", ","), "--config.shots=(2,)")
    for norm in ("sum", "gain"):
        own = f"--config.norm={norm}", "--config.words=('bad', 'good')"
        fewshot.run(load(*one, *own), tmp_path / norm)
        summary = json.loads((tmp_path / norm / "summary.json").read_text())
        examples = np.load(tmp_path / norm / "examples.npz")
        assert examples["label"].tolist() == [0, 1, 0, 1, 0]
        assert examples["label"].dtype == np.int32  # else a sweep takes them for others
        accuracy = summary["metrics"]["validation/classify/accuracy"]
        assert accuracy == examples["classify/accuracy"].mean()
        name = "accuracy" if norm == "sum" else "accuracy_by_gain"
        assert accuracy == summary["all_metrics"][name]["mean"]
        assert summary["trainable_parameters"] == 0 and summary["shots"] == 2
    few = load(*one, "--config.benchmark.limit=2")
    fewshot.run(few, tmp_path / "few")  # rows 0 and 2 of five
    assert np.load(tmp_path / "few" / "examples.npz")["label"].tolist() == [0, 0]
    with pytest.raises(ConfigError, match="needs config.templates"):
        fewshot.run(load(), tmp_path / "none")
    with pytest.raises(ConfigError, match="3 words, 3 different ones, for 2 classes: a, b"):
        fewshot.run(load(*one, "--config.words=('x', 'y', 'z')"), tmp_path / "none")
    with pytest.raises(ConfigError, match="mean nothing to 'blimp'"):
        fewshot.run(load(template, "--config.benchmark.name=blimp"), tmp_path / "none")
