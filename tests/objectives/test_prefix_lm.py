"""Prefix language modelling: where documents are cut, by hand and by what must hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fmjax.objectives import clm, prefix_lm
from fmjax.params import randomness


def prepared(batch, seed=0, **how):
    seeds = randomness.seeds(jax.random.key(seed), batch["index"])
    return prefix_lm.prepare(batch, seeds, **how)


def test_a_document_of_two_tokens_has_one_of_each():
    """Documents of 2, 1 and 2 tokens: of the first and last one token is seen, the other asked."""
    segments = jnp.array([[1, 1, 2, 3, 3, 0]])
    batch = {
        "input_ids": jnp.array([[5, 6, 7, 8, 9, 0]]),
        "segment_ids": segments,
        "positions": jnp.array([[0, 1, 0, 0, 1, 0]]),
        "token_types": jnp.zeros_like(segments),
        "index": jnp.array([0]),
    }
    for seed in range(5):
        found = prepared(batch, seed)
        assert found["token_types"].tolist() == [[1, 0, 1, 1, 0, 0]]
        labels, weights = clm.targets(found)
        assert weights.tolist() == [[1, 0, 0, 1, 0, 0]]
        assert labels[weights > 0].tolist() == [6, 9]
    asked = prepared(batch | {"loss_mask": jnp.array([[1, 0, 1, 1, 1, 1]])})
    assert clm.targets(asked)[1].tolist() == [[0, 0, 0, 1, 0, 0]]


def test_every_cut_of_a_document_is_as_likely():
    rows, length = 4000, 5
    batch = {
        "segment_ids": jnp.ones((rows, length), jnp.int32),
        "positions": jnp.tile(jnp.arange(length), (rows, 1)),
        "token_types": jnp.zeros((rows, length), jnp.int32),
        "index": jnp.arange(rows),
    }
    sizes = np.asarray(prepared(batch)["token_types"].sum(1))
    shares = np.bincount(sizes, minlength=6) / rows
    np.testing.assert_allclose(shares, [0, 0.25, 0.25, 0.25, 0.25, 0], atol=0.03)  # 4 deviations
    half = np.asarray(prepared(batch, rate=0.5)["token_types"].any(1)).mean()
    assert half == pytest.approx(0.5, abs=0.03)


def test_each_document_is_cut_once_and_by_its_example_alone():
    batch = tiny.batch(16)
    found = prepared(batch)
    types, segments = (np.asarray(found[name]) for name in ("token_types", "segment_ids"))
    for row, marks in zip(types, segments, strict=True):
        for segment in (1, 2):
            mine = row[marks == segment]
            assert mine[0] == 1 and mine[-1] == 0 and (np.diff(mine) <= 0).all()
        assert not row[marks == 0].any()
    assert len({tuple(row) for row in types}) > 8
    part = prepared({name: array[3:5] for name, array in batch.items()})
    np.testing.assert_array_equal(part["token_types"], types[3:5])
    wide = {name: jnp.pad(x, ((0, 0), (0, 4))) if x.ndim == 2 else x for name, x in batch.items()}
    np.testing.assert_array_equal(prepared(wide)["token_types"][:, : tiny.T], types)
    np.testing.assert_array_equal(found["input_ids"], batch["input_ids"])
    causal = prepared(batch, rate=0.0)
    assert not causal["token_types"].any()
    for one, other in zip(clm.targets(causal), clm.targets(batch), strict=True):
        np.testing.assert_array_equal(one, other)
