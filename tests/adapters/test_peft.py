"""PEFT's format: the same logits in torch, both ways, and what is refused."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmjax import convert, state, trees
from fmjax.adapters import ia3, lora, merge, peft, prefix, prompt
from fmjax.errors import CheckpointError, ConfigError
from fmjax.models import bert

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# PEFT 0.21 asks transformers 5.23 for a name that is being given up, and warns of tied tables.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
SIZES = dict(vocab_size=61, width=16, depth=3, heads=2, mlp=24, max_len=20)
IDS = np.random.default_rng(0).integers(5, 61, (2, 9))
TARGETS = ((r"block_0[12]/attn/value", 2), (r"block_.*/(attn|mlp)/(query|value|up)", 3))
KINDS = {
    "lora": dict(targets=TARGETS, alpha=6),
    "rslora": dict(targets=TARGETS, alpha=6, scaling="rslora"),
    "dora": dict(targets=TARGETS, alpha=6, dora=True),
    "ia3": dict(targets=((r".*/(key|value)", "output"), (r"block_0[12]/mlp/down", "input"))),
    "embedding": dict(targets=((r"embed/token", 4), *TARGETS), alpha=6),
}


def model_and_base(seed=0):
    """Weights five times their initialisation, for logits of order one."""
    model = bert.Model("tiny", **SIZES)
    larger = lambda path, x: x if path.endswith("scale") else 5 * x
    return model, trees.map_names(larger, state.init_params(model, jax.random.key(seed)))


def moved(params, scale=0.2):
    """Every leaf of the adapter away from where it starts."""
    rng = np.random.default_rng(1)
    move = lambda path, x: x + scale * rng.standard_normal(x.shape).astype(np.float32)
    return trees.map_names(lambda p, x: move(p, x) if "/lora_" in p or "/ia3_" in p else x, params)


def logits(model, params):
    def run(params):
        ones, positions = jnp.ones_like(IDS), jnp.tile(jnp.arange(IDS.shape[1]), (len(IDS), 1))
        apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
        hidden = apply(jnp.asarray(IDS), ones, positions, jnp.zeros_like(IDS), method="encode")
        return apply(hidden, method="logits")

    return np.asarray(jax.jit(run)(params))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(torch, PEFT, a function that loads the base anew)."""
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    reference_peft = pytest.importorskip("peft", reason="PEFT, the reference, is not installed")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base")
    convert.export(folder, *model_and_base())
    load = lambda: transformers.BertForMaskedLM.from_pretrained(folder).eval()

    def run(model):
        with torch.no_grad():
            return model(input_ids=torch.tensor(IDS)).logits.numpy()

    return torch, reference_peft, load, run


@pytest.mark.parametrize("kind", KINDS)
def test_torch_gives_the_same_logits_both_ways(kind, reference, tmp_path):
    torch, reference_peft, load, run = reference
    base_model, base = model_and_base()
    wrap = ia3.wrap if kind == "ia3" else lora.wrap
    model = wrap(base_model, **KINDS[kind])
    params = moved(model.add(base, jax.random.key(2)))
    peft.write(tmp_path / "ours", model, params)
    theirs = reference_peft.PeftModel.from_pretrained(load(), tmp_path / "ours")
    ours = logits(model, params)
    assert np.abs(ours - logits(base_model, base)).max() > 0.05
    np.testing.assert_allclose(run(theirs), ours, atol=1e-5)

    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.mul_(1.1)
    theirs.save_pretrained(tmp_path / "theirs")
    again, params = peft.read(tmp_path / "theirs", base_model, base)
    np.testing.assert_allclose(logits(again, params), run(theirs), atol=1e-5)
    assert np.abs(run(theirs) - ours).max() > 0.005


def test_heads_go_with_the_adapter(reference, tmp_path):
    _, reference_peft, load, run = reference
    model, base = model_and_base()
    model = lora.wrap(model, targets=TARGETS)
    params = moved(model.add(base, jax.random.key(2)))
    params["head"]["mlm"]["dense"]["kernel"] *= 2
    peft.write(tmp_path / "out", model, params, heads="mlm/dense")
    theirs = reference_peft.PeftModel.from_pretrained(load(), tmp_path / "out")
    np.testing.assert_allclose(run(theirs), logits(model, params), atol=1e-5)


@pytest.fixture
def written(tmp_path):
    model, base = model_and_base()
    adapted = lora.wrap(model, **KINDS["lora"])
    params = moved(adapted.add(base, jax.random.key(2)))
    peft.write(tmp_path / "out", adapted, params)
    return tmp_path / "out", model, base, adapted, params


def test_the_round_trip_keeps_every_bit_and_stacks_anew(written):
    folder, model, base, _, params = written
    again, read = peft.read(folder, model, base)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    stacked = model.clone(stacks=(3,))
    again, read = peft.read(folder, stacked, trees.restack(base, (3,)))
    assert again.stacks == (1, 2)
    np.testing.assert_allclose(
        logits(again, read), logits(again.clone(stacks=None), params), atol=1e-5
    )


def test_the_file_is_what_peft_documents(written):
    folder, _, _, _, params = written
    config = json.loads((folder / peft.CONFIG).read_text())
    value = "bert.encoder.layer.{}.attention.self.value"
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert config["rank_pattern"] == {value.format(1): 2, value.format(2): 2}
    tensors = load_file(folder / peft.WEIGHTS)
    assert len(tensors) == 2 * 3 * 3
    leaves = params["block_01"]["attn"]["value"]
    key = f"base_model.model.{value.format(1)}.lora_{{}}.weight"
    np.testing.assert_array_equal(tensors[key.format("A")], leaves["lora_a"].T)
    np.testing.assert_array_equal(tensors[key.format("B")], leaves["lora_b"].T)


def test_another_base_is_refused(written):
    folder, model, *_ = written
    with pytest.raises(CheckpointError, match="made for another base"):
        peft.read(folder, *model_and_base(seed=1))


def test_the_digest_tells_bases_apart_and_nothing_else(written):
    _, model, base, adapted, params = written
    assert peft.digest(base) == peft.digest(params)
    assert peft.digest(trees.restack(base, (3,))) == peft.digest(base)
    assert peft.digest(merge.merge(adapted, params)) != peft.digest(base)
    head = {**base, "head": jax.tree.map(lambda x: x + 1, base["head"])}
    assert peft.digest(head) == peft.digest(base)


def rename(tensors):
    return {key.removeprefix("base_model."): x for key, x in tensors.items()}


def drop_one(tensors):
    return {
        key: x for key, x in tensors.items() if "layer.0.attention.self.query.lora_B" not in key
    }


def cut(tensors):
    return {key: np.ascontiguousarray(x[:, :-1]) for key, x in tensors.items()}


@pytest.mark.parametrize(
    "damage, message",
    [
        (rename, "no place for .*'model.bert"),
        (drop_one, "not one of each kind"),
        (cut, "another size"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(damage, message, written):
    folder, model, base, *_ = written
    save_file(damage(load_file(folder / peft.WEIGHTS)), folder / peft.WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        peft.read(folder, model, base)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(peft_type="BOFT"), "reads LORA, IA3"),
        (dict(bias="all"), "bias='all' is not supported"),
        (dict(init_lora_weights="pissa_niter_4"), "changes the base"),
        (dict(lora_alpha="much"), "lora_alpha='much' is not understood"),
        (dict(alpha_pattern={"(": 1}), "alpha_pattern has"),
    ],
)
def test_configs_of_another_kind_are_refused(change, message, written):
    folder, model, base, *_ = written
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=message):
        peft.read(folder, model, base)


def test_a_folder_in_use_is_not_overwritten(written):
    folder, _, _, adapted, params = written
    with pytest.raises(ConfigError, match="is not empty"):
        peft.write(folder, adapted, params)


def test_a_write_that_reads_back_differently_is_not_trusted(tmp_path, monkeypatch):
    model, base = model_and_base()
    model = lora.wrap(model, **KINDS["lora"])
    params = moved(model.add(base, jax.random.key(2)))
    save = lambda tensors, *args, **kw: save_file(
        {k: 2 * x for k, x in tensors.items()}, *args, **kw
    )
    monkeypatch.setattr(peft, "save_file", save)
    with pytest.raises(CheckpointError, match="reads back differently"):
        peft.write(tmp_path / "out", model, params)


# --- prompts and prefixes, which PEFT puts before a model for a task ---

CLASSIFY = dict(lm_head=False, classes={"classify": 3})
PROMPTS = {
    "prompt": lambda model: prompt.wrap(model, length=4, whole="prompt"),
    "mlp": lambda model: prompt.wrap(model, length=4, encoder="mlp", hidden=8, whole="prompt"),
    "lstm": lambda model: prompt.wrap(model, length=4, encoder="lstm", hidden=8, whole="prompt"),
    "prefix": lambda model: prefix.wrap(model, length=4),
    "projected": lambda model: prefix.wrap(model, length=4, hidden=8),
}


def classes(model, params):
    def run(params):
        ones, positions = jnp.ones_like(IDS), jnp.tile(jnp.arange(IDS.shape[1]), (len(IDS), 1))
        apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
        hidden = apply(jnp.asarray(IDS), ones, positions, jnp.zeros_like(IDS), method="encode")
        return apply(hidden, ones, "classify", "first", method="classify")

    return np.asarray(jax.jit(run)(params))


def shaken(params):
    """Prompts and prefixes of order one."""
    rng = np.random.default_rng(1)
    move = lambda x: x + 0.5 * rng.standard_normal(x.shape).astype(np.float32)
    own = lambda path: "/prompt_" in path or "/prefix_" in path
    return trees.map_names(lambda path, x: move(x) if own(path) else x, params)


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_give_the_same_logits_both_ways(kind, reference, tmp_path):
    torch, reference_peft, _, run = reference
    import transformers

    base_model = bert.Model("tiny", **SIZES, **CLASSIFY)
    larger = lambda path, x: x if path.endswith("scale") else 5 * x
    base = trees.map_names(larger, state.init_params(base_model, jax.random.key(0)))
    convert.export(tmp_path / "base", base_model, base)
    load = lambda: transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "base"
    ).eval()
    np.testing.assert_allclose(run(load()), classes(base_model, base), atol=1e-5)

    model = PROMPTS[kind](base_model)
    params = shaken(model.add(base, jax.random.key(2)))
    params["head"]["classify"]["kernel"] *= 2
    params["head"]["pooler"]["kernel"] *= 1.5
    peft.write(tmp_path / "ours", model, params, heads="classify|pooler")
    theirs = reference_peft.PeftModel.from_pretrained(load(), tmp_path / "ours").eval()
    ours = classes(model, params)
    assert np.abs(ours - classes(base_model, base)).max() > 0.1
    np.testing.assert_allclose(run(theirs), ours, atol=2e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    again, read = peft.read(tmp_path / "theirs", base_model, base)
    # Of heads PEFT saves the classifier alone.
    read["head"]["pooler"] = params["head"]["pooler"]
    np.testing.assert_allclose(classes(again, read), run(theirs), atol=2e-5)


def test_what_peft_cannot_say_of_a_prompt_is_refused(tmp_path):
    base_model = bert.Model("tiny", **SIZES, **CLASSIFY)
    base = state.init_params(base_model, jax.random.key(0))
    model = prompt.wrap(base_model, length=4)
    params = model.add(base, jax.random.key(2))
    with pytest.raises(ConfigError, match="whole='token', but in PEFT the head of a SEQ_CLS"):
        peft.write(tmp_path / "one", model, params, heads="classify")
    with pytest.raises(ConfigError, match="for one of its tasks only"):
        peft.write(tmp_path / "two", prompt.wrap(base_model, length=4, whole="prompt"), params)
    peft.write(
        tmp_path / "three",
        prefix.wrap(base_model, length=4),
        prefix.wrap(base_model, length=4).add(base, jax.random.key(2)),
        heads="classify",
    )
    wide = bert.Model("tiny", **SIZES | dict(depth=2), **CLASSIFY)
    (tmp_path / "three" / peft.BASE).unlink()
    with pytest.raises(CheckpointError, match=r"vectors are \(4, 96\), those of the model 64 wide"):
        peft.read(tmp_path / "three", wide, state.init_params(wide, jax.random.key(0)))
