"""PEFT's format: the same logits in torch, both ways, and what is refused."""

import ast
import dataclasses
import functools
import inspect
import json
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from fmjax import convert
from fmjax.adapters import ia3, lora, merge, peft, peft_loading, peft_settings, prefix, prompt
from fmjax.errors import CheckpointError, ConfigError
from fmjax.models import bert, param_init
from fmjax.params import paths

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# PEFT 0.21 asks transformers 5.23 for a name that is being given up, and warns of tied tables.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
SIZES = dict(vocab_size=61, width=16, depth=3, heads=2, mlp=24, max_len=20)
# A head with mean pooling, which the config of a base without a head does not record.
MODERN = dict(variant="modernbert_tiny", lm_head=False, classes={"classify": 3}, pool="mean")
IDS = np.random.default_rng(0).integers(5, 61, (2, 9))
FEW = r"block_0[12]/attn/(query|value)"  # of which GPT-2 has one matrix, with the keys
TARGETS = ((FEW, 2), (r"block_.*/(attn|mlp)/(query|value|up)", 3))
KINDS = {
    "lora": dict(targets=TARGETS, alpha=6),
    "rslora": dict(targets=TARGETS, alpha=6, scaling="rslora"),
    "dora": dict(targets=TARGETS, alpha=6, dora=True),
    "ia3": dict(targets=((r".*/(key|value)", "output"), (r"block_0[12]/mlp/down", "input"))),
    "embedding": dict(targets=((r"embed/token", 4), *TARGETS), alpha=6),
}


def model_and_base(family="bert", seed=0, **changes):
    """Weights five times their initialisation, for logits of order one."""
    own = {"llama": dict(kv_heads=1), "t5": dict(attention_dropout=0.1, dropout=0.1)}
    model = tiny.model(family, **SIZES | own.get(family, {}) | changes)
    times = 1 if family == "t5" else 5  # whose table has a deviation of 1
    larger = lambda path, x: x if path.endswith("scale") else times * x
    return model, paths.map_names(larger, param_init.init_params(model, jax.random.key(seed)))


def moved(params, scale=0.2):
    """Every leaf of the adapter away from where it starts."""
    rng = np.random.default_rng(1)
    move = lambda path, x: x + scale * rng.standard_normal(x.shape).astype(np.float32)
    return paths.map_names(lambda p, x: move(p, x) if "/lora_" in p or "/ia3_" in p else x, params)


def logits(model, params):
    def run(params):
        ones, positions = jnp.ones_like(IDS), jnp.tile(jnp.arange(IDS.shape[1]), (len(IDS), 1))
        apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
        hidden = apply(jnp.asarray(IDS), ones, positions, jnp.zeros_like(IDS), method="encode")
        if model.decodes:
            hidden = apply(jnp.asarray(IDS), ones, positions, hidden, ones, method="decode")
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

    @functools.cache
    def written(family):
        folder = tmp_path_factory.mktemp("base")
        convert.export(folder, *model_and_base(family))
        return folder

    def load(family="bert", folder=None):
        folder = folder or written(family)
        (name,) = json.loads((folder / "config.json").read_text())["architectures"]
        model = getattr(transformers, name).from_pretrained(folder).eval()
        model.config.pad_token_id = 0
        if name.startswith("Bert"):
            _takes_past_key_values(model.bert)
        return model

    def run(model):
        given = dict(input_ids=torch.tensor(IDS))
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = given["input_ids"]
        with torch.no_grad():
            return model(**given).logits.numpy()

    return torch, reference_peft, load, run


def _takes_past_key_values(trunk):
    """Let PEFT, which looks for that name, give prefixes to a trunk of transformers 5.24, which
    calls it `cache` and knows the old name by a decorator."""
    forward = trunk.forward
    if "cache" in inspect.signature(forward).parameters:
        trunk.forward = lambda *args, past_key_values=None, **kwargs: forward(
            *args, cache=past_key_values, **kwargs
        )


WRITTEN = tiny.by_family(KINDS, ("lora", "gpt2"), ("ia3", "gpt2"), ("lora", "llama"))


@pytest.mark.parametrize(
    "kind, family", [case for case in WRITTEN if case.values != ("embedding", "t5")]
)
def test_torch_gives_the_same_logits_both_ways(kind, family, reference, tmp_path):
    torch, reference_peft, load, run = reference
    base_model, base = model_and_base(family)
    wrap = ia3.wrap if kind == "ia3" else lora.wrap
    model = wrap(base_model, **KINDS[kind])
    params = moved(model.add(base, jax.random.key(2)))
    peft.write(tmp_path / "ours", model, params)
    theirs = reference_peft.PeftModel.from_pretrained(load(family), tmp_path / "ours")
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


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_one_adapter_of_three_matrices_is_read_and_written(dora, reference, tmp_path):
    """As PEFT makes it beside GPT-2's queries, keys and values, and trains it."""
    torch, reference_peft, load, run = reference
    how = dict(r=2, lora_alpha=6, target_modules=["c_attn"], use_dora=dora, fan_in_fan_out=True)
    theirs = reference_peft.get_peft_model(load("gpt2"), reference_peft.LoraConfig(**how)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    base_model, base = model_and_base("gpt2")
    model, params = peft.read(tmp_path / "theirs", base_model, base)
    assert np.abs(run(theirs) - logits(base_model, base)).max() > 0.05
    np.testing.assert_allclose(logits(model, params), run(theirs), atol=1e-5)
    peft.write(tmp_path / "ours", model, params)
    ours = reference_peft.PeftModel.from_pretrained(load("gpt2"), tmp_path / "ours")
    np.testing.assert_allclose(run(ours), run(theirs), atol=1e-5)


def test_parts_of_a_matrix_are_taken_apart_again_and_have_one_scale(tmp_path):
    base_model, base = model_and_base("gpt2")
    targets = (("block_00/attn/key", 3), (".*/(query|value)", 2))
    model = lora.wrap(base_model, targets=((".*/key", 0), *targets[1:]))
    params = model.add(base, jax.random.key(2))  # where every B is zero
    peft.write(tmp_path / "out", model, params)
    again, read = peft.read(tmp_path / "out", base_model, base)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert again.sites() == model.sites()
    tensors = load_file(tmp_path / "out" / peft.WEIGHTS)
    assert {x.shape for x in tensors.values()} == {(4, 16), (48, 4)}
    damaged = json.loads((tmp_path / "out" / peft.BASE).read_text())
    damaged["parts"] = dict.fromkeys(damaged["parts"], [2, 2])
    (tmp_path / "out" / peft.BASE).write_text(json.dumps(damaged))
    with pytest.raises(CheckpointError, match="c_attn has 3 parts"):
        peft.read(tmp_path / "out", base_model, base)
    several = lora.wrap(base_model, targets=targets)
    with pytest.raises(ConfigError, match="one scale beside transformer.h.0.attn.c_attn"):
        peft.write(tmp_path / "none", several, several.add(base, jax.random.key(2)))
    inputs = ia3.wrap(base_model, targets=((".*/key", "input"),))
    with pytest.raises(ConfigError, match="scales the input of all of transformer.h.0.attn.c_attn"):
        peft.write(tmp_path / "none", inputs, inputs.add(base, jax.random.key(2)))


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
    again, read = peft.read(folder, stacked, paths.restack(base, (3,)))
    assert again.stacks == (1, 2)
    np.testing.assert_allclose(
        logits(again, read), logits(again.clone(stacks=None), params), atol=1e-5
    )


def test_the_file_is_what_peft_documents(written):
    folder, _, _, _, params = written
    config = json.loads((folder / peft.CONFIG).read_text())
    value = "bert.encoder.layer.{}.attention.self.value"
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    query = value.replace("value", "query")
    assert config["rank_pattern"] == {x.format(i): 2 for x in (query, value) for i in (1, 2)}
    tensors = load_file(folder / peft.WEIGHTS)
    assert len(tensors) == 2 * 3 * 3
    leaves = params["block_01"]["attn"]["value"]
    key = f"base_model.model.{value.format(1)}.lora_{{}}.weight"
    np.testing.assert_array_equal(tensors[key.format("A")], leaves["lora_a"].T)
    np.testing.assert_array_equal(tensors[key.format("B")], leaves["lora_b"].T)


def test_target_modules_are_the_shortest_names_of_what_is_adapted_alone():
    layer = "bert.encoder.layer.{}.{}"
    attention = ("attention.self.query", "attention.self.key", "attention.output.dense")
    parts = (*attention, "output.dense")
    everything = {layer.format(i, part) for i in range(3) for part in parts}
    short = lambda names, **more: peft_settings.shortened(
        {"target_modules": sorted(names), **more}, everything
    )
    queries = {name for name in everything if name.endswith("query")}
    assert short(queries)["target_modules"] == ["query"]
    outside = {layer.format(i, "attention.output.dense") for i in range(3)}
    assert short(queries | outside)["target_modules"] == ["attention.output.dense", "query"]
    dense = {name for name in everything if name.endswith("dense")}
    assert short(dense)["target_modules"] == ["dense"]
    some = {layer.format(i, "attention.self.key") for i in (0, 2)}
    assert short(some)["target_modules"] == ["0.attention.self.key", "2.attention.self.key"]
    # IA³'s feedforward modules are target modules too, by the same names.
    both = short(dense, feedforward_modules=sorted(outside))
    assert both["feedforward_modules"] == ["attention.output.dense"]
    inner = {f"{i}.output.dense" for i in range(3)}
    assert both["target_modules"] == sorted({"attention.output.dense"} | inner)


def test_the_base_is_a_folder_a_hub_id_or_an_export(tmp_path):
    origin = lambda source: tuple(peft_settings.origin(str(source)).values())
    assert origin("google-bert/bert-base-uncased@1a2b") == ("google-bert/bert-base-uncased", "1a2b")
    assert origin("") == (None, None)
    (tmp_path / "config.json").write_text("{}")
    assert origin(tmp_path) == (str(tmp_path), None)
    (tmp_path / "checkpoints").mkdir()  # a run, which transformers does not open
    assert origin(tmp_path) == (None, None)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    assert origin(tmp_path) == (f"{tmp_path}/export", None)


@pytest.mark.parametrize(
    "family, changes, head, task",
    [
        ("bert", dict(lm_head=False, classes={"classify": 3}), "classify|pooler", "SEQ_CLS"),
        ("bert", MODERN, "classify|pooler", "SEQ_CLS"),
        ("bert", dict(lm_head=False, classes={"tag": 3}), "tag", "TOKEN_CLS"),
        ("bert", dict(lm_head=False, classes={"span": 2}), "span", "QUESTION_ANS"),
        ("llama", dict(lm_head=False, classes={"regress": 1}), "regress", "SEQ_CLS"),
        ("gpt2", {}, "", "CAUSAL_LM"),
        ("t5", {}, "", "SEQ_2_SEQ_LM"),
    ],
)
def test_the_printed_command_loads_base_adapter_and_labels(
    family, changes, head, task, reference, tmp_path
):
    torch, reference_peft, *_ = reference
    base_model, base = model_and_base(family, **changes)
    # The base is one without the head, as a published one is.
    bare, trunk = model_and_base(family, **{k: changes[k] for k in changes if k == "variant"})
    whole = paths.unstack(base)
    shared = {name: whole.get(name, x) for name, x in paths.unstack(trunk).items()}
    convert.export(tmp_path / "base", bare, paths.stack(shared, bare.stacks))
    model = lora.wrap(base_model, targets=((".*/query", 2),))
    params = moved(model.add(base, jax.random.key(2)))
    folder = str(tmp_path / "out")
    settings = peft.write(folder, model, params, heads=head, source=str(tmp_path / "base"))
    assert settings["task_type"] == task
    assert settings["target_modules"] in (["query"], ["q_proj"], ["c_attn"], ["q"], ["Wqkv"])
    names = ("bad", "so so", "good")
    opened = SimpleNamespace(
        model=model, labels=names, config=SimpleNamespace(init="given"), several=False
    )
    line = peft_loading.command(folder, settings, opened)
    call = ast.parse(line.removeprefix("to load: "), mode="eval").body
    assert call.func.value.value.id == "peft" and call.func.attr == "from_pretrained"
    options = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
    auto = getattr(reference_peft, call.func.value.attr)
    loaded = auto.from_pretrained(*map(ast.literal_eval, call.args), **options).eval()
    if task in ("SEQ_CLS", "TOKEN_CLS") and "regress" not in head:
        assert loaded.config.id2label == dict(enumerate(names))
    loaded.config.pad_token_id = 0
    given = dict(input_ids=torch.tensor(IDS))
    if family == "t5":
        given["decoder_input_ids"] = given["input_ids"]
    with torch.no_grad():
        found = loaded(**given)
    if family == "bert" and task == "SEQ_CLS":
        np.testing.assert_allclose(found.logits, classes(model, params), atol=2e-5)
    if head == "":
        np.testing.assert_allclose(found.logits, logits(model, params), atol=2e-5)


def test_the_command_names_what_is_missing():
    settings = {"task_type": None, "base_model_name_or_path": None}
    model = SimpleNamespace(cfg=SimpleNamespace(classes=()))
    opened = SimpleNamespace(
        model=model, labels=(), config=SimpleNamespace(init="runs/mlm-1"), several=False
    )
    line = peft_loading.command("a", settings, opened)
    assert "--config=configs/export.py --config.folder=runs/mlm-1, then" in line
    assert "AutoModelForMaskedLM.from_pretrained('runs/mlm-1/export'), 'a')" in line
    opened.config.init = ""
    assert "made itself" in peft_loading.command("a", settings, opened)


@pytest.mark.parametrize(
    "classes, several, task, source, said",
    [
        ({"choose": 1}, False, None, {}, ", classifier_pooling='mean')"),
        ({"tag": 2}, False, "TOKEN_CLS", {}, "from_pretrained('a', num_labels=2)"),
        ({"regress": 1}, False, "SEQ_CLS", {}, "num_labels=1, problem_type='regression', cl"),
        ({"classify": 2}, False, "SEQ_CLS", {}, "problem_type='single_label_classification'"),
        ({"classify": 2}, True, "SEQ_CLS", {}, "problem_type='multi_label_classification'"),
        ({"choose": 1}, False, None, {"revision": "86b5e09"}, "revision='86b5e09')"),
    ],
)
def test_the_command_says_what_the_base_does_not(classes, several, task, source, said):
    """As the config.json of a merged export would have it."""
    settings = {"task_type": task, "base_model_name_or_path": "base", **source}
    model = tiny.model("bert", variant="modernbert_tiny", pool="mean", classes=classes)
    opened = SimpleNamespace(model=model, labels=(), several=several)
    assert said in peft_loading.command("a", settings, opened)


def test_an_export_of_another_step_is_not_named_as_the_base(tmp_path):
    base_model, base = model_and_base()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    model = lora.wrap(base_model, targets=((".*/query", 2),))
    params = moved(model.add(base, jax.random.key(2)))
    source = str(run)

    def named(out):
        settings = peft.write(tmp_path / out, model, params, heads="", source=source)
        return settings["base_model_name_or_path"]

    assert named("a") is None
    convert.export(run / "export", base_model, jax.tree.map(lambda x: 2 * x, base))
    assert named("b") is None
    shutil.rmtree(run / "export")
    convert.export(run / "export", base_model, base)
    assert named("c") == f"{source}/export"


def test_another_base_is_refused(written):
    folder, model, *_ = written
    with pytest.raises(CheckpointError, match="made for another base"):
        peft.read(folder, *model_and_base(seed=1))


def test_the_digest_tells_bases_apart_and_nothing_else(written):
    _, model, base, adapted, params = written
    assert peft.digest(base) == peft.digest(params)
    assert peft.digest(paths.restack(base, (3,))) == peft.digest(base)
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
        (dict(kasa_config={"beta": 1e-4}), "kasa_config={'beta': 0.0001} is not supported"),
        (dict(of_next_year=0), "of_next_year=0 is not supported"),
        (dict(ensure_weight_tying=True), "ensure_weight_tying=True is not supported"),
        (dict(init_lora_weights="pissa_niter_4"), "changes the base"),
        (dict(init_lora_weights="lora_ga"), "changes the base"),
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


def test_settings_that_are_null_or_harmless_are_read(written):
    folder, model, base, *_ = written
    config = json.loads((folder / peft.CONFIG).read_text())
    config |= dict(of_next_year=None, eva_config={"rho": 2.0}, init_lora_weights="eva")
    (folder / peft.CONFIG).write_text(json.dumps(config))
    peft.read(folder, model, base)


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "PromptTuningConfig"])
def test_defaults_of_peft_are_known(kind, reference):
    """What PEFT writes by default is no reason to refuse; so fails a PEFT with new settings."""
    _, reference_peft, *_ = reference
    settings = getattr(reference_peft, kind)().to_dict()
    unknown = {key for key, value in settings.items() if value is not None}
    assert unknown <= peft_settings.KNOWN


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


# --- tables of tokens and outputs, of which PEFT writes the base's own too ---


def adapted_tables(reference, modules, family="llama", tied=False, **settings):
    """(the base, its parameters, PEFT's model with an adapter of `modules` away from zero)."""
    torch, reference_peft, load, _ = reference
    base_model, base = model_and_base(family, tied=tied)
    folder = settings.pop("folder")
    convert.export(folder, base_model, base)
    config = reference_peft.LoraConfig(r=3, lora_alpha=6, target_modules=modules, **settings)
    theirs = reference_peft.get_peft_model(load(folder=folder), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return base_model, base, theirs


@pytest.mark.parametrize(
    "modules, tied",
    [(["embed_tokens", "q_proj"], True), (["embed_tokens", "lm_head"], False)],
)
def test_an_adapter_of_the_table_or_the_output_is_read(modules, tied, reference, tmp_path):
    *_, run = reference
    base_model, base, theirs = adapted_tables(reference, modules, tied=tied, folder=tmp_path / "b")
    theirs.save_pretrained(tmp_path / "theirs")
    keys = load_file(tmp_path / "theirs" / peft.WEIGHTS).keys()
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys
    model, params = peft.read(tmp_path / "theirs", base_model, base)
    assert np.abs(run(theirs) - logits(base_model, base)).max() > 0.05
    np.testing.assert_allclose(logits(model, params), run(theirs), atol=1e-5)


def test_another_table_than_the_base_has_is_refused(reference, tmp_path):
    base_model, base, theirs = adapted_tables(reference, ["embed_tokens"], folder=tmp_path / "b")
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / peft.WEIGHTS
    tensors, key = load_file(file), "base_model.model.model.embed_tokens.base_layer.weight"
    table = tensors[key]
    save_file(tensors | {key: table + np.eye(*table.shape, dtype=np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"holds another model.embed_tokens.base_layer"):
        peft.read(tmp_path / "theirs", base_model, base)
    save_file(tensors | {key: np.concatenate([table, table[:2]])}, file)
    with pytest.raises(CheckpointError, match=r"\(63, 16\), the base one of \(61, 16\).*resized"):
        peft.read(tmp_path / "theirs", base_model, base)


def test_an_adapter_of_a_tied_output_is_refused_by_its_name(reference, tmp_path):
    base_model, base, theirs = adapted_tables(
        reference, ["lm_head"], tied=True, folder=tmp_path / "b"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="adapts lm_head, which in this model is the table"):
        peft.read(tmp_path / "theirs", base_model, base)


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
        if model.decodes:
            hidden = apply(jnp.asarray(IDS), ones, positions, hidden, ones, method="decode")
        return apply(hidden, ones, "classify", method="classify")

    return np.asarray(jax.jit(run)(params))


def shaken(params):
    """Prompts and prefixes of order one."""
    rng = np.random.default_rng(1)
    move = lambda x: x + 0.5 * rng.standard_normal(x.shape).astype(np.float32)
    own = lambda path: "/prompt_" in path or "/prefix_" in path
    return paths.map_names(lambda path, x: move(x) if own(path) else x, params)


def test_an_adapter_of_a_table_that_has_copies_is_not_written(tmp_path):
    base_model, base = model_and_base("t5")
    model = lora.wrap(base_model, **KINDS["embedding"])
    with pytest.raises(ConfigError, match="no place for an adapter of embed/token"):
        peft.write(tmp_path / "out", model, model.add(base, jax.random.key(2)))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompts_of_an_encoder_decoder_are_not_written(kind, tmp_path):
    model, base = model_and_base("t5")
    model = PROMPTS[kind](model)
    with pytest.raises(ConfigError, match="a form of its own.*keep the run's folder"):
        peft.write(tmp_path / "out", model, model.add(base, jax.random.key(2)))


OF_ONE = [case for case in tiny.by_family(PROMPTS, ("prompt", "gpt2")) if "t5" not in case.values]


@pytest.mark.parametrize("kind, family", OF_ONE)
def test_prompts_give_the_same_logits_both_ways(kind, family, reference, tmp_path):
    _, reference_peft, load, run = reference
    base_model, base = model_and_base(family, **CLASSIFY)
    convert.export(tmp_path / "base", base_model, base)
    np.testing.assert_allclose(
        run(load(folder=tmp_path / "base")), classes(base_model, base), atol=1e-5
    )

    model = PROMPTS[kind](base_model)
    if base_model.causal and kind not in ("prefix", "projected"):
        settings = dataclasses.replace(model.adapter, whole="token")
        model = dataclasses.replace(model, adapter=settings)
    params = shaken(model.add(base, jax.random.key(2)))
    params["head"]["classify"]["kernel"] *= 2
    if family == "bert":
        params["head"]["pooler"]["kernel"] *= 1.5
    peft.write(tmp_path / "ours", model, params, heads="classify|pooler")
    theirs = reference_peft.PeftModel.from_pretrained(
        load(folder=tmp_path / "base"), tmp_path / "ours"
    ).eval()
    ours = classes(model, params)
    assert np.abs(ours - classes(base_model, base)).max() > 0.1
    np.testing.assert_allclose(run(theirs), ours, atol=2e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    again, read = peft.read(tmp_path / "theirs", base_model, base)
    if family == "bert":  # of heads PEFT saves the classifier alone
        read["head"]["pooler"] = params["head"]["pooler"]
    np.testing.assert_allclose(classes(again, read), run(theirs), atol=2e-5)


@pytest.mark.parametrize(
    "kind, family", [("prompt", "llama"), ("prefix", "gpt2"), ("projected", "llama")]
)
def test_what_writes_has_a_prompt_before_its_text(kind, family, reference, tmp_path):
    """The task CAUSAL_LM, in which PEFT gives logits of the prompt too."""
    _, reference_peft, load, run = reference
    base_model, base = model_and_base(family)
    model = prompt.wrap(base_model, length=4) if kind == "prompt" else PROMPTS[kind](base_model)
    params = shaken(model.add(base, jax.random.key(2)))
    peft.write(tmp_path / "ours", model, params)
    assert json.loads((tmp_path / "ours" / peft.CONFIG).read_text())["task_type"] == "CAUSAL_LM"
    theirs = reference_peft.PeftModel.from_pretrained(load(family), tmp_path / "ours").eval()
    ours, found = logits(model, params), run(theirs)[:, -IDS.shape[1] :]
    assert np.abs(ours - logits(base_model, base)).max() > 0.1
    np.testing.assert_allclose(found, ours, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again, read = peft.read(tmp_path / "theirs", base_model, base)
    np.testing.assert_allclose(logits(again, read), found, atol=1e-5)


def test_what_peft_cannot_say_of_a_prompt_is_refused(tmp_path):
    base_model = bert.Model("tiny", **SIZES, **CLASSIFY)
    base = param_init.init_params(base_model, jax.random.key(0))
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
        peft.read(tmp_path / "three", wide, param_init.init_params(wide, jax.random.key(0)))
