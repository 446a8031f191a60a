"""Files of sources: what is read, what a text is worth, and the whole task."""

import json

import pytest
from common import ROOT
from test_encoder_decoders import folder  # noqa: F401

from fmjax.config import load as configs
from fmjax.errors import ConfigError, DataError
from fmjax.tasks import translate


def rows(path, *given):
    path.write_text("\n".join(map(json.dumps, given)) + "\n\n")
    return str(path)


def load(*words):
    return configs.load(f"{ROOT}/configs/translate.py", [f"--config.{word}" for word in words])


def test_sources_are_joined_and_targets_are_references(tmp_path):
    file = rows(tmp_path / "a.jsonl", dict(s=["a", "b"], t=["c", "d"]), dict(s="e", t="f"))
    assert translate.read(file, "s", "t") == [("a b", ["c", "d"]), ("e", ["f"])]
    assert translate.read(file, "s", "", limit=1) == [("a b", [])]
    with pytest.raises(DataError, match="a.jsonl:1 has no column 'x', but .*'t'.*config.target"):
        translate.read(file, "s", "x")
    for wrong, words in (
        (1, "1 is neither"),
        ([], r"\[\] is neither"),
        ("\ud800", "lone surrogate"),
    ):
        with pytest.raises(DataError, match=f"a.jsonl:1: column 's': {words}"):
            translate.read(rows(tmp_path / "a.jsonl", dict(s=wrong, t="b")), "s", "t")
    (tmp_path / "a.jsonl").write_text('{"s": "a", "t": "b"}\n' + '{"s": ' + "[" * 100_000)
    with pytest.raises(DataError, match="a.jsonl:2: not a JSON object .*nested too deeply"):
        translate.read(str(tmp_path / "a.jsonl"), "s", "t")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="a.jsonl' has no row"):
        translate.read(str(tmp_path / "a.jsonl"), "s", "t")
    with pytest.raises(ConfigError, match="config.file='none'"):
        translate.read("none", "s", "t")


def test_what_scores_need_is_asked_for_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(translate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match="config.target asks for BLEU.*sacrebleu is not installed"
    ):
        translate.check_installed()


def test_scores_are_of_the_best_reference():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    text = "the cat sat on the mat"
    found = translate.scores([text, text], [["a dog", text], [text]])
    assert [found[name] for name in ("bleu", "chrf", *translate.ROUGE)] == [100.0] * 5
    # Unigrams: three of four, and of three; bigrams one of three, and of two.
    found = translate.scores(["a b c x"], [["a b c"]])
    assert found["rouge1"] == pytest.approx(200 * 3 / 7, abs=0.01)
    assert found["rouge2"] == pytest.approx(200 * 2 / 5, abs=0.01)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_file_is_translated_in_its_order(folder, tmp_path, beams):  # noqa: F811
    pytest.importorskip("sacrebleu")
    texts = ["red a x", "a", "x red red red a", "red x"]
    file = rows(tmp_path / "in.jsonl", *[dict(source=t, target=t) for t in texts])
    words = [f"folder={folder / 'run'}", f"file={file}", "length=5", f"beams={beams}"]
    translate.run(load(*words, "batch_size=3"), tmp_path / "one")
    translate.run(load(*words, "batch_size=1"), tmp_path / "two")
    one, two = ((tmp_path / x / translate.TEXTS).read_text() for x in ("one", "two"))
    assert one == two and [json.loads(x)["source"] for x in one.splitlines()] == texts
    line = json.loads((folder / "run" / translate.FILE).read_text().splitlines()[-1])
    assert line["beams"] == beams and 0 <= line["metrics"]["bleu"] <= 100


def test_a_long_source_is_refused_or_cut_to_its_beginning(folder, tmp_path):  # noqa: F811
    file = rows(tmp_path / "in.jsonl", dict(source="red " * 2000, target="x"))
    words = f"folder={folder / 'run'}", f"file={file}", "length=2", "target="
    with pytest.raises(ConfigError, match="config.long='cut'"):
        translate.run(load(*words), tmp_path)
    translate.run(load(*words, "long=cut"), tmp_path)
