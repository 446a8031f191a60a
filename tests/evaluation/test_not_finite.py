"""Models whose numbers are NaN: nothing is chosen by them, judged by them or written."""

import json
import shutil

import numpy as np
import pytest
import tiny_folders
from common import ROOT

from fmjax.config import load as configs
from fmjax.data import tokenizer as tokenizers
from fmjax.errors import NumericsError
from fmjax.evaluation.multiple_choice import Item
from fmjax.generation import beam_search, speculative, text_generator
from fmjax.generation.sampling import Sampling
from fmjax.tasks import evaluate, fewshot


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder whose embedding is NaN for "q", and the same without."""
    home = tmp_path_factory.mktemp("nan")
    tiny_folders.decoder(home / "sound", tiny_folders.tokenizer(home / "words"))
    shutil.copytree(home / "sound", home / "nan")
    letter = json.loads((home / "nan" / "tokenizer.json").read_text())["model"]["vocab"]["q"]

    def spoil(table):
        table = table.copy()
        table[letter] = np.nan
        return table

    tiny_folders.tensors(home / "nan", **{"model.embed_tokens.weight": spoil})
    return home


@pytest.fixture(scope="module")
def models(folder):
    return [tiny_folders.opened(folder / name) for name in ("nan", "sound")]


def test_texts_are_not_judged_by_what_is_no_number(folder, models, tmp_path):
    ask = fewshot.asker(
        configs.load(f"{ROOT}/configs/fewshot.py", ["--config.folder=x"]), models[0]
    )
    ask([Item("a", (" b", " c"), 0)])
    with pytest.raises(
        NumericsError, match="log probability of 'bqc' behind 'a' is nan, and of 1 of 2"
    ):
        ask([Item("a", ("b", "bqc"), 0)])
    good = dict(sentence_good="a quick test", sentence_bad="a test quick", UID="x")
    (tmp_path / "blimp.jsonl").write_text(json.dumps(good) + "\n")
    words = [f"--config.folder={folder / 'nan'}", "--config.benchmark.name=blimp"]
    words += [f"--config.benchmark.path={tmp_path / 'blimp.jsonl'}", "--config.batch_size=2"]
    with pytest.raises(NumericsError, match="log probability of 'a quick test'"):
        fewshot.run(configs.load(f"{ROOT}/configs/fewshot.py", words), tmp_path)
    assert not (tmp_path / fewshot.FILE).exists()


@pytest.mark.parametrize("how", [Sampling(0), Sampling(1.0, top_k=5), Sampling(1.0, top_p=0.5)])
def test_no_token_is_taken_of_logits_that_are_no_numbers(models, how):
    writer, sound = (text_generator.TextGenerator(one).writer for one in models)
    ids = lambda text: tokenizers.load(models[0].tokenizer)(text)["input_ids"]
    assert writer([ids("a")], 4, how) == sound([ids("a")], 4, how)
    with pytest.raises(NumericsError, match="next token of text 2 are not finite"):
        writer([ids("a"), ids("aq")], 4, how)
    for both in ((writer, sound), (sound, writer)):
        with pytest.raises(NumericsError, match="next token of text 1 are not finite"):
            speculative.SpeculativeGenerator(*both, ahead=2)([ids("aq")], 4, how)


def test_no_beam_goes_on_with_what_is_no_number(models):
    writer, sound = (text_generator.TextGenerator(one).writer for one in models)
    ids = lambda text: tokenizers.load(models[0].tokenizer)(text)["input_ids"]
    search = lambda writer, text: beam_search.search(writer, [ids(text)], 4, beam_search.Beams(2))
    assert search(writer, "a") == search(sound, "a")
    with pytest.raises(NumericsError, match="next token of text 1 are not finite"):
        search(writer, "aq")


def test_a_loss_that_is_no_number_is_an_error(folder, tmp_path):
    (tmp_path / "some.txt").write_text("the quick brown fox\n\nover the lazy dog\n")
    words = f"data.train={tmp_path / 'some.txt'}", "split=train", "data.validation_fraction=0"
    words += f"folder={folder / 'nan'}", "data.seq_len=16", "batch_size=8"
    words = [f"--config.{word}" for word in words]
    with pytest.raises(NumericsError, match="nan: .* of train is not finite: its weights"):
        evaluate.run(configs.load(f"{ROOT}/configs/evaluate.py", words), tmp_path)
    assert not (tmp_path / evaluate.FILE).exists()
