"""Which token comes next: what is left to draw from is that of transformers, draws are as probable
as the model says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.errors import ConfigError
from fmjax.generation.sampling import NONE, Sampling, chosen, left
from fmjax.params import randomness


def seeds(rows):
    key = jax.random.fold_in(jax.random.key(0), 0)
    return randomness.named(randomness.seeds(key, jnp.arange(rows)), "text")


def shares(probabilities, **how):
    """How often each token is drawn in 8000 rows."""
    logits = jnp.log(jnp.array([probabilities], jnp.float32)).repeat(8000, 0)
    drawn = chosen(logits, Sampling(**how), seeds(8000))
    return np.bincount(np.asarray(drawn), minlength=len(probabilities)) / 8000


def test_draws_are_as_probable_as_the_model_says():
    four = [0.5, 0.25, 0.125, 0.125]
    np.testing.assert_allclose(shares(four), four, atol=0.02)
    # Squares of the first two: 1/4 and 1/16.
    np.testing.assert_allclose(shares(four, temperature=0.5, top_k=2), [0.8, 0.2, 0, 0], atol=0.02)
    # Three quarters are two tokens exactly; a little more is three, and equal ones stay together.
    np.testing.assert_allclose(shares(four, top_p=0.75), [2 / 3, 1 / 3, 0, 0], atol=0.02)
    np.testing.assert_allclose(shares(four, top_p=0.76), four, atol=0.02)
    np.testing.assert_allclose(shares(four, min_p=0.4), [2 / 3, 1 / 3, 0, 0], atol=0.02)


def test_every_token_of_a_long_vocabulary_can_be_drawn():
    size = 700  # in three blocks of 256
    found = shares(np.full(size, 1 / size))
    assert found.min() > 0 and found.max() < 4 / size
    assert shares(np.eye(size)[699] + 1e-30)[699] == 1


def test_the_likeliest_is_taken_at_temperature_0_and_the_first_of_equal_ones():
    logits = jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]])
    assert chosen(logits, Sampling(temperature=0), seeds(2)).tolist() == [1, 0]
    assert chosen(logits, Sampling(top_k=1), seeds(2)).tolist()[1] == 0


@pytest.mark.parametrize(
    "how",
    [
        dict(temperature=0.7),
        dict(top_k=5),
        dict(top_p=0.6),
        dict(min_p=0.2),
        dict(repetition_penalty=1.3),
        dict(temperature=1.5, top_k=30, top_p=0.8, min_p=0.05, repetition_penalty=0.8),
    ],
    ids=str,
)
def test_what_is_left_is_what_transformers_leaves(how):
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    from transformers.generation import logits_process as theirs

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4, 61)).astype(np.float32)
    ids = rng.integers(0, 61, (4, 7))
    steps = []
    if "repetition_penalty" in how:
        steps.append(theirs.RepetitionPenaltyLogitsProcessor(how["repetition_penalty"]))
    for key, kind in dict(
        temperature=theirs.TemperatureLogitsWarper,
        top_k=theirs.TopKLogitsWarper,
        top_p=theirs.TopPLogitsWarper,
        min_p=theirs.MinPLogitsWarper,
    ).items():
        steps += [kind(how[key])] if key in how else []
    expected = torch.tensor(logits)
    for step in steps:
        expected = step(torch.tensor(ids), expected)
    expected = np.maximum(expected.numpy(), NONE)
    seen = jnp.zeros((4, 61), bool).at[jnp.arange(4)[:, None], ids].set(True)
    found = np.asarray(left(jnp.asarray(logits), Sampling(**how), seen))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found == NONE).any() == any(key in how for key in ("top_k", "top_p", "min_p"))


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(temperature=-1.0), "temperature=-1.0: give a number from 0"),
        (dict(top_k=0), "top_k=0: give a whole number from 1"),
        (dict(top_p=0.0), "top_p=0.0: give above 0"),
        (dict(min_p=1.5), "min_p=1.5"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(how, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**how)
