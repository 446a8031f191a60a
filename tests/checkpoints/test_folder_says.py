"""Settings of generation in the folder of a model: where texts end, and what is missing."""

import json
import shutil

import jax
import pytest
import tiny
import tiny_folders
from common import ROOT

from fmjax import convert
from fmjax.config import load as configs
from fmjax.data import chat, endings
from fmjax.data import tokenizer as tokenizers
from fmjax.errors import ConfigError
from fmjax.evaluation import measurement, scoring
from fmjax.generation import text_generator
from fmjax.generation.sampling import Sampling
from fmjax.params import sharding
from fmjax.tasks import export, train

PROMPT = "the quick"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder with an output of its own, that says nothing of where texts end."""
    home = tmp_path_factory.mktemp("folders")
    return tiny_folders.decoder(home / "model", tiny_folders.tokenizer(home / "words"))


def load(name, *words):
    return configs.load(f"{ROOT}/configs/{name}", [f"--config.{word}" for word in words])


def written(author):
    """(the tokens written greedily behind the prompt, their text)."""
    ids = author.ids(dict(prompt=PROMPT, length=8))
    (row,) = author.writer([ids], 8, Sampling(temperature=0))
    return row, author.text(ids, row)


def test_texts_end_at_the_tokens_that_the_folder_lists(folder, tmp_path):
    free, _ = written(text_generator.TextGenerator(tiny_folders.opened(folder)))
    last = free[3]
    at = free.index(last)
    model = shutil.copytree(folder, tmp_path / "model")
    for name, value in (("config.json", last), ("generation_config.json", [2, last, 9999])):
        tiny_folders.settings(model / name, eos_token_id=value)
        row, text = written(text_generator.TextGenerator(tiny_folders.opened(model)))
        assert row == free[: at + 1]
        tiny_folders.settings(model / "config.json", eos_token_id=2)  # no more asked
    # As transformers stops.
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    author = text_generator.TextGenerator(tiny_folders.opened(model))
    ids = torch.tensor([author.ids(dict(prompt=PROMPT, length=8))])
    seen = dict(attention_mask=torch.ones_like(ids), pad_token_id=0)
    out = theirs.generate(ids, do_sample=False, max_new_tokens=8, **seen)
    assert out[0, ids.shape[1] :].tolist() == row
    beams = dict(prompt=PROMPT, length=8, temperature=0, beams=1, count=1)
    assert author.texts(beams, 0) == [text] == author.each([ids[0].tolist()], 8, Sampling(0))


def test_what_is_no_token_is_refused(tmp_path):
    for value in ("</s>", [1, "2"], True, [None], 1.5):
        tiny_folders.settings(tmp_path / endings.FILE, eos_token_id=value)
        with pytest.raises(ConfigError, match="generation_config.json has eos_token_id=.*number"):
            endings.listed(tmp_path)
    (tmp_path / endings.FILE).write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="generation_config.json cannot be read: .*too deeply"):
        endings.listed(tmp_path)
    (tmp_path / endings.FILE).write_text("[]")
    with pytest.raises(ConfigError, match="generation_config.json cannot be read: .*no JSON obj"):
        endings.listed(tmp_path)


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}])
@pytest.mark.parametrize("config", ["listed", None, "absent"])
def test_texts_end_where_transformers_ends_them(generation, config, folder, tmp_path):
    """generation_config.json is absent, or there without the key, or with null."""
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    transformers = pytest.importorskip("transformers")
    last = written(text_generator.TextGenerator(tiny_folders.opened(folder)))[0][3]
    model = shutil.copytree(folder, tmp_path / "model")
    described = json.loads((model / "config.json").read_text()) | {"eos_token_id": None}
    described |= {"listed": {"eos_token_id": last}}.get(config, {})
    if config == "absent":
        del described["eos_token_id"]
    (model / "config.json").write_text(json.dumps(described))
    if generation is not None:
        (model / endings.FILE).write_text(json.dumps(generation))
    author = text_generator.TextGenerator(tiny_folders.opened(model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.tensor([author.ids(dict(prompt=PROMPT, length=8))])
    how = dict(attention_mask=torch.ones_like(ids), pad_token_id=0, do_sample=False)
    out = theirs.generate(ids, max_new_tokens=8, **how)
    assert out[0, ids.shape[1] :].tolist() == written(author)[0]
    stops = generation is None and config == "listed"
    assert author.writer.spec.stop == ((last,) if stops else ())


def test_a_tokenizer_alone_ends_texts_by_its_own_token(tmp_path):
    assert endings.listed(tiny_folders.tokenizer(tmp_path)) is None


@pytest.mark.slow
def test_a_run_and_its_export_keep_the_ends_of_texts_and_the_template(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    tiny_folders.settings(base / endings.FILE, eos_token_id=[2, 7], temperature=0.6)
    templates = {"default": tiny_folders.CHATML, "rag": "{{ documents }}"}
    tiny_folders.tokenizer(base, chat_template=templates)
    said = [dict(role="user", content="hi"), dict(role="assistant", content="a")]
    (tmp_path / "chats.jsonl").write_text((json.dumps(dict(messages=said)) + "\n") * 40)
    words = [f"init={base}", f"data.train={tmp_path / 'chats.jsonl'}", "total=2 steps"]
    words += ["batch_size=8", "data.seq_len=64", "ledger=()", "log_every=2", "eval_every=0"]
    train.run(load("instruct.py:runlocal=True", *words), tmp_path / "run")
    out = tmp_path / "out"
    export.run(load("export.py", f"folder={tmp_path / 'run'}", f"output={out}"), tmp_path)
    end_of_answer = tiny_folders.MARKS.index("<|end|>")
    for made in (tmp_path / "run", out):
        author = text_generator.TextGenerator(tiny_folders.opened(made))
        assert author.writer.spec.stop == (2, 7, end_of_answer)
        assert author.words.chat_template == templates
    assert json.loads((out / endings.FILE).read_text())["eos_token_id"] == [2, 7, end_of_answer]


def test_an_export_has_the_template_that_the_run_was_trained_with(folder, tmp_path):
    config = configs.ConfigDict(dict(data=dict(format="chat", template="plain")))
    words = tiny_folders.tokenizer(tmp_path / "words", chat_template=tiny_folders.CHATML)
    run = tiny_folders.opened(folder)._replace(config=config, tokenizer=words)
    (tmp_path / "adapter").mkdir()
    convert.copy_tokenizer(words, tmp_path / "adapter")
    assert tokenizers.load(tmp_path / "adapter").chat_template == tiny_folders.CHATML
    export.write_template(run, tmp_path / "adapter")
    assert tokenizers.load(tmp_path / "adapter").chat_template == chat.TEMPLATES["plain"]


# ---- a decoder without its output ----


def test_a_decoder_without_its_output_neither_writes_nor_judges(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    tiny_folders.tensors(base, **{"lm_head.weight": None})
    lacking = tiny_folders.opened(base)
    assert lacking.missing == ("head/lm/kernel",)
    refused = pytest.raises(ConfigError, match="no trained head 'lm'.*would be random.*clm.py")
    with refused:
        text_generator.TextGenerator(lacking)
    with refused:
        scoring.scorer_of(lacking, [], 4, "token")
    (tmp_path / "some.txt").write_text("the quick brown fox\n\nover the lazy dog\n")
    given = load(
        "evaluate.py",
        f"folder={base}",
        f"data.train={tmp_path / 'some.txt'}",
        "split=train",
        "data.validation_fraction=0",
        "data.seq_len=16",
        "batch_size=8",
    )
    with refused:
        measurement.Measure(given, lacking, sharding.make_mesh())
    # An encoder–decoder's too.
    both = lacking._replace(model=tiny.model("t5", tied=False))
    with pytest.raises(ConfigError, match="no trained head 'lm'.*seq2seq.py"):
        text_generator.TextGenerator(both)
    # One that is tied has no tensor of its own, and lacks nothing.
    words = folder.parent / "words"
    tied = tiny_folders.opened(tiny_folders.decoder(tmp_path / "tied", words, tied=True))
    text_generator.TextGenerator(tied)
    with jax.set_mesh(mesh := sharding.make_mesh()):
        measurement.Measure(given, tied, mesh)
