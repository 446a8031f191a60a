"""Text that models write: the tokens of transformers, whatever else is in the batch."""

import os

import jax
import numpy as np
import pytest
from common import ROOT

from fmjax import config as configs
from fmjax import generate, pretrained, sharding, train
from fmjax.data import tokenizer as tokenizers
from fmjax.errors import ConfigError

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
    return generate.texts(opened, how, seed=changes.get("seed", 0))


def test_the_most_probable_tokens_are_those_of_transformers(folder, opened, tmp_path):
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    transformers = pytest.importorskip("transformers")
    export = configs.load(
        f"{ROOT}/configs/export.py",
        [f"--config.folder={folder}", f"--config.output={tmp_path / 'out'}"],
    )
    from fmjax import export as exports

    exports.run(export, tmp_path / "work")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    words = tokenizers.load(opened.tokenizer)
    ids = generate.prompt_ids(opened.model, words, dict(prompt="The function", length=8), 32)
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


def test_draws_are_as_probable_as_the_model_says():
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32)).repeat(4000, 0)
    drawn = generate._drawn(jax.numpy.asarray(logits), jax.random.key(0), 1.0, None)
    shares = np.bincount(np.asarray(drawn), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.125, 0.125], atol=0.03)
    two = generate._drawn(jax.numpy.asarray(logits), jax.random.key(0), 0.5, 2)
    shares = np.bincount(np.asarray(two), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.8, 0.2, 0, 0], atol=0.03)  # squares of the first two


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
