"""Hugging Face folders without torch: names, files, errors, shardings."""

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmjax import convert
from fmjax.convert.bert import SHARED, TABLES, TIED
from fmjax.errors import CheckpointError, ConfigError
from fmjax.models import bert
from fmjax.params import paths, sharding

SIZES = dict(vocab_size=64, width=16, heads=2, mlp=32, depth=4, max_len=16)
VARIANTS = ["tiny", "roberta_base", "distilbert", "modernbert_base"]


def make(variant, scanned=True, **overrides):
    """A tiny model and random parameters: in float32 every bit of them is random."""
    if variant == "tiny":
        overrides.setdefault("classes", {"nsp": 2})
    model = bert.Model(variant, **SIZES | overrides)
    model = model.clone(stacks=paths.runs(model.kinds) if scanned else None)
    rng = np.random.default_rng(0)
    shapes = abstract(model)
    return model, paths.map_names(
        lambda _, leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )


@functools.cache
def abstract(model):
    ids = jnp.ones((1, 4), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids, ids)["params"]


def assert_equal(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), one, other)


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request, tmp_path_factory):
    model, params = make(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    assert convert.export(folder, model, params) == ()
    return folder, model, params


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT's folder that a test may damage."""
    convert.export(tmp_path / "hf", *make("tiny"))
    return tmp_path / "hf"


def edit(folder, change):
    """Rewrites model.safetensors with `change(tensors)` applied."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()},
        folder / "model.safetensors",
    )


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- Round trips ---


def test_round_trip_stacked_and_not(exported):
    folder, model, params = exported
    again, report = convert.load(folder, abstract(model))
    assert report == ((), ())
    assert_equal(again, params)
    unrolled = model.clone(stacks=None)
    assert_equal(convert.load(folder, abstract(unrolled))[0], paths.restack(params, None))


def test_described_options_rebuild_the_model(exported):
    folder, model, _ = exported
    name, options = convert.describe(folder)
    assert name == "bert"
    assert bert.Model("base", **options).cfg == model.cfg


def test_eight_devices_hold_what_one_holds(exported):
    folder, model, params = exported
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shapes = abstract(model)
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        sharding.shardings(shapes, mesh),
    )
    placed, _ = convert.load(folder, like)
    jax.tree.map(lambda array, leaf: array.sharding == leaf.sharding or pytest.fail(), placed, like)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(placed))
    assert_equal(placed, params)


def test_export_of_sharded_parameters_in_several_files(exported, tmp_path):
    folder, model, params = exported
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(params, sharding.shardings(params, mesh))
    convert.export(tmp_path / "out", model, params, max_file_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 2 and {path.name for path in files} == set(index["weight_map"].values())
    assert all(path.stat().st_size < 30_000 for path in files)
    joined = {key: value for path in files for key, value in load_file(path).items()}
    single = load_file(folder / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in single.values())
    assert_equal(joined, single)
    again, report = convert.load(tmp_path / "out", abstract(model))
    assert report == ((), ())
    assert_equal(again, params)


# --- Names ---


def test_fused_rows_are_query_key_value_and_up_gate(tmp_path):
    model, params = make("modernbert_base", scanned=False)
    convert.export(tmp_path / "out", model, params)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    attn, mlp = params["block_02"]["attn"], params["block_02"]["mlp"]
    qkv = np.concatenate([np.asarray(attn[name]["kernel"]).T for name in ("query", "key", "value")])
    wi = np.concatenate([np.asarray(mlp[name]["kernel"]).T for name in ("up", "gate")])
    np.testing.assert_array_equal(tensors["model.layers.2.attn.Wqkv.weight"], qkv)
    np.testing.assert_array_equal(tensors["model.layers.2.mlp.Wi.weight"], wi)


def test_bare_trunks_and_old_norm_names_load(exported, tmp_path):
    folder, model, params = exported
    old = {}
    for key, value in load_file(folder / "model.safetensors").items():
        key = re.sub(r"^(bert|roberta|distilbert|model)\.", "", key)
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[key.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    old["embeddings.position_ids"] = np.arange(16)[None]
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again, report = convert.load(tmp_path, abstract(model))
    assert report == ((), ())
    assert_equal(again, params)


def test_tied_copies_must_be_copies(folder):
    copy, original = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    assert TIED[copy] == original
    model, params = make("tiny")
    edit(folder, lambda tensors: tensors.update({copy: tensors[original]}))
    again, report = convert.load(folder, abstract(model))
    assert report.unused == ()
    edit(folder, lambda tensors: tensors.update({copy: tensors[original] + 1}))
    with pytest.raises(CheckpointError, match="not tied"):
        convert.load(folder, abstract(model))


def test_a_bias_under_its_tied_name_alone(folder):
    edit(
        folder, lambda t: t.update({"cls.predictions.decoder.bias": t.pop("cls.predictions.bias")})
    )
    model, params = make("tiny")
    assert_equal(convert.load(folder, abstract(model))[0], params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_float_types_become_float32(folder, dtype):
    edit(folder, lambda t: t.update({key: value.astype(dtype) for key, value in t.items()}))
    model, params = make("tiny")
    again, _ = convert.load(folder, abstract(model))
    assert_equal(
        again, jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), params)
    )


def test_tables_are_one_to_one_but_for_heads_that_share_a_name():
    for table in TABLES.values():
        alone = [
            theirs for ours, theirs in table.items() if ours.removeprefix("head/") not in SHARED
        ]
        shared = set(table.values()) - set(alone)
        # ModernBERT's tasks go on with the layer of its masked language model.
        twice = {"head.dense", "head.norm"} if table is TABLES["modernbert"] else set()
        assert {name for name in alone if alone.count(name) > 1} == twice
        assert shared <= {"classifier", "classifier.out_proj", "qa_outputs"}


# --- Heads ---


def test_missing_heads_keep_their_initialisation(folder):
    edit(folder, lambda t: [t.pop(key) for key in list(t) if key.startswith("cls.")])
    model, params = make("tiny")
    initial = lambda: model.init(jax.random.key(1), *[jnp.ones((1, 4), jnp.int32)] * 4)["params"]
    again, report = convert.load(
        folder, abstract(model), may_miss="head/(mlm|nsp)/.*", initial=initial
    )
    assert set(report.kept) == {n for n in paths.unstack(params) if re.match("head/(mlm|nsp)", n)}
    assert "newly initialised: head/mlm/bias" in str(report)
    fresh = jax.jit(initial)()
    for head in ("mlm", "nsp"):
        assert_equal(again["head"][head], fresh["head"][head])
    for rest in ("embed", "blocks_00_03"):
        assert_equal(again[rest], params[rest])
    assert_equal(again["head"]["pooler"], params["head"]["pooler"])


def test_unused_tensors_are_reported(folder):
    model = bert.Model("tiny", **SIZES)
    _, report = convert.load(folder, abstract(model))
    assert report.kept == ()
    assert report.unused == (
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    )


def test_heads_without_a_counterpart_are_left_out_and_named(tmp_path):
    left_out = convert.export(tmp_path / "out", *make("tiny", classes={"sop": 2}))
    assert left_out == (
        "head/pooler/bias", "head/pooler/kernel", "head/sop/bias", "head/sop/kernel",
    )  # fmt: skip
    assert "classes" not in convert.describe(tmp_path / "out")[1]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]


# --- What does not fit ---


def test_missing_and_misshapen_parameters_are_listed(folder):
    def damage(tensors):
        del tensors["bert.encoder.layer.2.output.dense.weight"]
        tensors["bert.embeddings.word_embeddings.weight"] = np.zeros((60, 16), np.float32)

    edit(folder, damage)
    with pytest.raises(CheckpointError) as error:
        convert.load(folder, abstract(make("tiny")[0]), may_miss=".*/mlp/.*")
    text = str(error.value)
    assert "block_02/mlp/down/kernel: (32, 16) in the model, not in the files" in text
    assert "embed/token/embedding: (64, 16) in the model, (60, 16) in the files" in text
    assert '"vocab_size": 64' in text


def test_a_deeper_model_misses_its_layers(folder):
    with pytest.raises(CheckpointError, match=r"block_04/attn/key/bias[\s\S]*… and 12 more"):
        convert.load(folder, abstract(make("tiny", depth=6)[0]))


def test_integers_are_not_weights(folder):
    edit(folder, lambda t: t.update({"cls.predictions.bias": np.zeros(64, np.int8)}))
    with pytest.raises(CheckpointError, match="head/mlm/bias: I8 in the files"):
        convert.load(folder, abstract(make("tiny")[0]))


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*safetensors only"):
        convert.load(folder, abstract(make("tiny")[0]))


def test_damaged_and_lost_files(folder):
    model = make("tiny")[0]
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert.load(folder, abstract(model))
    path.unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        convert.load(folder, abstract(model))
    for name in ("gone.safetensors", "../hf/config.json"):
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": name}})
        )
        with pytest.raises(CheckpointError, match="lacks files"):
            convert.load(folder, abstract(model))


@pytest.mark.parametrize(
    "variant, changes, message",
    [
        ("tiny", dict(model_type="brt"), "Did you mean 'bert'"),
        ("tiny", dict(position_embedding_type="relative_key"), "'absolute' only"),
        ("tiny", dict(is_decoder=True), "is_decoder=True"),
        ("tiny", dict(quantization_config={"bits": 4}), "quantization_config"),
        ("tiny", dict(hidden_act="gelu_nwe"), "Did you mean 'gelu_new'"),
        ("roberta_base", dict(pad_token_id=None), "pad_token_id"),
        ("modernbert_base", dict(mlp_dropout=0.1), "one option here"),
        (
            "modernbert_base",
            dict(layer_types=["full_attention"] * 3 + ["linear_attention"]),
            "layer_types",
        ),
        (
            "modernbert_base",
            dict(rope_parameters={"full_attention": {"rope_type": "yarn"}}),
            "rope_type='yarn'",
        ),
    ],
)
def test_unsupported_options_are_refused(tmp_path, variant, changes, message):
    convert.export(tmp_path / "hf", *make(variant))
    edit_config(tmp_path / "hf", **changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        convert.describe(tmp_path / "hf")


@pytest.mark.parametrize(
    "changes, activation",
    [
        (dict(hidden_act="gelu"), "gelu_tanh"),
        (dict(hidden_act="gelu", hidden_activation="gelu_pytorch_tanh"), "gelu_tanh"),
        (dict(hidden_act="gelu_pytorch_tanh", hidden_activation=None), "gelu_tanh"),
        (dict(hidden_act="silu"), "silu"),
    ],
)
def test_the_gelu_of_the_published_gemma_is_the_tanh_approximation(tmp_path, changes, activation):
    """Their config.json says "gelu"; transformers replaces it."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma"} | changes))
    assert convert.describe(tmp_path)[1]["activation"] == activation


def test_modernbert_options_of_transformers_5(tmp_path):
    convert.export(tmp_path / "hf", *make("modernbert_base"))
    edit_config(
        tmp_path / "hf",
        global_attn_every_n_layers=None,
        layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    )
    options = convert.describe(tmp_path / "hf")[1]
    assert options["full_every"] == 2
    assert (options["theta_full"], options["theta_local"]) == (5e5, 2e4)


@pytest.mark.parametrize(
    "variant, overrides, message",
    [
        ("tiny", dict(head_activation="relu"), "config.model.head_activation='relu'"),
        ("distilbert", dict(eps=1e-6), "config.model.eps=1e-06"),
        ("roberta_base", dict(types=0), "config.model.types=0"),
    ],
)
def test_models_without_a_counterpart_are_not_exported(tmp_path, variant, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        convert.export(tmp_path / "out", *make(variant, **overrides))
    assert not (tmp_path / "out").exists()


def test_export_never_mixes_with_other_files(folder):
    with pytest.raises(ConfigError, match="not empty"):
        convert.export(folder, *make("tiny"))


# --- Tokenizers and the hub ---


def write_tokenizer(folder, pad):
    folder.mkdir()
    tokens = [{"id": pad, "content": "<pad>"}, {"id": 5, "content": "[CLS]"}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    options = {"pad_token": {"content": "<pad>"}, "cls_token": "[CLS]", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    (folder / "unrelated.txt").write_text("no")


def test_tokenizer_files_and_ids_travel(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", pad=7)
    convert.export(tmp_path / "out", *make("modernbert_base"), tmp_path / "tokenizer")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pad_token_id"] == 7 and config["cls_token_id"] == 5
    assert config["bos_token_id"] is None
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_roberta_positions_start_after_the_padding_id(tmp_path):
    write_tokenizer(tmp_path / "one", pad=1)
    write_tokenizer(tmp_path / "seven", pad=7)
    convert.export(tmp_path / "out", *make("roberta_base"), tmp_path / "one")
    with pytest.raises(ConfigError, match="position_shift=2.*needs 8"):
        convert.export(tmp_path / "other", *make("roberta_base"), tmp_path / "seven")


def test_hub_ids_are_fetched_at_their_commit(folder, monkeypatch):
    calls = []

    def download(name, revision, allow_patterns):
        calls.append((name, revision))
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert convert.find(f"org/model@{commit}") == folder
    assert convert.find("org/model", revision=commit) == folder
    with pytest.warns(UserWarning, match="not pinned.*org/model@hf"):
        convert.find("org/model")
    assert calls == [("org/model", commit), ("org/model", commit), ("org/model", None)]


@pytest.mark.parametrize("source", ["/no/such/folder", "./nothing", "a/b/c", "org/none"])
def test_sources_that_are_nowhere(source):
    with pytest.raises(ConfigError, match=re.escape(source)):
        convert.find(source)


# --- Torch stays outside ---


def test_no_file_of_fmjax_imports_torch():
    package = Path(convert.__file__).parent.parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [
                alias.name for alias in getattr(node, "names", []) if isinstance(node, ast.Import)
            ]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "torch"], path


def test_loading_and_exporting_work_where_torch_is_missing(folder, tmp_path):
    code = """if True:
        import sys
        sys.modules["torch"] = None  # importing it raises ImportError
        import jax, jax.numpy as jnp
        from fmjax import convert
        from fmjax.models import bert
        source, target = sys.argv[1:]
        model = bert.Model(**convert.describe(source)[1])
        ids = jnp.ones((1, 4), jnp.int32)
        like = jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids, ids)["params"]
        convert.export(target, model, convert.load(source, like)[0])
    """
    subprocess.run([sys.executable, "-c", code, folder, tmp_path / "out"], check=True)
    assert_equal(*(load_file(path / "model.safetensors") for path in (folder, tmp_path / "out")))
