import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import objectives
from fmjax.config import rules
from fmjax.errors import ConfigError
from fmjax.objectives import mlm
from fmjax.params import randomness

V, MASK = 100, 4
# Ids below 5 are special; ids ≥ 50 continue a word.
VOCAB = SimpleNamespace(
    size=V, mask_id=MASK, special=np.arange(V) < 5, word_start=np.arange(V) < 50
)


def batch(n=64, time=40, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, V, (n, time))
    lengths = rng.integers(time // 2, time + 1, n)
    ids[:, 0] = 2
    real = np.arange(time) < lengths[:, None]
    ids[np.arange(n), lengths - 1] = 3
    return {
        "input_ids": jnp.asarray(np.where(real, ids, 0), jnp.int32),
        "segment_ids": jnp.asarray(real, jnp.int32),
        "index": jnp.arange(n),
    }


def prepared(b, key=0, **args):
    run = jax.jit(
        lambda b, key: mlm.prepare(b, randomness.seeds(key, b["index"]), vocab=VOCAB, **args)
    )
    return jax.tree.map(np.asarray, run(b, jax.random.key(key)))


def chosen(out):
    """Boolean (B, T) of the chosen positions."""
    hit = np.zeros(out["segment_ids"].shape, bool)
    rows = np.arange(len(hit))[:, None]
    hit[rows, out["mlm_positions"]] = out["mlm_weights"] > 0
    return hit


@pytest.mark.parametrize("mask", rules.MASKS)
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_never_special_or_padding_and_labels_are_the_originals(mask, rate):
    b = batch()
    out = prepared(b, mask=mask, rate=rate)
    hit, ids = chosen(out), np.asarray(b["input_ids"])
    assert not hit[np.asarray(b["segment_ids"]) == 0].any()
    assert not hit[ids < 5].any()
    assert (out["input_ids"][~hit] == ids[~hit]).all()
    where = out["mlm_weights"] > 0
    rows = np.broadcast_to(np.arange(len(ids))[:, None], where.shape)
    assert (out["mlm_labels"][where] == ids[rows[where], out["mlm_positions"][where]]).all()
    assert out["mlm_positions"].shape[1] == math.ceil(rate * ids.shape[1])


def test_token_masking_chooses_exactly_the_rounded_share():
    b = batch()
    out = prepared(b, rate=0.15)
    eligible = (np.asarray(b["input_ids"]) >= 5) & (np.asarray(b["segment_ids"]) > 0)
    wanted = np.maximum(np.round(0.15 * eligible.sum(1)), 1)
    np.testing.assert_array_equal(chosen(out).sum(1), wanted)


def test_fates_are_80_10_10():
    b = batch(n=2000)
    out = prepared(b, rate=0.3)
    hit, ids = chosen(out), np.asarray(b["input_ids"])
    masked = (out["input_ids"][hit] == MASK).mean()
    same = (out["input_ids"][hit] == ids[hit]).mean()
    error = 5 * math.sqrt(0.25 / hit.sum())
    assert abs(masked - (0.8 + 0.1 / V)) < error
    assert abs(same - (0.1 + 0.1 / V)) < error


def words_of(ids, real):
    """Word number of each token of a row; -1 for what cannot be chosen."""
    number, words = -1, []
    for position, (token, is_real) in enumerate(zip(ids, real, strict=True)):
        if not is_real or token < 5:
            words.append(-1)
            continue
        if token < 50 or position == 0 or words[-1] == -1:
            number += 1
        words.append(number)
    return np.asarray(words)


@pytest.mark.parametrize("mask", ["word", "span"])
def test_words_are_masked_whole(mask):
    b = batch()
    out = prepared(b, mask=mask, rate=0.3)
    hit = chosen(out)
    cut = rows = 0
    for ids, real, row in zip(
        np.asarray(b["input_ids"]), np.asarray(b["segment_ids"]) > 0, hit, strict=True
    ):
        words = words_of(ids, real)
        for word in range(words.max() + 1):
            inside = row[words == word]
            cut += inside.any() and not inside.all()
        rows += 1
    # Only a first word larger than the row's whole budget may be cut.
    assert cut <= 0.02 * rows
    share = hit.sum() / (np.asarray(b["input_ids"]) >= 5).sum()
    assert 0.2 < share <= 0.32


def test_span_lengths_are_geometric():
    """Words only of one token: runs of chosen spans have mean (1 - 0.8**10) / 0.2 = 4.46 words when
    isolated.

    Neighbouring spans can touch, so the mean run is a little longer; single-token masking gives
    about 1 / 0.85.
    """
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(5, 50, (500, 120)), jnp.int32)
    b = {"input_ids": ids, "segment_ids": jnp.ones_like(ids), "index": jnp.arange(500)}

    def mean_run(mask):
        hit = np.pad(chosen(prepared(b, mask=mask)), ((0, 0), (1, 1)))
        starts = (hit[:, 1:] & ~hit[:, :-1]).sum()
        return hit.sum() / starts

    assert 3.9 < mean_run("span") < 5.6
    assert 1.1 < mean_run("token") < 1.25


def test_a_row_is_masked_the_same_in_any_batch_and_differently_by_another_key():
    b = batch()
    whole = prepared(b)
    part = prepared({name: x[10:14] for name, x in b.items()})
    np.testing.assert_array_equal(part["input_ids"], whole["input_ids"][10:14])
    assert (prepared(b, key=1)["input_ids"] != whole["input_ids"]).any(axis=1).mean() > 0.9


def test_every_position_is_equally_likely():
    ids = jnp.full((4000, 20), 10, jnp.int32)
    b = {"input_ids": ids, "segment_ids": jnp.ones_like(ids), "index": jnp.arange(4000)}
    share = chosen(prepared(b, rate=0.2)).mean(0)
    assert abs(share - 0.2).max() < 5 * math.sqrt(0.16 / 4000)


def test_row37_a_row_without_real_tokens_has_no_targets():
    ids = jnp.zeros((2, 16), jnp.int32)
    out = prepared({"input_ids": ids, "segment_ids": ids, "index": jnp.arange(2)})
    assert out["mlm_weights"].sum() == 0


def test_loss_by_hand():
    """Uniform logits over V give ln V nats; a right-answer logit of log(9 (V - 1)) gives
    ln(10/9)."""
    labels = jnp.asarray([[7, 8, 9]])
    b = {name: jnp.zeros((1, 5), jnp.int32) for name in ("input_ids", "positions", "token_types")}
    b |= {"segment_ids": jnp.ones((1, 5), jnp.int32), "seeds": None}
    b |= {"mlm_positions": jnp.asarray([[1, 2, 3]]), "mlm_labels": labels}
    b |= {"mlm_weights": jnp.asarray([[1.0, 1.0, 0.0]])}

    def apply(params, *args, method):
        if method == "encode":
            return jnp.zeros((1, 5, 2))
        logits = jnp.zeros((1, 3, V))
        return logits.at[0, 1, 8].set(math.log(9 * (V - 1)))

    found = mlm.loss_fn(apply, None, b)
    np.testing.assert_allclose(found["loss"][0], math.log(V) + math.log(10 / 9), rtol=1e-5)
    assert float(found["loss"][1]) == 2.0
    assert float(found["accuracy"][0]) == 1.0
    assert [float(x) for x in found["mask_rate"]] == [2.0, 5.0]


def test_unknown_mask_is_named():
    with pytest.raises(
        ConfigError, match="config.objectives.mlm.mask='words'.*Did you mean 'word'"
    ):
        prepared(batch(), mask="words")


def test_evaluation_may_mask_otherwise():
    """So that losses of runs that mask differently compare."""
    build = lambda own: objectives.build({"mlm": own}, dict(target="", vocab=VOCAB))
    differs = {"rate": 0.2, "replace": (1.0, 0.0)}
    goals, rng = build({"rate": 0.4, "validation": differs}), jax.random.key(0)
    b = batch()
    same = lambda a, b: jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))
    evaluated = objectives.prepare(goals, b, rng, train=False)
    assert same(evaluated, objectives.prepare(build(differs), b, rng, train=False))
    trained = objectives.prepare(goals, b, rng, train=True)
    assert same(trained, objectives.prepare(build({"rate": 0.4}), b, rng, train=True))
    assert trained["mlm_labels"].shape[1] == 2 * evaluated["mlm_labels"].shape[1]
    with pytest.raises(ConfigError, match=r"mlm\.validation\.weight is not known.*rate"):
        build({"validation": {"weight": 2.0}})
    with pytest.raises(ConfigError, match=r"mlm\.validation\.vocab is not known"):
        build({"validation": {"vocab": 2.0}})
