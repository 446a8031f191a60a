"""The loss over a vocabulary in pieces: the numbers and gradients of the whole, by any cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fmjax.objectives import chunked_cross_entropy
from fmjax.params import sharding

B, T, D, V = 8, 6, 4, 40
HOW = dict(spec=P("tensor", "fsdp"), dtype=jnp.float32)


def arrays(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (B, T, D))
    kernel = jax.random.normal(keys[1], (V, D))
    labels = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jax.random.bernoulli(keys[3], 0.7, (B, T)).astype(jnp.float32)
    return hidden, kernel, labels, weights


def by_formula(hidden, kernel, labels, weights, z_loss=0.0, smoothing=0.0, softcap=0.0):
    """log Σ exp(l) - Σ_v t_v l_v with t = (1 - ε) onehot + ε / V, and the square of the first."""
    logits = jnp.einsum("btd,vd->btv", hidden, kernel, precision="highest")
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    target = (1 - smoothing) * jax.nn.one_hot(labels, V) + smoothing / V
    loss = log_total - jnp.sum(target * logits, axis=-1) + z_loss * log_total**2
    return jnp.sum(weights * loss)


@pytest.mark.parametrize("columns", [1, 4, 6])
@pytest.mark.parametrize("extra", [{}, dict(z_loss=0.1, smoothing=0.2, softcap=3.0)])
@pytest.mark.parametrize("out_in", [True, False])
def test_is_the_formula_and_its_derived_gradient(columns, extra, out_in, monkeypatch):
    monkeypatch.setattr(chunked_cross_entropy, "LOGITS_BYTES", 4 * B * V * columns)
    hidden, kernel, labels, weights = arrays()

    def ours(hidden, kernel):
        given = kernel if out_in else kernel.T
        how = HOW | dict(out_in=out_in, **extra)
        return 3 * chunked_cross_entropy.sums(hidden, given, labels, weights, **how).loss

    theirs = lambda hidden, kernel: 3 * by_formula(hidden, kernel, labels, weights, **extra)
    found = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, kernel)
    expected = jax.value_and_grad(theirs, (0, 1))(hidden, kernel)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, expected
    )
    # Without a gradient it is the same, and so is each gradient alone.
    assert jax.jit(ours)(hidden, kernel) == found[0]
    for i in (0, 1):
        np.testing.assert_array_equal(jax.jit(jax.grad(ours, i))(hidden, kernel), found[1][i])


def test_counts_what_is_right_and_what_weighs_nothing_counts_nothing():
    hidden, kernel, labels, weights = arrays()
    best = jnp.argmax(jnp.einsum("btd,vd->btv", hidden, kernel), axis=-1)
    labels = labels.at[:, ::2].set(best[:, ::2])
    sums = chunked_cross_entropy.sums(hidden, kernel, labels, weights, out_in=True, **HOW)
    assert sums.right == jnp.sum(weights * (labels == best)) and sums.nats == sums.loss
    other = jnp.where(weights > 0, labels, 0)
    again = chunked_cross_entropy.sums(hidden, kernel, other, weights, out_in=True, **HOW)
    assert sums == again


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=2, fsdp=4), dict(fsdp=2, tensor=4)])
def test_devices_change_nothing(axes, monkeypatch):
    monkeypatch.setattr(chunked_cross_entropy, "LOGITS_BYTES", 4 * 2 * V)
    hidden, kernel, labels, weights = arrays()

    def loss(hidden, kernel, labels, weights):
        how = HOW | dict(out_in=True)
        return chunked_cross_entropy.sums(hidden, kernel, labels, weights, **how).loss

    step = jax.value_and_grad(loss, (0, 1))
    alone = jax.jit(step)(hidden, kernel, labels, weights)
    mesh = sharding.make_mesh(**{"data": 1} | axes)
    with jax.set_mesh(mesh):
        lies = jax.NamedSharding(mesh, sharding.fitted(kernel.shape, HOW["spec"], mesh))
        rows = jax.NamedSharding(mesh, sharding.BATCH)
        places = rows, lies, rows, rows
        given = map(jax.device_put, (hidden, kernel, labels, weights), places)
        found = jax.jit(step, out_shardings=(None, (rows, lies)))(*given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), found, alone)


def test_the_logits_never_exist_at_once():
    """A step's temporary memory, which the compiler counts, is that of a piece."""
    rows, time, tokens = 8, 256, 2**17
    shapes = (rows, time, D), (tokens, D), (rows, time), (rows, time)
    kinds = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    given = [jax.ShapeDtypeStruct(*one) for one in zip(shapes, kinds, strict=True)]

    def loss(*given):
        return chunked_cross_entropy.sums(*given, out_in=True, **HOW).loss

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*given).compile()
    whole = 4 * rows * time * tokens
    assert whole == 2**30
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 4
