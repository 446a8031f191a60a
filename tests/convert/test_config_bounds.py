"""Sizes in a config.json that anybody may have written: refused before time or memory is taken."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import pytest

from fmjax import convert
from fmjax.convert import llama_config
from fmjax.errors import CheckpointError, ConfigError
from fmjax.models import llama

SIZES = dict(variant="llama2_7b", vocab_size=32, width=16, heads=2, mlp=24, depth=2, max_len=16)


def abstract(model):
    return jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]


def folder_of(path, **edits):
    """An exported mixture of two experts, with keys of its config.json edited."""
    model = llama.Model(**SIZES, experts=2, experts_per_token=1)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract(model))
    convert.export(path, model, params)
    config = json.loads((path / "config.json").read_text()) | edits
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_experts_that_the_files_do_not_hold_are_not_named_one_by_one(tmp_path):
    """The names of 2 layers of 3 x 2^24 experts take ten gigabytes."""
    folder = folder_of(tmp_path / "hf", num_local_experts=2**24)
    like = abstract(llama.Model(**convert.describe(folder)[1]))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"experts/up/kernel: \(16777216, .*not in the"):
            convert.load(folder, like)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "edits",
    [
        dict(model_type="qwen3_moe", num_hidden_layers=10**12),
        dict(model_type="smollm3", num_hidden_layers=10**12),
        dict(model_type="gemma2", num_hidden_layers=10**12),
        dict(model_type="modernbert", num_hidden_layers=10**12),
        dict(model_type="t5", num_layers=10**12),
    ],
    ids=lambda edits: edits["model_type"],
)
def test_layers_are_counted_before_each_is_described(tmp_path, edits):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 16} | edits))
    with pytest.raises(ConfigError, match="depth: got [12]0{12},"):
        convert.describe(tmp_path)


@pytest.mark.parametrize(
    "kind", ["deberta-v2", "deberta", "phi3", "gpt_neox", "opt", "gemma3", "qwen3_next", "xlnet"]
)
def test_other_families_are_refused_by_their_name(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConfigError, match=f"model_type='{kind}', which fmjax does not have"):
        convert.describe(tmp_path)


def test_a_scale_of_queries_that_no_number_gives_is_not_exported():
    """Gemma has 1 / sqrt(n) of a whole n; the nearest to 0.3 is half a percent away."""
    gemma = dict(norms="around", norm_offset=1.0, embed_scale=True, activation="gelu_tanh")
    sizes = dict(vocab_size=64, width=32, depth=2, heads=2, head_size=16, mlp=64, tied=True)
    model = lambda scale: llama.Model("llama2_7b", **gemma, **sizes, query_scale=scale)
    with pytest.raises(ConfigError, match=r"query_scale=0.3 cannot be exported.*whole number"):
        llama_config.hf_config(model(0.3).cfg, {"lm"}, {})
    config = llama_config.hf_config(model(0.25).cfg, {"lm"}, {})
    assert (config["model_type"], config["query_pre_attn_scalar"]) == ("gemma2", 16)
