"""What is asked of a model that has a decoder behind its encoder, from the data to transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import ROOT

from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.errors import ConfigError
from fmjax.evaluation import measurement
from fmjax.params import sharding
from fmjax.tasks import export, train


def load(name, *words):
    return configs.load(f"{ROOT}/configs/{name}", [f"--config.{word}" for word in words])


def pairs(folder):
    """A file of words, and the same backwards."""
    words = [f"{a} {b} {c}" for a in ("red", "blue") for b in "abcdefgh" for c in range(20)]
    rows = [{"source": text, "target": text[::-1]} for text in words]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={folder / 'pairs.jsonl'}"


SHORT = "total=4", "log_every=2", "save_every=2", "eval_every=2", "keep=9"
TINY = "tokenizer.kind=bpe", "tokenizer.vocab_size=400", "data.seq_len=32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("seq2seq")
    given = load("seq2seq.py:variant=tiny", pairs(where), *SHORT, *TINY)
    train.run(given, where / "run")
    return where


def test_a_run_is_measured_again_as_it_was(folder):
    text = (folder / "run" / "metrics.jsonl").read_text()
    logged = [json.loads(line) for line in text.splitlines()]
    last = [row for row in logged if "validation/loss" in row][-1]
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        opened = pretrained.open_folder(str(folder / "run"), mesh)
        given = load("evaluate.py", f"folder={folder / 'run'}", "batch_size=8")
        measure = measurement.Measure(given, opened, mesh)
        assert measure.dataset.format.startswith("seq2seq-32")
        found = measure(opened.model, opened.params, mesh)
    assert found["seq2seq/loss"] == pytest.approx(last["validation/seq2seq/loss"], abs=1e-5)


def test_transformers_gives_the_loss_of_an_exported_run(folder):
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    import transformers

    out = folder / "hf"
    export.run(load("export.py", f"folder={folder / 'run'}", f"output={out}"), folder / "work")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(out).eval()
    words = transformers.AutoTokenizer.from_pretrained(out)
    source, target = (words(text, return_tensors="pt").input_ids for text in ("red a x", "x a der"))
    assert source[0, -1] == words.eos_token_id == theirs.config.eos_token_id
    with torch.no_grad():
        wanted = theirs(input_ids=source, labels=target).logits.numpy()
    model, params = (getattr(pretrained.open_folder(str(folder / "run"), sharding.make_mesh()), x)
                     for x in ("model", "params"))  # fmt: skip
    apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
    ids, given = jnp.asarray(source.numpy(), jnp.int32), jnp.asarray(target.numpy(), jnp.int32)
    given = jnp.pad(given[:, :-1], ((0, 0), (1, 0)), constant_values=words.pad_token_id)
    whole = lambda x: (jnp.ones_like(x), jnp.arange(x.shape[1])[None])
    hidden = apply(ids, *whole(ids), jnp.zeros_like(ids), method="encode")
    states = apply(given, *whole(given), hidden, jnp.ones_like(ids), method="decode")
    np.testing.assert_allclose(apply(states, method="logits"), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "name, words, match",
    [
        (
            "span_corruption.py:variant=tiny",
            ["model.name=bert", "model.variant=tiny"],
            "span_corruption needs a model with a decoder.*t5",
        ),
        ("mlm.py:tiny", ["model.name=t5", "model.variant=tiny"], "mlm needs a model without a dec"),
        (
            "span_corruption.py:variant=tiny",
            ["tokenizer.special=bert", "tokenizer.kind=wordpiece"],
            "the tokenizer has 0 sentinels.*config.tokenizer.special='t5'",
        ),
        ("seq2seq.py:variant=tiny", [], "config.data.name='pydocs' has no seq2seq"),
        (
            "span_corruption.py:variant=tiny",
            ["model.encoder_depth=2"],
            "config.model.encoder_depth=2 of config.model.depth=2 layers",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(name, words, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        train.run(load(name, *words), tmp_path)
