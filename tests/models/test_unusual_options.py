"""Options that few checkpoints have: adapters, groups, a mesh and a scan as with any other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fmjax.errors import ConfigError
from fmjax.models import bert, gpt2, llama, t5
from fmjax.params import paths

BIASES = ("attention_bias", "mlp_bias", "norm_bias", "head_bias")
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=8, truncate=False)
VARIANTS = {
    "gpt2": (
        gpt2,
        dict(tied=False, scaled=False, scaled_by_layer=True, dropout=0.0, attention_dropout=0.0),
        {"clm": {}},
    ),
    "bert": (bert, dict(tied=False, dropout=0.0, attention_dropout=0.0), {"mlm": {"rate": 0.3}}),
    "modernbert": (
        bert,
        dict(modern=True, types=0, pooler=False, window=3, window_layers=(0, 2), dropout=0.0)
        | dict.fromkeys(BIASES, True)
        | dict(attention_dropout=0.0, output_bias=False),
        {"mlm": {"rate": 0.3}},
    ),
    "olmo3": (
        llama,
        dict(norms="behind", qk_norm="whole", window=3, window_layers=(0, 1), rope=YARN)
        | dict(theta_window=1e4),
        {"clm": {}},
    ),
    "smollm3": (llama, dict(nope_layers=(0, 2), tied=False), {"clm": {}}),
    "umt5": (
        t5,
        dict(layer_distances=True, encoder_depth=2, head_size=8, buckets=8, far=12),
        {"span_corruption": {"denoisers": ((3.0, 0.3),)}},
    ),
}
GROUPS = ((r".*/lora_.|.*bias|.*distance.*", "train"), (".*", "freeze"))
ADAPTER = dict(name="lora", targets=((r".*/(query|up)", 2),), rank=2, alpha=4.0)


@pytest.mark.slow
@pytest.mark.parametrize("family", VARIANTS)
def test_a_step_with_an_adapter_is_the_same_on_four_devices(family, monkeypatch):
    monkeypatch.setitem(tiny.FAMILIES, family, VARIANTS[family])
    norms, moved = [], []
    for mesh in (tiny.mesh(), tiny.mesh(fsdp=2, tensor=2)):
        run = tiny.make(GROUPS, adapter=ADAPTER, family=family, mesh=mesh)
        with jax.set_mesh(run.mesh):
            state, found = run.step(run.state(), tiny.batch(4))
        norms.append(float(found["grad_norm"]))
        moved.append({name: np.asarray(x) for name, x in paths.flatten(state.params).items()})
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-5)
    for name, array in moved[0].items():
        np.testing.assert_allclose(moved[1][name], array, atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("family", VARIANTS)
def test_layers_one_by_one_give_what_the_scan_gives(family):
    module, own, _ = VARIANTS[family]
    model = module.Model("tiny", **tiny.SIZES | own)
    stacked = model.clone(stacks=paths.runs(model.kinds))
    batch = tiny.batch(2)
    arrays = [batch[k] for k in ("input_ids", "segment_ids", "positions", "token_types")]

    @functools.partial(jax.jit, static_argnums=0)
    def logits(model, params):
        return model.apply({"params": params}, *arrays)

    params = jax.jit(model.init)(jax.random.key(0), *model.example())["params"]
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
    one, other = logits(model, params), logits(stacked, paths.restack(params, stacked.stacks))
    assert jnp.abs(one).max() > 0.1
    np.testing.assert_allclose(one, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(window_layers=(0,)), r"window_layers=\(0,\) needs config.model.window"),
        (dict(window=3, window_layers=(0,), full_every=2), "window_layers=.*full_every=2 both"),
        (dict(nope_layers=(0,), nope_every=2), "nope_layers=.*nope_every=2 both"),
        (dict(nope_layers=(9,)), r"nope_layers=\(9,\) are not all numbers from 0 to below"),
    ],
)
def test_layers_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        llama.Model("tiny", **options)
