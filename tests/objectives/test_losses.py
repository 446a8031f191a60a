"""Losses and the primitives below them against what jax derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.models import layers
from fmjax.objectives import losses
from fmjax.params import precision


def derived(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 11)])
def test_cross_entropy_and_its_gradient_are_the_derived_ones(shape):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(5 * rng.normal(size=shape), jnp.float32)
    labels = jnp.asarray(rng.integers(0, shape[-1], shape[:-1]), jnp.int32)
    weights = jnp.asarray(rng.normal(size=shape[:-1]), jnp.float32)

    def both(loss):
        return jax.value_and_grad(lambda x: jnp.sum(loss(x, labels) * weights))(logits)

    found, wanted = both(losses.cross_entropy), both(derived)
    assert found[0] == pytest.approx(float(wanted[0]), rel=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-6)


def test_cross_entropy_by_hand():
    """Equal logits cost log V; the gradient is softmax minus one-hot; no logit overflows."""
    logits = jnp.asarray([[0.0, 0.0, 0.0, 0.0], [1e4, -1e4, 0.0, 0.0]])
    nats, pull = jax.vjp(lambda x: losses.cross_entropy(x, jnp.asarray([1, 1])), logits)
    np.testing.assert_allclose(nats, [np.log(4), 2e4], rtol=1e-6)
    (gradient,) = pull(jnp.ones(2))
    np.testing.assert_allclose(gradient, [[0.25, -0.75, 0.25, 0.25], [1, -1, 0, 0]], atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_and_its_gradients_are_the_derived_ones(dtype, biased):
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + 2 * rng.normal(size=(2, 5, 16)), dtype)
    scale = jnp.asarray(rng.normal(size=16), jnp.float32)
    bias = jnp.asarray(rng.normal(size=16), jnp.float32) if biased else None
    weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def plain(x, scale, bias, eps):
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
        y = y * scale[None, None]
        return y if bias is None else y + bias[None, None]

    def both(norm):
        loss = lambda *args: jnp.sum(norm(*args, 1e-12) * weights)
        return jax.value_and_grad(loss, argnums=(0, 1, 2) if biased else (0, 1))(x, scale, bias)

    found, wanted = both(layers.layer_norm), both(plain)
    assert found[0] == pytest.approx(float(wanted[0]), rel=1e-5)
    for got, want in zip(found[1], wanted[1], strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(
            got.astype(jnp.float32),
            want.astype(jnp.float32),
            rtol=1e-2 if got.dtype == jnp.bfloat16 else 1e-5,
            atol=1e-5,
        )


def test_a_bias_gradient_is_the_sum_over_all_rows():
    rng = np.random.default_rng(0)
    x, bias = jnp.zeros((3, 4, 6)), jnp.zeros(6)
    g = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    _, pull = jax.vjp(precision.add_bias, x, bias)
    to_x, to_bias = pull(g)
    np.testing.assert_array_equal(to_x, g)
    np.testing.assert_allclose(to_bias, np.sum(g, axis=(0, 1)), atol=1e-6)
