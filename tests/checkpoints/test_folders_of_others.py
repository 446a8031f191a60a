"""Folders whose tokenizer and model do not quite fit: they work where they can, or are refused."""

import errno
import json
import os

import jax
import numpy as np
import pytest
from common import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fmjax import __main__ as program
from fmjax import convert, startup
from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.data import tokenizer
from fmjax.errors import CheckpointError, ConfigError, DataError, NumericsError
from fmjax.evaluation import eval_loop, fill_in
from fmjax.evaluation.loglikelihood import Scorer
from fmjax.generation import text_generator
from fmjax.generation.sampling import Sampling
from fmjax.io import results
from fmjax.models import bert, llama, text_pooling
from fmjax.params import paths, sharding
from fmjax.tasks import embed, evaluate, predict
from fmjax.training import setup

SURPLUS = "<image_soft_token>"
LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))


def load(name, **values):
    words = [f"--config.{key}={value}" for key, value in values.items()]
    return configs.load(f"{ROOT}/configs/{name}", words)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A Llama of 257 rows, and its tokenizer of 258 tokens, as of the text models of Gemma 3."""
    home = tmp_path_factory.mktemp("decoder")
    tokens = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
    words.add_tokens([AddedToken(SURPLUS, special=True)], special_tokens=True)
    words.save_pretrained(home / "tokenizer")
    sizes = dict(width=16, depth=2, heads=2, kv_heads=1, mlp=32, max_len=64, tied=True)
    model = llama.Model("tiny", vocab_size=len(vocab), **sizes)
    params = model.init(jax.random.key(0), *model.example())["params"]
    convert.export(home / "model", model, params, home / "tokenizer")
    return home / "model"


def test_a_token_that_no_text_holds_needs_no_row(decoder, tmp_path):
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        opened = pretrained.open_folder(str(decoder), mesh)
        author = text_generator.TextGenerator(opened)
        assert author.writer.spec.tokens == 257  # nothing draws the last one
        how = dict(prompt="the ", count=1, length=4, temperature=1.0)
        assert len(author.texts(how, seed=0)) == 1
        with pytest.raises(ConfigError, match="config.prompt cannot be read.*id 257, but"):
            author.texts(how | {"prompt": f"the {SURPLUS}"}, seed=0)
        with pytest.raises(ConfigError, match="prompt 1 cannot be read: .* gives id 257"):
            author.writer([[1], [257]], 4, Sampling())
        scorer = Scorer(opened.model, opened.params, first=(0,), last=(), mask_id=None, start=0,
                        word_start=None, way="token", trained=None, batch_size=1)  # fmt: skip
        with pytest.raises(ConfigError, match="text 0 cannot be judged: .* gives id 257"):
            scorer([([1], [257])])

    (tmp_path / "text.txt").write_text("the fox\n\nover the dog\n")
    settings = dict(name="text", train=str(tmp_path / "text.txt"), validation_fraction=0, seq_len=8)
    dataset = opened.prepare(settings)
    assert dataset.vocab.size == 257 == len(dataset.vocab.special) == len(dataset.vocab.bytes)


def test_training_goes_on_from_a_folder_with_a_token_too_many(decoder, tmp_path):
    (tmp_path / "text.txt").write_text("the fox\n\nover the dog\n")
    words = {"init": decoder, "tokenizer.name": "init", "model.name": "init"}
    words |= {"data.train": tmp_path / "text.txt", "data.name": "text"}
    words |= {"data.seq_len": 32, "data.validation_fraction": 0, "batch_size": 8}
    config = load("clm.py:tiny", **words)
    with config.unlocked():
        config.model = {"name": "init"}
    run = setup.setup(config, sharding.make_mesh())
    assert run.model.cfg.vocab_size == run.dataset.vocab.size == 257


def test_a_record_with_a_token_that_the_model_lacks_is_named(decoder, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in decoder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1]["special"] = False  # so that a text can hold it
    path.write_text(json.dumps(content))
    opened = pretrained.open_folder(str(folder), sharding.make_mesh())
    (tmp_path / "text.txt").write_text(f"the fox\n\nover {SURPLUS}\n")
    settings = dict(name="text", validation_fraction=0, seq_len=16)
    with pytest.raises(DataError, match="text.txt:3: .* gives id 257, but the model has 257"):
        opened.prepare(settings | {"train": str(tmp_path / "text.txt")})
    rows = [{"text": "a", "label": "x"}, {"text": SURPLUS, "label": "y"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings |= dict(train=str(tmp_path / "rows.jsonl"), columns="text", label="label")
    for form in ("classes", "seq2seq"):
        with pytest.raises(DataError, match="rows.jsonl:2: the tokenizer gives id 257"):
            opened.prepare(settings | dict(format=form, long="truncate"))


def test_a_tokenizer_of_another_model_is_refused(decoder, tmp_path):
    opened = pretrained.open_folder(str(decoder), sharding.make_mesh())
    smaller = opened._replace(model=opened.model.clone(cfg=opened.model.cfg.__class__(
        **{**opened.model.cfg.__dict__, "vocab_size": 200})))  # fmt: skip
    (tmp_path / "text.txt").write_text("the fox\n")
    with pytest.raises(ConfigError, match="258 tokens, the model 200: they do not belong together"):
        smaller.prepare(dict(name="text", train=str(tmp_path / "text.txt"), seq_len=8))
    with pytest.raises(ConfigError, match="258 tokens, the model 200: they do not belong together"):
        text_generator.check_tokens(smaller.model, tokenizer.load(decoder))


def encoder(folder, classes, labels=(), broken=False, **options):
    """A BERT of letters in transformers format, with a head; `broken`: its bias is NaN."""
    vocab = {token: i for i, token in enumerate(LETTERS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    split = pre_tokenizers.Split("", "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {f"{token[1:-1].lower()}_token": token for token in LETTERS[:5]}
    words = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    words.save_pretrained(folder / "tokenizer")
    sizes = dict(width=16, depth=1, heads=2, mlp=32, max_len=32, vocab_size=len(vocab))
    head = dict(classes=classes, lm_head=not classes)
    model = bert.Model("tiny", **sizes | head | options)
    params = model.init(jax.random.key(0), *model.example())["params"]
    if broken:
        named = paths.flatten(params)
        last = [name for name in named if name.startswith("head/") and name.endswith("bias")][-1]
        params = paths.unflatten({**named, last: named[last] * np.nan})
    convert.export(folder / "model", model, params, folder / "tokenizer", labels=labels)
    return folder / "model"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def classify(folder, rows, **changes):
    values = {"folder": folder, "data.train": rows, "data.format": "classes", "batch_size": 8}
    values |= {"data.columns": "a,b", "data.long": "truncate", "data.seq_len": 16}
    values |= {"data.classes": "('no','yes')", "objectives": "{'classify': {}}"}
    return load("predict.py", **values | changes)


def test_types_that_the_model_lacks_are_refused(tmp_path):
    folder = encoder(tmp_path, {"classify": 2}, ("no", "yes"), types=1)
    rows = write_rows(tmp_path / "new.jsonl", [{"a": "ab", "b": "c"}, {"a": "d", "b": "e"}])
    with pytest.raises(ConfigError, match="2 types.*type_vocab_size=1.*tokenizer"):
        predict.run(classify(folder, rows), tmp_path)
    predict.run(classify(folder, rows, **{"data.columns": "a"}), tmp_path)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    told = [json.loads(line)["probabilities"] for line in lines]
    assert len(told) == 2 and all(np.isclose(sum(row.values()), 1) for row in told)


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    folder = encoder(tmp_path, {"classify": 2}, ("no", "yes"), broken=True)
    rows = [{"a": "ab", "b": "c", "label": "no"}, {"a": "d", "b": "e", "label": "yes"}]
    rows = write_rows(tmp_path / "new.jsonl", rows)
    with pytest.raises(NumericsError, match="2 records, the first is .*new.jsonl:1: nothing is wr"):
        predict.run(classify(folder, rows), tmp_path)
    assert not (tmp_path / "predictions.jsonl").exists()
    values = {"folder": folder, "data.train": rows, "data.format": "classes", "split": "train"}
    values |= {"data.columns": "a,b", "data.label": "label", "data.long": "truncate"}
    values |= {"data.seq_len": 16, "batch_size": 8, "objectives": "{'classify': {}}"}
    with pytest.raises(NumericsError, match="the first is row 0 of train"):
        evaluate.run(load("evaluate.py", **values), tmp_path)
    assert not (tmp_path / evaluate.FILE).exists()


def test_masks_and_vectors_that_are_not_finite_are_not_written(tmp_path):
    folder = encoder(tmp_path, {}, broken=True)
    opened = pretrained.open_folder(str(folder), sharding.make_mesh())
    words = tokenizer.load(folder)
    rows = fill_in.encode(["a [MASK]"], words, 32)
    with pytest.raises(NumericsError, match="mask 1 of config.text, in sentence 1"):
        fill_in.guesses(opened, words, rows, 2)

    bad = np.array([[1.0, 2.0], [np.nan, 0.0], [-np.inf, 0.0], [np.inf, 0.0]])
    assert eval_loop.not_finite({"vectors": bad, "labels": np.arange(4)}).tolist() == [
        False, True, False, True
    ]  # fmt: skip


def test_a_file_of_vectors_is_whole_or_not_there(tmp_path, monkeypatch):
    folder = encoder(tmp_path, {})
    rows = write_rows(tmp_path / "texts.jsonl", [{"text": "ab"}, {"text": "c"}])
    values = {"folder": folder, "data.train": rows, "data.columns": "text", "data.seq_len": 16}
    config = load("embed.py", **values | {"batch_size": 8})
    embed.run(config, tmp_path)
    before = np.load(tmp_path / "embeddings.npy")
    assert before.shape == (2, 16)
    pooled = text_pooling.pooled
    spoilt = lambda hidden, *rest: pooled(hidden, *rest).at[1].set(np.nan)
    monkeypatch.setattr(text_pooling, "pooled", spoilt)
    with pytest.raises(NumericsError, match="1 records, the first is .*texts.jsonl:2"):
        embed.run(config, tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "embeddings.npy"), before)
    (tmp_path / "embeddings.npy").unlink()
    with pytest.raises(NumericsError):
        embed.run(config, tmp_path)
    assert not list(tmp_path.glob("embeddings.npy*"))
    monkeypatch.setattr(text_pooling, "pooled", pooled)
    monkeypatch.setattr(embed.disk_cache, "reserve", full)
    with pytest.raises(CheckpointError, match="embeddings.npy cannot .*No space.* config.output"):
        embed.run(config, tmp_path)
    assert not list(tmp_path.glob("embeddings.npy*"))


def test_predictions_of_before_stay_where_the_disk_is_full(tmp_path, monkeypatch, capsys):
    folder = encoder(tmp_path, {"classify": 2}, ("no", "yes"))
    rows = write_rows(tmp_path / "new.jsonl", [{"a": "ab"}])
    file = tmp_path / "out.jsonl"
    words = [f"--config={ROOT}/configs/predict.py", f"--config.folder={folder}"]
    words += [f"--config.data.train={rows}", "--config.data.columns=a", f"--config.output={file}"]
    words += ["--config.data.seq_len=16", "--config.batch_size=8"]
    assert startup.exit_code(program.main, words) == 0
    before = file.read_bytes()
    assert json.loads(before)["a"] == "ab"
    capsys.readouterr()
    monkeypatch.setattr(results.manifest, "sync", full)
    assert startup.exit_code(program.main, words) == 4
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {file} cannot be written (No space left on device): free space, change its "
        "permissions, or use another config.output"
    )
    assert file.read_bytes() == before and not list(tmp_path.glob("out.jsonl.*"))


@pytest.mark.parametrize("head", ["classify", "tag"])
def test_a_folder_says_what_its_model_is_for(tmp_path, head):
    """Nothing but data and their columns is given, as for a classifier of the hub."""
    folder = encoder(tmp_path, {head: 2}, ("no", "yes"))
    row, column = {"classify": ({"a": "ab"}, "a"), "tag": ({"a": ["ab", "c"]}, "a")}[head]
    rows = write_rows(tmp_path / "new.jsonl", [row])
    values = {"data.train": rows, "data.columns": column, "data.seq_len": 16}
    predict.run(load("predict.py", folder=folder, **values), tmp_path)
    told = json.loads((tmp_path / "predictions.jsonl").read_text())
    if head == "classify":
        assert set(told["probabilities"]) == {"no", "yes"}
    else:
        assert len(told["tags"]) == 2 and set(told["tags"]) <= {"no", "yes"}


def test_a_word_that_the_tokenizer_drops_has_no_tag(tmp_path):
    folder = encoder(tmp_path, {"tag": 2}, ("O", "B-x"))
    rows = [{"tokens": ["ab", " ", "c", " "]}, {"tokens": ["a" * 20, "b"]}]
    values = {"data.train": write_rows(tmp_path / "rows.jsonl", rows), "data.format": "tags"}
    values |= {"data.columns": "tokens", "data.classes": "('O','B-x')"}
    config = classify(folder, values["data.train"], **values | {"objectives": "{'tag': {}}"})
    predict.run(config, tmp_path)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["tags"] for line in lines)
    assert [tag is None for tag in first] == [False, True, False, True]
    assert [tag is None for tag in second] == [False, True]  # behind the end of the row
