"""Sentence embeddings: numbers worked out by hand, and what must not change them."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fmjax import build, objectives
from fmjax.models import bert
from fmjax.objectives import contrast
from fmjax.params import sharding

ROWS = ("input_ids", "segment_ids", "positions", "token_types")
E = np.eye(4, dtype=np.float32)


def fake(vectors):
    """An `apply` whose rows have these first (and only) tokens, and seeds turn them."""
    return lambda params, batch, method: jnp.asarray(vectors, jnp.float32)[:, None]


def batch(real, texts=2):
    """Rows of one token, of which some are empty."""
    rows = jnp.tile(jnp.asarray(real, jnp.int32)[:, None, None], (1, texts, 1))
    return dict.fromkeys(ROWS, rows) | {"seeds": None, "units": rows.sum(axis=(1, 2))}


def loss(vectors, real, texts=2, temperature=1.0, **args):
    flat = np.stack(vectors, axis=1).reshape(-1, 4)
    found = contrast.features(fake(flat), None, batch(real, texts), **args)
    return contrast.compare(found, batch(real, texts), temperature=temperature)


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_loss_among_the_second_texts_of_the_batch(pool):
    """The right one has cosine 1, the other 0: -log(e / (e + 1)); lengths do not matter."""
    found = loss([3 * E[:2], 5 * E[:2]], [1, 1], pool=pool)
    np.testing.assert_allclose(found["loss"], (2 * np.log1p(np.exp(-1)), 2), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], (2, 2))
    wrong = loss([E[:2], E[1::-1]], [1, 1], pool=pool)
    np.testing.assert_allclose(wrong["loss"], (2 * np.log1p(np.exp(1)), 2), rtol=1e-5)
    np.testing.assert_allclose(wrong["accuracy"], (0, 2))


def test_the_temperature_divides():
    """Cosines of the first text 1 and 0.8, of the second 0 and 0.6: over 0.05, 4 and 12 apart."""
    texts = [np.stack([E[0], E[1]]), np.stack([E[0], 0.8 * E[0] + 0.6 * E[1]])]
    found = loss(texts, [1, 1], temperature=0.05)
    expected = np.log1p(np.exp(-4)) + np.log1p(np.exp(-12))
    np.testing.assert_allclose(found["loss"][0], expected, rtol=1e-4)


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_negatives_are_those_of_the_whole_batch_in_any_microbatches(parts):
    """Beside another objective, with dropout on; an evaluation measures whole batches too."""
    losses = {"mlm": {"rate": 0.3}, "contrast": {"temperature": 0.5}}
    sizes, rows = dict(losses=losses, target="texts", dropout=0.1), tiny.batch(8)
    once, cut = tiny.make(**sizes), tiny.make(accumulate=parts, **sizes)
    (a, found_a), (b, found_b) = (made.step(made.state(), rows) for made in (once, cut))
    assert found_a["sums"].keys() == found_b["sums"].keys()
    for name, pair in found_a["sums"].items():
        np.testing.assert_allclose(found_b["sums"][name], pair, rtol=1e-5, err_msg=name)
    assert float(found_b["loss"]) == pytest.approx(float(found_a["loss"]), rel=1e-6)
    assert float(found_b["grad_norm"]) == pytest.approx(float(found_a["grad_norm"]), rel=1e-5)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_a_third_text_is_everybodys_negative():
    """Both thirds are orthogonal to all: of four texts one has cosine 1."""
    found = loss([E[:2], E[:2], E[2:]], [1, 1], texts=3)
    np.testing.assert_allclose(found["loss"], (2 * np.log1p(3 * np.exp(-1)), 2), rtol=1e-5)


def test_rows_of_padding_are_nobodys_negatives():
    two = loss([E[:2], E[:2], E[2:]], [1, 1], texts=3)
    vectors = [np.concatenate([x, E[:2] + E[1:3]]) for x in (E[:2], E[:2], E[2:])]
    found = loss(vectors, [1, 1, 0, 0], texts=3)
    for name in two:
        np.testing.assert_allclose(found[name], two[name], rtol=1e-6)


def test_scores_over_all_second_texts():
    """Of three the right one is nearest, second, and equal to another."""
    first = np.array([E[0], E[1], E[2]])
    second = np.array([E[0], E[3] + 0.1 * E[1], E[1] + E[2]])
    found = {"embedding": np.stack([first, second], axis=1)}
    # The second has E[1] + E[2] before its own; ranks 1, 2, 1.
    assert contrast.score(found, None) == pytest.approx({"retrieval": 2 / 3, "mrr": 5 / 6})
    same = {"embedding": np.ones((4, 2, 4), np.float32)}
    # All alike is chance: one in four, at a mean rank of 2.5.
    assert contrast.score(same, None) == pytest.approx({"retrieval": 0.25, "mrr": 0.4})
    alone = contrast.score({"embedding": np.ones((4, 4), np.float32)}, None)
    assert alone.keys() == set(contrast.SCORES) and np.isnan(list(alone.values())).all()


def test_scores_do_not_depend_on_blocks(monkeypatch):
    found = {"embedding": np.random.default_rng(0).normal(size=(20, 2, 4)).astype(np.float32)}
    expected = contrast.score(found, None)
    monkeypatch.setattr(contrast, "BLOCK", 7)
    assert contrast.score(found, None) == pytest.approx(expected)


@functools.cache
def model():
    sizes = tiny.SIZES | dict(depth=1, lm_head=False, attention="xla")
    made = bert.Model("tiny", **sizes)
    params = jax.jit(made.init)(jax.random.key(0), *made.example())["params"]
    (goal,) = goals = objectives.build({"contrast": {}}, dict(target="texts"))
    train = lambda params, batch: objectives.metrics(
        goals, build.apply(made), params, batch, jax.random.key(0), True
    )
    told = lambda params, batch: goal.outputs(build.apply(made), params, batch | {"seeds": None})
    return types.SimpleNamespace(
        params=params,
        train=jax.jit(train),
        gradient=jax.jit(jax.grad(lambda p, batch: train(p, batch)["contrast/loss"][0])),
        outputs=jax.jit(told),
    )


def random(examples=8, texts=2):
    rows = tiny.batch(examples * texts)
    found = {name: rows[name].reshape(examples, texts, -1) for name in ROWS}
    units = jnp.sum(found["segment_ids"] > 0, axis=(1, 2))
    return found | {"index": jnp.arange(examples), "units": units}


def test_a_single_text_belongs_to_itself_under_another_dropout():
    """SimCSE: as a pair of equal texts, whose two streams of dropout differ."""
    pair = random()
    pair |= {name: pair[name][:, [0, 0]] for name in ROWS}
    one = pair | {name: pair[name][:, 0] for name in ROWS}
    first, second = (model().train(model().params, x)["contrast/loss"][0] for x in (one, pair))
    np.testing.assert_allclose(first, second, rtol=1e-6)
    told = np.asarray(model().outputs(model().params, one)["embedding"])
    assert told.shape == (8, 32)
    np.testing.assert_allclose(np.linalg.norm(told, axis=1), 1, rtol=1e-5)
    # Without dropout the two were one, and a text as near to itself as can be.
    logits = told @ told.T / 0.05
    certain = np.sum(np.log(np.exp(logits).sum(axis=1)) - logits.diagonal())
    assert abs(first - certain) > 1e-3


def test_empty_rows_change_no_number_and_no_gradient():
    whole, params = random(), model().params
    more = {name: jnp.concatenate([x, jnp.zeros_like(x[:8])]) for name, x in whole.items()}
    found, expected = (model().train(params, x) for x in (more, whole))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    first, second = (jax.tree.leaves(model().gradient(params, x)) for x in (more, whole))
    for a, b in zip(first, second, strict=True):
        # Sums of other lengths: of the largest of a parameter's gradient, which is 13 for one.
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


def test_eight_devices_share_all_negatives():
    """The loss of rows cut over eight devices is that of one."""
    whole, params = random(), model().params
    expected = model().train(params, whole)["contrast/loss"]
    mesh = sharding.make_mesh()
    place = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    with jax.set_mesh(mesh):
        cut = jax.device_put(whole, place)
        found = model().train(jax.device_put(params, jax.NamedSharding(mesh, sharding.WHOLE)), cut)
    np.testing.assert_allclose(found["contrast/loss"], expected, rtol=1e-5)
