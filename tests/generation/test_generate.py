"""Text that models write: the tokens of transformers, whatever else is in the batch."""

import os

import jax
import pytest
from common import ROOT

from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.data import tokenizer as tokenizers
from fmjax.errors import ConfigError
from fmjax.evaluation.loglikelihood import Scorer
from fmjax.generation import text_generator
from fmjax.generation.sampling import Sampling
from fmjax.params import sharding
from fmjax.tasks import generate, train

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of configs/clm.py of a few steps."""
    where = tmp_path_factory.mktemp("clm") / "run"
    words = ["--config.total=4", "--config.log_every=2", "--config.ledger=()"]
    config = configs.load(f"{ROOT}/configs/clm.py:tiny", words)
    train.run(config, where)
    return where


@pytest.fixture(scope="module")
def opened(folder):
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        yield pretrained.open_folder(str(folder), mesh)


def said(opened, **changes):
    how = dict(prompt="The function", count=2, length=8, temperature=0.0, top_k=None) | changes
    return text_generator.texts(opened, how, seed=changes.get("seed", 0))


def test_the_most_probable_tokens_are_those_of_transformers(folder, opened, tmp_path):
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    transformers = pytest.importorskip("transformers")
    export = configs.load(
        f"{ROOT}/configs/export.py",
        [f"--config.folder={folder}", f"--config.output={tmp_path / 'out'}"],
    )
    from fmjax.tasks import export as exports

    exports.run(export, tmp_path / "work")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    words = tokenizers.load(opened.tokenizer)
    ids = text_generator.prompt_ids(opened.model, words, dict(prompt="The function", length=8), 32)
    given = torch.tensor([ids])
    seen = dict(attention_mask=torch.ones_like(given))  # else what is no text is taken for padding
    how = dict(do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    out = model.generate(given, **seen, **how)
    theirs = words.decode(out[0, len(ids) :].tolist())
    assert said(opened, count=1) == [theirs.split("<|endoftext|>")[0]]


def test_what_is_drawn_follows_from_the_seed_and_the_row(opened):
    hot = dict(temperature=1.0, length=12)
    three = said(opened, count=3, **hot)
    assert three[:2] == said(opened, count=2, **hot) and len(set(three)) == 3
    assert three != said(opened, count=3, seed=1, **hot)
    assert said(opened, temperature=1.0, top_k=1) == said(opened, temperature=0.0)


def test_a_text_ends_at_a_token_that_ends_texts_and_not_behind_it(opened):
    free = text_generator.TextGenerator(opened)
    ids = free.ids(dict(prompt="The", length=12))
    (row,) = free.writer([ids], 12, Sampling(temperature=0))
    ends = free.writer.spec._replace(stop=(row[4],))
    free.writer.spec = ends
    at = row.index(row[4])
    assert free.writer([ids], 12, Sampling(temperature=0)) == [row[: at + 1]]


def test_where_nothing_is_drawn_there_is_one_text_shown_while_it_is_written(
    folder, tmp_path, capsys
):
    words = [f"--config.folder={folder}", "--config.prompt=The", "--config.length=12"]
    for greedy in ("--config.temperature=0", "--config.top_k=1"):
        config = configs.load(f"{ROOT}/configs/generate.py", [*words, greedy])
        with pytest.MonkeyPatch.context() as patch:  # printed whole, several would be
            patch.setattr(generate, "shown", None)
            generate.run(config, tmp_path)
        out = capsys.readouterr().out
        assert config.count == 3 and out.count("The") == 1 and "---" not in out


def test_texts_that_end_what_is_written_may_be_parts_of_tokens(opened):
    whole = said(opened, count=1, length=16)[0]
    middle = whole[5:8]
    at = whole.find(middle)
    shown = []
    author = text_generator.TextGenerator(opened)
    how = dict(prompt="The function", count=1, length=16, temperature=0.0, stop=(middle, "\0"))
    assert author.texts(how, 0, shown.append) == [whole[:at]] == ["".join(shown)]
    how["stop"] = ("\0",)
    shown.clear()
    assert author.texts(how, 0, shown.append) == [whole] == ["".join(shown)]


def test_beams_find_a_text_that_is_as_likely_or_likelier(opened):
    how = dict(temperature=0.0, count=1, length=6, length_penalty=0.0)
    author = text_generator.TextGenerator(opened)
    ids = author.ids(dict(prompt="The function", length=6))
    nats = {}
    for count in (1, 5):
        (text,) = said(opened, **how, beams=count)
        said_ids = author.words("The function" + text)["input_ids"][len(ids) :]
        nats[count] = Scorer(opened.model, opened.params)([(ids, said_ids)])[0].nats
    assert nats[5] <= nats[1] + 1e-4
    with pytest.raises(ConfigError, match="config.top_k=2 does not go with config.beams=5"):
        said(opened, **how | dict(top_k=2), beams=5)


def test_what_could_still_be_a_stop_or_half_a_character_is_not_shown():
    assert text_generator.settled("abc##", ("###",)) == "abc"
    assert text_generator.settled("abc#x", ("###",)) == "abc#x"
    assert text_generator.settled("ab\ufffd", ()) == "ab"
    assert text_generator.cut("a b c b", (" c", "b")) == ("a ", True)


def test_a_prompt_without_room_is_refused_or_cut_to_its_end(opened):
    author = text_generator.TextGenerator(opened)
    room = opened.config.data.seq_len
    long = " ".join(["word"] * 500) + " end"
    with pytest.raises(ConfigError, match="config.long='cut'"):
        author.ids(dict(prompt=long, length=8, long="error"))
    ids = author.ids(dict(prompt=long, length=8, long="cut"))
    assert len(ids) == room - 8 and author.words.decode(ids).endswith(" end")


def test_what_cannot_be_written_is_refused(opened):
    with pytest.raises(ConfigError, match="config.prompt has 2 tokens and config.length=10000"):
        said(opened, prompt="a", length=10000)


def test_an_encoder_does_not_write(tmp_path):
    config = configs.load(f"{ROOT}/configs/mlm.py:tiny", ["--config.total=2"])
    train.run(config, tmp_path)
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        encoder = pretrained.open_folder(str(tmp_path), mesh)
        with pytest.raises(ConfigError, match="is an encoder, which fills gaps.*configs/clm.py"):
            said(encoder)


@pytest.mark.slow
def test_a_smaller_model_guesses_what_a_model_writes(folder, tmp_path, capsys):
    words = [f"--config.folder={folder}", "--config.prompt=The", "--config.temperature=0"]
    words += ["--config.length=12", "--config.count=1"]
    run = lambda *more: (
        generate.run(configs.load(f"{ROOT}/configs/generate.py", [*words, *more]), tmp_path),
        capsys.readouterr().out,
    )[1]
    alone, guessed = run(), run(f"--config.draft={folder}", "--config.ahead=3")
    text, told = guessed.rstrip("\n").rsplit("\n(", 1)
    assert text in alone and told.endswith("of which the model read 3.00 at once)")
    other = ["--config.total=2", "--config.log_every=2", "--config.ledger=()"]
    other += ["--config.tokenizer.vocab_size=400"]
    train.run(configs.load(f"{ROOT}/configs/clm.py:tiny", other), tmp_path / "other")
    with pytest.raises(ConfigError, match="has other tokens than config.folder"):
        run(f"--config.draft={tmp_path / 'other'}")
    with pytest.raises(ConfigError, match="config.draft=.* does not go with config.beams=2"):
        run(f"--config.draft={folder}", "--config.beams=2")
