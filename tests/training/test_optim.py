import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmjax.errors import ConfigError
from fmjax.params import groups, paths
from fmjax.training import optim

NAMES = ["embed/token/embedding", "head/mlm/bias"] + [f"block_{i:02d}/up/kernel" for i in range(4)]
OPTIM = dict(
    name="adamw",
    args={},
    lr=0.1,
    schedule="constant",
    warmup=0,
    cooldown=0,
    delay=0,
    end=0.0,
    clip=0.0,
) | dict(weight_decay=0.0, decay=".*kernel", layer_decay=1.0, ema=0.0, skip_spikes=0.0)


def steps(duration):
    return {"100%": 100}.get(duration, duration)


def make(params, assigned=None, group_optim=None, **changes):
    assigned = assigned or {name: "train" for name in paths.unstack(params)}
    trainable, _ = groups.split(params, assigned)
    return optim.make(
        trainable,
        assigned,
        steps=steps,
        depths={"": 4},
        optim=OPTIM | changes,
        group_optim=group_optim or {},
    )


def params(stacks):
    key = iter(jax.random.split(jax.random.key(0), 10))
    named = {f"block_{i:02d}/up/kernel": jax.random.normal(next(key), (6, 8)) for i in range(4)}
    named["embed/token/embedding"] = jax.random.normal(next(key), (5, 6))
    named["head/mlm/bias"] = jax.random.normal(next(key), (5,))
    return paths.stack(named, stacks)


def run(tx, values, n=4):
    """n updates with fixed pseudo-gradients; returns {name: value}."""
    state = tx.init(values)
    for i in range(n):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(x * (i + 1)), values)
        updates, state = tx.update(grads, state, values)
        values = optax.apply_updates(values, updates)
    return paths.unstack(values), state


@pytest.mark.parametrize("name", ["adamw", "lamb", "lion", "adafactor", "muon", "sgd"])
def test_stacked_layers_update_as_separate_ones(name):
    """LAMB's trust ratio, Adafactor's factors and Muon's orthogonalisation are per matrix, not per
    stack."""
    decay = {} if name in ("sgd", "adafactor") else {"weight_decay": 0.01}
    changes = dict(name=name, layer_decay=0.5, clip=1.0, **decay)
    if name == "adafactor":
        changes["args"] = dict(min_dim_size_to_factor=2)
    one = run(make(params(None), **changes).tx, params(None))[0]
    many = run(make(params((1, 3)), **changes).tx, params((1, 3)))[0]
    for key in one:
        np.testing.assert_allclose(many[key], one[key], rtol=2e-5, atol=1e-6, err_msg=key)


def test_adamw_first_step_by_hand():
    """Bias-corrected Adam moves by lr * sign(g); decay subtracts lr * wd * p where the pattern
    matches."""
    values = params((4,))
    out, _ = run(make(values, weight_decay=0.5).tx, values, n=1)
    for name, before in paths.unstack(values).items():
        g = np.sin(before)
        step = 0.1 * g / (np.abs(g) + 1e-8)
        decayed = 0.1 * 0.5 * before if name.endswith("kernel") else 0
        np.testing.assert_allclose(out[name], before - step - decayed, rtol=1e-4, atol=1e-6)


def test_layer_decay_factors():
    """Depth 4: head 1, block_03 1/2, … block_00 1/16, embedding 1/32; the first Adam step is lr *
    factor."""
    values = jax.tree.map(jnp.ones_like, params((4,)))
    out, _ = run(make(values, layer_decay=0.5).tx, values, n=1)
    moved = {name: float(1 - x.ravel()[0]) / 0.1 for name, x in out.items()}
    expected = {f"block_{i:02d}/up/kernel": 0.5 ** (4 - i) for i in range(4)}
    expected |= {"head/mlm/bias": 1.0, "embed/token/embedding": 0.5**5}
    assert moved == pytest.approx(expected, rel=1e-4)


def test_layer_decay_is_of_each_trunk():
    """Trunks of 4 and 1 layers; what is of neither moves at the whole rate."""
    one = dict(jax.tree.map(jnp.ones_like, params((4,))))
    other = {name: {"w": jnp.ones(1)} for name in ("block_00", "embed", "head")}
    values = {"image": one, "text": other, "scale": {"logit": jnp.ones(1)}}
    depths = {"image/": 4, "text/": 1}
    factors = paths.unstack(optim._layerwise(values, 0.5, depths))
    assert float(factors["image/embed/token/embedding"]) == 0.5**5
    assert factors["image/block_01/up/kernel"].item() == 0.5**3
    assert [float(factors[f"text/{name}/w"]) for name in other] == [0.5, 0.25, 1.0]
    assert float(factors["scale/logit"]) == 1.0


def test_groups_have_their_own_learning_rates():
    values = jax.tree.map(jnp.ones_like, params((4,)))
    assigned = groups.assign(NAMES, ((r"head/.*", "head"), (".*", "train")))
    made = make(values, assigned, group_optim={"head": {"lr": 1.0}})
    out, _ = run(made.tx, values, n=1)
    assert float(1 - out["head/mlm/bias"][0]) == pytest.approx(1.0, rel=1e-4)
    assert float(1 - out["block_00/up/kernel"][0, 0]) == pytest.approx(0.1, rel=1e-4)
    assert {group: float(rate(3)) for group, rate in made.rates.items()} == pytest.approx(
        {"head": 1.0, "train": 0.1}
    )


def test_clip_is_over_all_that_trains():
    """Gradients (3, 4) have norm 5; clipped to 1 they are (0.6, 0.8), and SGD with lr 0.1 moves by
    a tenth."""
    values = {"a": {"kernel": jnp.zeros(1)}, "b": {"kernel": jnp.zeros(1)}}
    tx = make(values, {"a/kernel": "train", "b/kernel": "train"}, name="sgd", clip=1.0).tx
    grads = {"a": {"kernel": jnp.full(1, 3.0)}, "b": {"kernel": jnp.full(1, 4.0)}}
    updates, _ = tx.update(grads, tx.init(values), values)
    np.testing.assert_allclose(updates["a"]["kernel"], [-0.06], rtol=1e-5)
    np.testing.assert_allclose(updates["b"]["kernel"], [-0.08], rtol=1e-5)


def test_moving_average_by_hand():
    """SGD with gradient -10, lr 0.1: p = 1, 2, 3; decays min(d, (1+n)/(10+n)) = 1/10, 2/11,
    3/12."""
    values = {"kernel": jnp.zeros(1)}
    tx = make(values, {"kernel": "train"}, name="sgd", ema=0.999).tx
    state, p, average = tx.init(values), values, 0.0
    for n in range(3):
        updates, state = tx.update({"kernel": jnp.full(1, -10.0)}, state, p)
        p = optax.apply_updates(p, updates)
        rate = (1 + n) / (10 + n)
        average = rate * average + (1 - rate) * (n + 1)
    np.testing.assert_allclose(optim.averaged(state)["kernel"], [average], rtol=1e-6)
    assert optim.averaged(make(values, {"kernel": "train"}).tx.init(values)) is None


def shape(name, step, **changes):
    settings = dict(lr=1.0, warmup=10, total=110, decay=20, end=0.1) | changes
    return float(optim.schedule(name, **settings)(step))


def test_schedules_by_hand():
    assert shape("linear", 0) == pytest.approx(0.1)  # the first update already moves
    assert shape("linear", 9) == pytest.approx(1.0)
    assert shape("linear", 60) == pytest.approx(0.1 + 0.9 * 0.5)
    assert shape("linear", 110) == pytest.approx(0.1)
    assert shape("cosine", 60) == pytest.approx(0.1 + 0.9 * 0.5)
    assert shape("cosine", 35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 2**-0.5))
    assert shape("constant", 100) == 1.0
    assert shape("wsd", 89) == pytest.approx(1.0)
    assert shape("wsd", 100) == pytest.approx(0.1 + 0.9 * 0.5)
    assert shape("rsqrt", 39, decay=0) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "wsd", "rsqrt"])
def test_a_delay_shifts_the_whole_schedule(name):
    """Nothing moves before it; after it the rest of the run is a run of its own."""
    for step in (0, 5, 39):
        assert shape(name, step, total=150, delay=40) == 0.0
    for step in (0, 9, 60, 89, 100):
        late = shape(name, 40 + step, total=150, delay=40)
        assert late == pytest.approx(shape(name, step)) and late > 0


def test_groups_start_one_after_the_other():
    """SGD with gradient 1 and lr 0.1, of two groups, one from the third step on."""
    values = {"a": {"kernel": jnp.zeros(1)}, "b": {"kernel": jnp.zeros(1)}}
    assigned = {"a/kernel": "train", "b/kernel": "late"}
    tx = make(values, assigned, {"late": {"delay": 2}}, name="sgd").tx
    state, moved = tx.init(values), []
    for _ in range(4):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, values), state, values)
        moved.append([float(updates[name]["kernel"][0]) for name in ("a", "b")])
    np.testing.assert_allclose(moved, [[-0.1, 0], [-0.1, 0], [-0.1, -0.1], [-0.1, -0.1]], rtol=1e-6)


def test_unknown_names_and_arguments_are_named():
    values = params((4,))
    with pytest.raises(ConfigError, match="config.optim.name='adamww'.*Did you mean 'adamw'"):
        make(values, name="adamww")
    with pytest.raises(ConfigError, match="config.optim.args.beta1 is not known.*Possible: b1, b2"):
        make(values, args={"beta1": 0.9})
    with pytest.raises(ConfigError, match="'sgd' has no weight decay"):
        make(values, name="sgd", weight_decay=0.1)
    with pytest.raises(ConfigError, match="config.optim.schedule='cosin'.*Did you mean 'cosine'"):
        make(values, schedule="cosin")
    with pytest.raises(ConfigError, match="more than the run's 100"):
        make(values, warmup=200)
