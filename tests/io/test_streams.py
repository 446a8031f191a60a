import jax
import jax.numpy as jnp
import numpy as np

from fmjax.models import attention
from fmjax.params import randomness

KEY = jax.random.key(7)


def seeds(n, key=KEY):
    return randomness.seeds(key, jnp.arange(n))


def test_a_draw_depends_on_the_example_alone_not_on_its_batch():
    together = randomness.bits(seeds(6), (5, 3))
    alone = randomness.bits(randomness.seeds(KEY, jnp.asarray([4])), (5, 3))
    np.testing.assert_array_equal(together[4], alone[0])


def test_streams_examples_and_keys_differ():
    base = randomness.bits(seeds(4), (256,))
    others = [
        randomness.bits(randomness.named(seeds(4), "dropout"), (256,)),
        randomness.bits(randomness.fold(seeds(4), 1), (256,)),
        randomness.bits(seeds(4, jax.random.key(8)), (256,)),
        base[::-1],
    ]
    for other in others:
        assert np.mean(np.asarray(base) == np.asarray(other)) < 0.01


def test_bernoulli_rate_and_independence():
    """Rates within five standard errors; neighbours in every direction uncorrelated."""
    n, rate = (64, 128, 32), 0.1
    drawn = np.asarray(randomness.bernoulli(seeds(n[0]), rate, n[1:]), np.float64)
    error = np.sqrt(rate * (1 - rate) / drawn.size)
    assert abs(drawn.mean() - rate) < 5 * error
    for axis in range(3):
        a = np.take(drawn, range(n[axis] - 1), axis).ravel() - rate
        b = np.take(drawn, range(1, n[axis]), axis).ravel() - rate
        assert abs(np.mean(a * b)) / (rate * (1 - rate)) < 5 / np.sqrt(a.size)


def test_uniform_is_uniform():
    drawn = np.asarray(randomness.uniform(seeds(16), (4096,))).ravel()
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=64, range=(0, 1))[0]
    chi2 = ((counts - drawn.size / 64) ** 2 / (drawn.size / 64)).sum()
    assert chi2 < 63 + 5 * np.sqrt(2 * 63)


def test_rate_one_and_zero_are_exact():
    assert not randomness.bernoulli(seeds(2), 0.0, (1000,)).any()
    assert randomness.bernoulli(seeds(2), 1.0, (1000,)).all()


def test_strides_give_a_pair_the_same_bits_in_a_larger_array():
    small = randomness.bits(seeds(3), (2, 5, 5), attention.STRIDES)
    large = randomness.bits(seeds(3), (4, 9, 11), attention.STRIDES)
    np.testing.assert_array_equal(small, large[:, :2, :5, :5])
    wide = randomness.bits(seeds(3), (12, 128, 128), attention.STRIDES)
    numbers = np.concatenate([np.asarray(wide[0]).reshape(-1), np.asarray(wide[1]).reshape(-1)])
    # As many different ones as drawing by chance gives, so that no two places are one.
    expected = 2**32 * (1 - np.exp(-len(numbers) / 2**32))
    assert abs(len(np.unique(numbers)) - expected) < 40
    keep = randomness.bernoulli(seeds(3), 0.1, (12, 128, 128), attention.STRIDES)
    assert abs(float(np.mean(keep)) - 0.1) < 0.001
