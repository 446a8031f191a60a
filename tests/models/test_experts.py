"""Mixtures of experts: the formulas by hand, both ways against a loop, one device and eight."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from common import ROOT

from fmjax import build, objectives
from fmjax.adapters import lora
from fmjax.config import load
from fmjax.errors import ConfigError
from fmjax.models import dispatch, experts, llama
from fmjax.params import paths, randomness, sharding
from fmjax.training import flops, setup

B, T, D, F, E, K = 2, 6, 4, 8, 3, 2
HOW = dict(activation="silu", dtype=jnp.float32)
WAYS = {
    "dropless": dispatch.dropless,
    "limited": functools.partial(dispatch.limited, capacity=float(E)),  # room for all
}


def test_weights_of_the_likeliest_by_hand():
    """Logits log 6, log 3, 0: probabilities 0.6, 0.3, 0.1."""
    logits = jnp.log(jnp.array([[[6.0, 3, 1]]]))
    weights, chosen, probabilities = experts.route(logits, 2, normed=False)
    assert chosen.tolist() == [[[0, 1]]]
    np.testing.assert_allclose(weights, [[[0.6, 0.3]]], atol=1e-6)
    np.testing.assert_allclose(probabilities, [[[0.6, 0.3, 0.1]]], atol=1e-6)
    np.testing.assert_allclose(experts.route(logits, 2, True)[0], [[[2 / 3, 1 / 3]]], atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_losses_of_routers_by_hand(shift):
    """Two layers and two real tokens. In the first each takes another expert, in the second both
    the first one: shares 3/4 and 1/4. Probabilities 3/4 and 1/4 or the reverse, in the mean
    (3 · 3/4 + 1/4) / 4 = 5/8 and 3/8, so balance is 2 (3/4 · 5/8 + 1/4 · 3/8) = 9/8.
    logsumexp is log 4 + shift everywhere."""
    first, second = np.log([3.0, 1]) + shift, np.log([1.0, 3]) + shift
    padding = [[99.0, 0]]
    real = jnp.array([[True, True, False]])
    kept = {}
    for i, rows in enumerate(([first, second, *padding], [first, first, *padding])):
        logits = jnp.array([rows], jnp.float32)
        _, chosen, probabilities = experts.route(logits, 1, True)
        found = experts.sums(logits, probabilities, chosen, real, jnp.zeros_like(chosen, bool))
        kept[f"block_{i:02d}"] = {"mlp": {"sums": found}}
    cfg = llama.Model("tiny", experts=2, experts_per_token=1, router_z_loss=0.1).cfg
    routing = experts.report(cfg, kept)
    z = (np.log(4) + shift) ** 2
    assert float(routing.loss) == pytest.approx(0.01 * 9 / 8 + 0.1 * z, abs=1e-6)
    found = {name: (float(s), float(w)) for name, (s, w) in routing.metrics.items()}
    assert found["balance"] == pytest.approx((4 * 9 / 8, 4), abs=1e-5)
    assert found["router_z"] == pytest.approx((4 * z, 4), abs=1e-5)
    assert found["dropped"] == (4, 4)
    assert experts.report(cfg, {}) is None


def inputs():
    keys = iter(jax.random.split(jax.random.key(0), 5))
    draw = lambda *shape: 0.5 * jax.random.normal(next(keys), shape)
    x, logits = draw(B, T, D), draw(B, T, E)
    return x, logits, draw(E, D, F), draw(E, D, F), draw(E, F, D)


@pytest.mark.parametrize("way", WAYS)
def test_is_the_sum_over_experts_and_its_derived_gradient(way):
    real = jnp.arange(T)[None] < jnp.array([[T], [4]])

    def ours(x, logits, *kernels):
        weights, chosen, _ = experts.route(logits, K, True)
        y, served = WAYS[way](x, weights, chosen, real, *kernels, **HOW)
        assert served.shape == chosen.shape
        return (jnp.sin(y) * real[..., None]).sum(), y

    def loop(x, logits, up, gate, down):
        weights, chosen, _ = experts.route(logits, K, True)
        out = 0.0
        for e in range(E):
            own = jnp.sum(jnp.where(chosen == e, weights, 0), -1, keepdims=True)
            out += own * ((jax.nn.silu(x @ up[e]) * (x @ gate[e])) @ down[e])
        return (jnp.sin(out) * real[..., None]).sum(), out * real[..., None]

    gradient = lambda f: jax.jit(jax.value_and_grad(f, (0, 1, 2, 3, 4), has_aux=True))(*inputs())
    ((_, out), grads), ((_, expected), wanted) = gradient(ours), gradient(loop)
    np.testing.assert_allclose(out, expected, atol=1e-5)  # padding gives 0
    for a, b in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "capacity, wanted",
    [
        (1.0, [[1, 1, 0, 0], [1, 1, 1, 0]]),  # ceil(4 / 2) = 2 places, and ceil(3 / 2)
        (0.5, [[1, 0, 0, 0], [1, 0, 1, 0]]),
        (2.0, [[1, 1, 1, 1], [1, 1, 1, 0]]),
    ],
)
def test_what_comes_later_in_a_row_has_no_place(capacity, wanted):
    """Four tokens that take the first of two experts; two of them and one of the other, and
    padding, whose fair share is that of three."""
    chosen = jnp.array([[[0]] * 4, [[0], [0], [1], [0]]])
    real = jnp.array([[True] * 4, [True] * 3 + [False]])
    x, ones = jnp.ones((2, 4, 1)), jnp.ones((2, 1, 1))
    how = dict(capacity=capacity, activation="relu", dtype=jnp.float32)
    weights = jnp.full((2, 4, 1), 0.5)
    y, served = dispatch.limited(x, weights, chosen, real, ones, ones, 2 * ones, **how)
    np.testing.assert_array_equal(served[..., 0], wanted)
    np.testing.assert_array_equal(y[..., 0], wanted)  # 0.5 · 2 relu(1) · 1


def model(**changes):
    sizes = tiny.SIZES | dict(depth=2, mlp=16, experts=4, shared_mlp=8, dense_layers=(0,))
    made = llama.Model("tiny", **sizes | dict(router_z_loss=0.1) | changes)
    stacks = paths.runs(made.kinds) if made.cfg.scan else None
    return made.clone(stacks=stacks)


@functools.cache
def params():
    made = model()
    start = jax.jit(made.init)(jax.random.key(0), *made.example())["params"]
    return jax.device_get(jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, start))


def learnt(made, mesh):
    """(metrics, gradients by name) of clm."""
    goals = objectives.build({"clm": {}}, dict(vocab=SimpleNamespace(bytes=None), target=""))

    def loss(params, batch):
        rng = jax.random.key(0)
        found = objectives.metrics(goals, build.apply(made), params, batch, rng, train=True)
        return objectives.loss(goals, found, {k: w for k, (_, w) in found.items()}), found

    stored = jax.device_get(paths.restack(params(), made.stacks))
    with jax.set_mesh(mesh):
        stored = jax.device_put(stored, sharding.shardings(stored, mesh))
        batch = jax.device_put(tiny.batch(8), jax.NamedSharding(mesh, sharding.BATCH))
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, found), gradients = gradient(stored, batch)
    return jax.device_get((found, paths.unstack(gradients)))


def assert_alike(found, wanted):
    for key, pair in wanted[0].items():
        np.testing.assert_allclose(found[0][key], pair, rtol=1e-6, err_msg=key)
    for name, gradient in wanted[1].items():
        np.testing.assert_allclose(found[1][name], gradient, atol=1e-5, err_msg=name)


@functools.cache
def on_one_device(capacity):
    return learnt(model(capacity=capacity), tiny.mesh())


@pytest.mark.parametrize("capacity", [0.0, 1.0])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(dict(data=2, expert=4), marks=pytest.mark.slow),
        dict(fsdp=2, expert=2, tensor=2),
    ],
    ids=str,
)
@pytest.mark.slow
def test_any_layout_gives_the_same_numbers(layout, capacity):
    found = learnt(model(capacity=capacity), tiny.mesh(**layout))
    assert_alike(found, on_one_device(capacity))
    means = {key: s / w for key, (s, w) in found[0].items()}
    assert (means["clm/dropped"] > 0) == bool(capacity)
    added = 0.01 * means["clm/balance"] + 0.1 * means["clm/router_z"]
    assert means["clm/loss"] == pytest.approx(means["clm/nats"] + added, rel=1e-6)
    assert all(np.any(gradient) for gradient in found[1].values())


@pytest.mark.parametrize("changes", [dict(scan=False, remat="dots"), dict(remat="block")])
def test_how_layers_run_changes_nothing(changes):
    assert_alike(learnt(model(**changes), tiny.mesh()), on_one_device(0.0))


def test_an_adapter_leaves_the_sums_alone():
    """LoRA starts as the identity, also where it drops inputs out."""
    targets = ((r"block_.*/attn/.*", None),)
    wrapped = lora.wrap(model(), targets=targets, rank=2, alpha=2.0, dropout=0.5)
    adapted = wrapped, wrapped.add(params(), jax.random.key(1))
    both = {"plain": (model(), params()), "lora": adapted}
    batch = tiny.batch(2)
    seeds = randomness.seeds(jax.random.key(0), batch["index"])
    names = ("input_ids", "segment_ids", "positions", "token_types")

    def balance(made, stored):
        arrays = *(batch[name] for name in names), seeds
        return build.apply(made)(stored, *arrays, method="encode_routed")[1].metrics["balance"]

    found = {name: jax.jit(functools.partial(balance, m))(p) for name, (m, p) in both.items()}
    assert found["plain"] == found["lora"]


def test_products_of_ragged_groups_are_counted():
    """Each of the B T K choices meets three matrices of D x F."""
    real = jnp.ones((B, T), bool)

    def way(x, logits, *kernels):
        weights, chosen, _ = experts.route(logits, K, True)
        return dispatch.dropless(x, weights, chosen, real, *kernels, **HOW)[0]

    assert flops.count(way, *inputs()) == 2 * B * T * K * 3 * D * F


def test_experts_lie_along_their_axis():
    mesh = tiny.mesh(expert=4)
    placed = sharding.shardings(params(), mesh)
    kernel = placed["blocks_01_01"]["mlp"]["experts"]["down"]["kernel"]
    assert kernel.spec == sharding.P(None, "expert", "tensor", "fsdp")


def test_experts_that_an_axis_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match="config.mesh.expert=8 does not divide .*experts=4"):
        learnt(model(), tiny.mesh(expert=8))


def test_a_balance_over_parts_of_a_batch_is_refused():
    settings = load.load(f"{ROOT}/configs/clm.py:tiny", ["--config.accumulate=2"])
    with pytest.raises(ConfigError, match="accumulate=2: the losses of the routers"):
        setup._check_balance(settings, model())
    setup._check_balance(settings, model(router_aux_loss=0.0, router_z_loss=0.0))
    setup._check_balance(settings, llama.Model("tiny"))
