"""The token that the answers of an encoder–decoder begin with, where it is not the padding."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_folders
from common import ROOT

import fmjax
from fmjax import convert
from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.data import tokenizer as tokenizers
from fmjax.errors import ConfigError
from fmjax.evaluation import measurement, scoring
from fmjax.evaluation.multiple_choice import encoder
from fmjax.generation import text_generator
from fmjax.models import t5
from fmjax.params import sharding
from fmjax.tasks import export, train

PAD, BOS, START, OTHER = 0, 1, 3, 7
SIZES = dict(vocab_size=261, width=16, depth=2, heads=2, head_size=8, mlp=32, max_len=64)
SIZES |= dict(tied=False, buckets=8, far=12)
SOURCE, TARGET = "the quick", "brown fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 with logits as far apart as those of a trained one, whose config.json has START."""
    home = tmp_path_factory.mktemp("t5")
    words = tiny_folders.tokenizer(home / "words")
    model = t5.Model("tiny", **SIZES, start_id=START)
    params = model.init(jax.random.key(1), *model.example())["params"]
    params = jax.tree.map(lambda x: x * 4 if x.ndim == 2 else x, params)
    convert.export(home / "model", model, params, words)
    return home / "model"


def load(name, *words):
    return configs.load(f"{ROOT}/configs/{name}", [f"--config.{word}" for word in words])


def reference(folder):
    """(torch, the folder's model in transformers)"""
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    transformers = pytest.importorskip("transformers")
    return torch, transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()


def loss(folder, source, target):
    """Mean nats of the target's tokens in transformers, which shifts them itself."""
    torch, model = reference(folder)
    with torch.no_grad():
        return model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).loss.item()


def rows_of(home):
    """The words of a command line that name home/pairs.jsonl."""
    words = ["data.name=text", "data.format=seq2seq", "data.columns=source", "data.label=target"]
    words += [f"data.train={home / 'pairs.jsonl'}", f"data.cache={home / 'cache'}"]
    words += ["data.long=truncate", "data.seq_len=32", "data.validation_fraction=0"]
    return [*words, "split=train", "objectives={'seq2seq': {}}"]


def measured(config, folder):
    """(the loss of configs/evaluate.py, what measured it)"""
    opened, mesh = tiny_folders.opened(folder), sharding.make_mesh()
    with jax.set_mesh(mesh):
        measure = measurement.Measure(config, opened, mesh)
        return measure(opened.model, opened.params, mesh)["loss"], measure


@pytest.mark.parametrize(
    "config, generation, begins",
    [
        (dict(decoder_start_token_id=START), None, START),
        (dict(decoder_start_token_id=None, bos_token_id=BOS), None, BOS),
        (dict(decoder_start_token_id=START), dict(decoder_start_token_id=OTHER), OTHER),
        (dict(decoder_start_token_id=START), dict(bos_token_id=BOS), BOS),
    ],
)
def test_greedy_text_begins_where_that_of_transformers_does(
    config, generation, begins, folder, tmp_path
):
    model = shutil.copytree(folder, tmp_path / "model")
    tiny_folders.settings(model / "config.json", pad_token_id=PAD, **config)
    if generation:
        tiny_folders.settings(model / "generation_config.json", **generation)
    author = text_generator.TextGenerator(tiny_folders.opened(model))
    how = dict(prompt=SOURCE, length=8, temperature=0, count=1)
    torch, theirs = reference(model)
    ids = torch.tensor([author.ids(how)])
    seen = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    (out,) = theirs.generate(ids, **seen)
    assert out[0] == begins == author.writer.spec.first
    text = author.words.decode(out, skip_special_tokens=True)
    if begins >= len(tiny_folders.MARKS):
        text = text.removeprefix(author.words.decode([begins]))
    assert author.texts(how, 0) == [text]
    assert fmjax.load(model).generate([SOURCE], length=8, temperature=0) == [text]


def test_the_loss_of_a_target_is_that_of_transformers(folder, tmp_path):
    opened = tiny_folders.opened(folder)
    words = tokenizers.load(folder)
    scorer = scoring.scorer_of(opened, words, 2, "token")
    context, said = encoder(words, True)(SOURCE, TARGET)
    (likely,) = scorer([(context, said)])
    source = [*scorer.first, *context, *scorer.last]
    assert likely.nats / likely.tokens == pytest.approx(loss(folder, source, said), abs=1e-4)

    (tmp_path / "pairs.jsonl").write_text(json.dumps(dict(source=SOURCE, target=TARGET)) + "\n")
    config = load("evaluate.py", f"folder={folder}", *rows_of(tmp_path))
    found, measure = measured(config, folder)
    row = measure.dataset.splits["train"].rows(np.array([0]))
    parts = (("input_ids", "segment_ids"), ("target_ids", "target_segment_ids"))
    source, target = (row[ids][row[segments] > 0].tolist() for ids, segments in parts)
    assert words.decode(target) == f"<s>{TARGET}</s>"
    assert found == pytest.approx(loss(folder, source, target), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("named", [{"name": "init"}, {"name": "t5"}])
def test_a_run_and_its_export_keep_the_start(named, folder, tmp_path):
    rows = [dict(source=SOURCE, target=TARGET)] * 40
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.train={tmp_path / 'pairs.jsonl'}", f"init={folder}"]
    words += ["tokenizer.name=init", "data.seq_len=32", "ledger=()"]
    words += ["total=2", "log_every=1", "save_every=2", "eval_every=0"]
    config = load("seq2seq.py:variant=tiny,runlocal=True", *words).to_dict()
    config["model"] |= SIZES | named
    train.run(configs.ConfigDict(config), tmp_path / "run")
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    first = next(row for row in lines if "train/loss" in row)["train/loss"]
    out = tmp_path / "out"
    export.run(load("export.py", f"folder={tmp_path / 'run'}", f"output={out}"), tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["decoder_start_token_id"] == START
    for made in (tmp_path / "run", out):
        assert text_generator.TextGenerator(tiny_folders.opened(made)).writer.spec.first == START
    assert pretrained.described(str(tmp_path / "run"))[1]["start_id"] == START
    config = load("evaluate.py", f"folder={folder}", *rows_of(tmp_path))
    assert first == pytest.approx(measured(config, folder)[0], abs=1e-4)


@pytest.mark.parametrize("value", [-1, 261, "<s>", True, 1.0])
def test_a_start_that_is_no_token_is_refused(value, folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    tiny_folders.settings(model / "generation_config.json", decoder_start_token_id=value)
    opened = tiny_folders.opened(model)
    with pytest.raises(ConfigError, match="decoder_start_token_id="):
        text_generator.TextGenerator(opened)
    tiny_folders.settings(model / "config.json", decoder_start_token_id=value)
    with pytest.raises(ConfigError, match="config.json has decoder_start_token_id=.*261 tokens"):
        tiny_folders.opened(model)
