"""What is asked of a model that sees only what is before it, and refused of others."""

import importlib
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from common import ROOT

from fmjax import adapters, convert, data
from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.data import packing
from fmjax.errors import ConfigError
from fmjax.evaluation import measurement
from fmjax.io.progress import FALLING
from fmjax.models import llama, text_pooling
from fmjax.objectives import clm
from fmjax.params import paths, sharding
from fmjax.tasks import fill_mask, train


def load(name, *words):
    return configs.load(f"{ROOT}/configs/{name}", [f"--config.{word}" for word in words])


@pytest.mark.parametrize(
    "name, words, match",
    [
        ("clm.py:tiny", ["model.name=bert", "model.variant=tiny"], "clm needs .*before them.*gpt2"),
        (
            "mlm.py:tiny",
            ["model.name=gpt2", "model.variant=tiny"],
            "mlm needs .*all of a text.*bert",
        ),
        (
            "clm.py:tiny",
            ["model.name=bert", "model.variant=tiny", "objectives={'prefix_lm': {}}"],
            "prefix_lm needs .*before them",
        ),
        (
            "clm.py:tiny",
            ["tokenizer.special=fim", "objectives={'fim': {}}"],
            "adds 3 tokens to a document, but config.data.room=0.*set it to 3",
        ),
        ("clm.py:tiny", ["samples.length=5000"], r"config.samples.length=5000.*32 positions"),
        ("mlm.py:tiny", ["ledger=('samples',)"], "config.samples to have prompt.*none of them"),
        (
            "clm.py:tiny",
            ["data.format=pairs"],
            "frame='document' has no meaning with format='pairs'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(name, words, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        train.run(load(name, *words), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_head_on_the_whole_takes_the_last_real_token():
    hidden = jnp.arange(24, dtype=jnp.float32).reshape(2, 4, 3)
    segments = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert text_pooling.pooled(hidden, segments, "last").tolist() == [[3, 4, 5], [21, 22, 23]]


def test_less_is_better_of_what_measures_surprise():
    assert all(name.endswith(FALLING) for name in ("validation/clm/bits_per_byte", "a/nats"))
    assert not "validation/clm/accuracy".endswith(FALLING)


RUN = "clm.py:tiny", "total=4", "log_every=2", "save_every=2", "keep=9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("clm") / "run"
    train.run(load(*RUN), where)
    return where


def test_a_run_goes_on_with_the_same_bits(folder, tmp_path):
    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "4")
    status = json.loads((again / "status.json").read_text()) | {"checkpoint": 2, "state": "running"}
    (again / "status.json").write_text(json.dumps(status))
    train.run(load(*RUN), again)
    mesh = sharding.make_mesh()
    one, other = (pretrained.open_folder(str(x), mesh).params for x in (folder, again))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    told = [json.loads((x / "ledger.json").read_text())["samples"] for x in (folder, again)]
    assert told[0] == told[1]


@pytest.mark.slow
def test_a_decoder_is_tuned_on_conversations(folder, tmp_path):
    """Targets are the answers' tokens alone, of which the data tell how many there are."""
    rows = [{"a": f"What is {i} and {i}?", "b": f"It is {2 * i}."} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data.columns=a,b", f"init={folder}", "total=2", "ledger=()", "log_every=1"]
    words += ["data.seq_len=64", "batch_size=8", f"data.train={tmp_path / 'a.jsonl'}"]
    config = load("instruct.py", *words, "data.validation_fraction=0.3")
    train.run(config, tmp_path / "run")
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        opened = pretrained.open_folder(str(tmp_path / "run"), mesh)
        words = [f"folder={tmp_path / 'run'}", "batch_size=8"]
        measure = measurement.Measure(load("evaluate.py", *words), opened, mesh)
        assert measure.split.seq_len == 64 and measure.dataset.format.startswith("chat-64-drop")
        rows = measure.split.rows(np.arange(len(measure.split)))
        _, weights = clm.targets({name: jnp.asarray(array) for name, array in rows.items()})
        assert float(weights.sum()) == measure.dataset.counts["validation"]["learnt_tokens"]


def test_samples_are_in_the_ledger(folder):
    kept = json.loads((folder / "ledger.json").read_text())
    assert len(kept["samples"]) == kept["samples_of"]["count"] == 3
    assert all(isinstance(text, str) for text in kept["samples"])


@pytest.mark.slow
def test_a_run_of_prefixes_reads_a_prompt_in_both_directions(tmp_path):
    words = ["total=2", "objectives={'prefix_lm': {'weight': 1.0}}", "ledger=()"]
    train.run(load("clm.py:tiny", *words), tmp_path)
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        assert pretrained.open_folder(str(tmp_path), mesh).model.cfg.prefix
    assert "prefix" not in pretrained.described(str(tmp_path))[1]


def test_other_data_are_measured_in_the_same_frame(folder, tmp_path):
    (tmp_path / "other.txt").write_text("One text.\n\nAnother one.\n")
    config = load("evaluate.py", f"folder={folder}", f"data.train={tmp_path / 'other.txt'}")
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        settings, goals, _ = measurement.settings_of(
            config, pretrained.open_folder(str(folder), mesh)
        )
    assert settings["frame"] == "document" and list(goals) == ["clm"]


def test_gaps_are_not_filled_by_what_writes(folder, tmp_path):
    config = load("fill_mask.py", f"folder={folder}", "text=a [MASK]")
    with pytest.raises(ConfigError, match="writes on, and fills no gaps.*configs/generate.py"):
        fill_mask.run(config, tmp_path)


@pytest.mark.parametrize("long", ["split", "truncate", "drop"])
def test_pieces_of_a_document_share_a_token(long):
    """Documents of 1, 0, 5, 8 and 20 tokens between their own first and last, in rows of 8."""
    sizes = np.array([1, 0, 5, 8, 20])
    tokens = np.concatenate([100 * (i + 1) + np.arange(n) for i, n in enumerate(sizes)])
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    vocab = data.Vocab(9999, 0, None, (7,), (9,), *[np.zeros(1, bool)] * 2)
    shard = packing.framed(data.store.Shard(tokens.astype(np.uint16), bounds, bounds), vocab)
    whole = [[7, *(100 * (i + 1) + np.arange(n)), 9] for i, n in enumerate(sizes) if n]
    assert shard.tokens.tolist() == sum(whole, [])
    starts, lengths, lost = packing.pieces(shard.documents, 8, long, 8, 1)
    found = [shard.tokens[a : a + n].tolist() for a, n in zip(starts, lengths, strict=True)]
    cut = lambda text: [text[i : i + 8] for i in range(0, len(text) - 1, 7)]
    over = [text for text in whole if len(text) > 8]
    wanted = {
        "split": sum(map(cut, whole), []),
        "truncate": [text[:8] for text in whole],
        "drop": [text for text in whole if len(text) <= 8],
    }
    assert found == wanted[long] and all(len(piece) > 1 for piece in found)
    gone = sum(len(text) - (8 if long == "truncate" else 0) for text in over)
    assert sum(v for k, v in lost.items() if k.endswith("tokens")) == gone * (long != "split")


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_a_classifier_of_transformers_gives_its_outputs(kind, tmp_path):
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    transformers = pytest.importorskip("transformers")
    sizes = {
        "GPT2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=20),
        "Llama": dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        | dict(intermediate_size=24, max_position_embeddings=20),
    }
    made = getattr(transformers, f"{kind}ForSequenceClassification")
    torch.manual_seed(0)
    theirs = made(made.config_class(vocab_size=61, num_labels=3, pad_token_id=0, **sizes[kind]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.3)
    theirs.eval().save_pretrained(tmp_path)
    ids = np.array([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
    real = (ids > 0).astype(np.int64)
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids), attention_mask=torch.tensor(real)).logits.numpy()

    name, options = convert.describe(tmp_path)
    model = importlib.import_module(f"fmjax.models.{name}").Model(**options, lm_head=False)
    model = model.clone(stacks=paths.runs(model.kinds))
    like = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
    params, report = convert.load(tmp_path, like)
    assert report.kept == ()
    segments, places = jnp.asarray(real, jnp.int32), jnp.broadcast_to(jnp.arange(5)[None], (2, 5))
    apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
    hidden = apply(jnp.asarray(ids, jnp.int32), segments, places, segments, method="encode")
    found = apply(hidden, segments, "classify", method="classify")
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_checkpoint_describes_the_model_that_it_is_of():
    options = dict(kv_heads=2, rope={"type": "linear", "factor": 2.0}, classes={"classify": 3})
    model = llama.Model("tiny", **options)
    meta = json.loads(json.dumps({"model": pretrained.identity(model)}))
    name, told = pretrained._described(meta, "somewhere")
    again = importlib.import_module(f"fmjax.models.{name}").Model(**told)
    assert again.cfg == model.cfg and hash(again.cfg) == hash(model.cfg)
    assert dict(again.cfg.rope)["factor"] == 2.0


def test_adapters_of_matrices_pass_norms_of_queries_by():
    model = llama.Model("tiny", qk_norm="head", norms="around")
    how = configs.load(f"{ROOT}/configs/finetune_lora.py").adapter.to_dict()
    wrapped = adapters.wrap(model, dict(adapter=how, quantise=None))
    assert {path.rpartition("/")[2] for path in wrapped.sites()} == {
        *("query", "key", "value", "out"),
        *("up", "gate", "down"),
    }


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(kv_heads=3), "kv_heads=3 does not divide config.model.heads=4"),
        (dict(head_size=5), "head_size=5 is odd"),
        (dict(full_every=2), "full_every=2 needs config.model.window"),
        (dict(rope={"type": "yarm"}), "rope.type='yarm' is not known.*yarn"),
        (
            dict(rope={"type": "yarn", "factor": 2.0}),
            "yarn' needs original_max_position_embeddings",
        ),
        (dict(rope={"type": "linear", "facto": 2.0}), "rope.facto is not known.*factor"),
        (dict(norms="after"), "norms='after' is not known"),
        (dict(experts=2, experts_per_token=3), "experts_per_token=3 is not a number from 1 to"),
        (dict(experts=2, dense_layers=[4]), r"dense_layers=\(4,\) are not all .*depth=4"),
    ],
)
def test_decoders_that_cannot_be_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        llama.Model("tiny", **changes)


def test_the_model_of_the_documents_trains_with_an_adapter(monkeypatch, tmp_path):
    """And is one file: what it says there, as it stands there."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    *_, code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "parallel.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    made = importlib.import_module("parallel")
    monkeypatch.setitem(tiny.FAMILIES, "parallel", (made, {}, {"clm": {}}))
    adapter = dict(name="lora", targets=((r".*/(query|up)", 2),), rank=2, alpha=4.0)
    groups = ((r".*/lora_.", "train"), (".*", "freeze"))
    run = tiny.make(groups, adapter=adapter, family="parallel")
    state, found = run.step(run.state(), tiny.batch(8))
    assert float(found["grad_norm"]) > 0 and run.model.stacks == (3,)
