import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fmjax.errors import ConfigError
from fmjax.models import bert, gpt2, llama, t5
from fmjax.params import paths

FAMILIES = {
    "bert": (bert, dict()),
    "roberta": (bert, dict(types=1, position_shift=2)),
    "distilbert": (bert, dict(types=0)),
    "modernbert": (bert, dict(modern=True, types=0, window=3, depth=4)),
    "gpt2": (gpt2, dict()),
    "llama": (llama, dict(kv_heads=2)),
    "gemma3": (
        llama,
        dict(norms="around", qk_norm="head", norm_offset=1.0, window=3, full_every=2)
        | dict(theta=1e6, theta_window=1e4, embed_scale=True, logit_softcap=5.0),
    ),
    "smollm3": (llama, dict(nope_every=2)),
    "bloom": (
        llama,
        dict(alibi=True, norm="layer", embed_norm=True, gated=False, qkv_bias=True, mlp_bias=True),
    ),
    "mixtral": (llama, dict(experts=4, shared_mlp=16, dense_layers=(1,))),
}
FAMILIES["t5"] = t5, dict(encoder_depth=1, buckets=8, far=12)
FAMILIES["t5-1.1"] = t5, dict(encoder_depth=2, gated=True, tied=False)
# Tokens of a row compete for places, and so do its documents.
LIMITED = {"limited": (llama, dict(experts=4, capacity=1.0))}
CAUSAL = ("gpt2", "llama", "gemma3", "bloom", "mixtral", *LIMITED)


@functools.cache
def build(family, **changes):
    module, own = (FAMILIES | LIMITED)[family]
    model = module.Model("tiny", **{**tiny.SIZES, "dropout": 0.0, **own, **changes})
    model = model.clone(stacks=paths.runs(model.kinds))
    params = jax.jit(model.init)(jax.random.key(0), *model.example())["params"]
    # Larger than at initialisation, so that attention really depends on what it sees.
    return model, jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, *arrays):
    bound = lambda *args, method: model.apply({"params": params}, *args, method=method)
    hidden = bound(*arrays, method="encode")
    if model.decodes:
        hidden = bound(*arrays[:3], hidden, arrays[1], method="decode")
    return bound(hidden, method="logits")


def logits(model, params, batch):
    arrays = [batch[k] for k in ("input_ids", "segment_ids", "positions", "token_types")]
    return np.asarray(_logits(model, params, *arrays))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_document_has_the_logits_of_the_document_alone(family):
    """Each row of the batch holds two documents and padding; each document is run again by
    itself."""
    model, params = build(family)
    packed = tiny.batch(4)
    whole = logits(model, params, packed)
    for segment in (1, 2):
        mine = np.asarray(packed["segment_ids"]) == segment
        lengths = mine.sum(1)
        place = np.arange(tiny.T)[None]
        inside = place < lengths[:, None]
        start = mine.argmax(1)[:, None]
        taken = np.take_along_axis(
            np.asarray(packed["input_ids"]), np.minimum(place + start, tiny.T - 1), axis=1
        )
        alone = {
            "input_ids": np.where(inside, taken, 0),
            "segment_ids": inside.astype(np.int32),
            "positions": np.where(inside, place, 0),
            "token_types": np.zeros_like(taken),
        }
        alone = {name: jnp.asarray(x, jnp.int32) for name, x in alone.items()}
        np.testing.assert_allclose(
            logits(model, params, alone)[inside], whole[mine], atol=2e-5, rtol=0
        )
    # The test can fail: documents that see each other do not give these logits.
    leaking = {**packed, "segment_ids": jnp.minimum(packed["segment_ids"], 1)}
    real = np.asarray(packed["segment_ids"]) > 0
    assert np.abs(logits(model, params, leaking) - whole)[real].max() > 1e-2


@pytest.mark.parametrize("family", ["bert", *CAUSAL])
def test_what_lies_behind_a_layer_follows_from_its_states(family):
    model, params = build(family)
    model, params = model.clone(stacks=None), paths.restack(params, None)
    batch = tiny.batch(2)
    arrays = [batch[k] for k in ("segment_ids", "positions", "token_types")]

    @jax.jit
    def run(params, first):
        encode = lambda model, x: model.apply({"params": params}, x, *arrays, method="encode")
        return encode(model, first), encode(
            model.clone(start=2), encode(model.clone(stop=2), first)
        )

    whole, parts = run(params, batch["input_ids"])
    real = np.asarray(batch["segment_ids"]) > 0
    np.testing.assert_allclose(parts[real], whole[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", CAUSAL)
def test_what_comes_later_changes_nothing(family):
    model, params = build(family)
    batch = tiny.batch(2)
    other = {**batch, "input_ids": batch["input_ids"].at[:, 5:].add(1)}
    one, two = logits(model, params, batch), logits(model, params, other)
    np.testing.assert_array_equal(one[:, :5], two[:, :5])
    real = np.asarray(batch["segment_ids"][:, 5:]) > 0
    assert (np.abs(one - two)[:, 5:].max(-1)[real] > 1e-3).all()


@pytest.mark.parametrize("family", CAUSAL)
def test_a_prefix_sees_itself_in_both_directions_and_nothing_behind_it(family):
    """Six tokens of prefix, two behind: within gemma3's window of three tokens, and of its layers
    every other sees all."""
    model, params = build(family, prefix=True)
    types = jnp.tile((jnp.arange(tiny.T) < 6).astype(jnp.int32)[None], (2, 1))
    ones = jnp.ones_like(types)
    place = jnp.tile(jnp.arange(tiny.T)[None], (2, 1))
    batch = tiny.batch(2) | dict(segment_ids=ones, positions=place, token_types=types)
    change = lambda at: {**batch, "input_ids": batch["input_ids"].at[:, at].add(1)}
    base = logits(model, params, batch)
    behind = logits(model, params, change(7))
    np.testing.assert_array_equal(base[:, :7], behind[:, :7])
    assert (np.abs(base - behind)[:, 7:].max(-1) > 1e-4).all()
    within = logits(model, params, change(5))
    assert (np.abs(base - within).max(-1) > 1e-4).all()
    # Where nothing is a prefix it is the model without.
    causal = dict(batch, token_types=jnp.zeros_like(types))
    plain, _ = build(family)
    np.testing.assert_array_equal(logits(model, params, causal), logits(plain, params, batch))


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5", *CAUSAL])
def test_padding_changes_nothing(family):
    model, params = build(family)
    batch = tiny.batch(4)
    longer = {name: jnp.pad(x, ((0, 0), (0, 8))) for name, x in batch.items() if x.ndim == 2}
    real = np.asarray(batch["segment_ids"]) > 0
    short, long = logits(model, params, batch), logits(model, params, longer)
    atol = 1e-5 * np.abs(short).max()  # T5's logits are ten times as large as others'
    np.testing.assert_allclose(long[:, : tiny.T][real], short[real], atol=atol, rtol=0)


def test_modernbert_layers_see_a_window_except_every_third():
    """Depth 4, window 3: only layers 0 and 3 see far; with one local layer more than window tokens
    reach nobody."""
    far = {}
    for full_every in (1, 100):
        model, params = build("modernbert", depth=2, full_every=full_every)
        batch = {name: jnp.zeros((1, tiny.T), jnp.int32) for name in ("positions", "token_types")}
        batch["positions"] = jnp.arange(tiny.T)[None]
        batch["segment_ids"] = jnp.ones((1, tiny.T), jnp.int32)
        one = {**batch, "input_ids": jnp.full((1, tiny.T), 7, jnp.int32)}
        two = {**one, "input_ids": one["input_ids"].at[0, -1].set(9)}
        # Layer 0 is always full; hide it by comparing layer 1 alone: block it with zeroed output.
        flat = paths.flatten(params)
        flat["blocks_00_00/attn/out/kernel"] = 0 * flat["blocks_00_00/attn/out/kernel"]
        zeroed = paths.unflatten(flat)
        far[full_every] = np.abs(logits(model, zeroed, one) - logits(model, zeroed, two))[0].max(-1)
    assert (far[1] > 0).all()
    assert (far[100][: tiny.T - 4] == 0).all() and (far[100][tiny.T - 4 :] > 0).all()


def test_dropout_is_where_the_original_has_it_and_needs_seeds():
    model, params = build("bert", dropout=0.5)
    batch = tiny.batch(2)
    arrays = [batch[k] for k in ("input_ids", "segment_ids", "positions", "token_types")]
    encode = jax.jit(
        lambda *seeds: model.apply({"params": params}, *arrays, *seeds, method="encode")
    )
    seeds = jnp.arange(4, dtype=jnp.uint32).reshape(2, 2)
    assert (np.asarray(encode()) == np.asarray(encode(None))).all()
    assert (np.asarray(encode()) != np.asarray(encode(seeds))).any()
    assert (np.asarray(encode(seeds)) == np.asarray(encode(seeds))).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(variant="bse"), "config.model.variant='bse'.*Did you mean 'base'"),
        (dict(widht=3), "config.model.widht is not known.*Did you mean 'width'"),
        (dict(width=33), "config.model.heads=2 does not divide config.model.width=33"),
        (dict(remat="dot"), "config.model.remat='dot'.*Did you mean 'dots'"),
    ],
)
def test_models_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        bert.Model(**{"variant": "tiny", **changes})
