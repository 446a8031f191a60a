"""IA³ and bottleneck adapters: what they compute, where they start, and what can be merged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fmjax import adapters
from fmjax.adapters import bottleneck, ia3, merge
from fmjax.errors import ConfigError
from fmjax.models import bert, param_init
from fmjax.params import paths, sharding

SCALED = ((r"block_.*/attn/(key|value)", "output"), (r"block_.*/mlp/down", "input"))
HOULSBY = ((r"block_.*/(attn/out|mlp/down)", None),)
KINDS = {
    "ia3": dict(name="ia3", targets=SCALED),
    "houlsby": dict(name="bottleneck", targets=HOULSBY, width=4),
    "parallel": dict(
        name="bottleneck", targets=((r"block_.*/mlp", 4),), beside=True, scale=4.0
    ),
}  # fmt: skip
TRAIN = ((rf"{adapters.LEAVES}", "train"), (".*", "freeze"))
BATCH = tiny.batch(2)
ARRAYS = [BATCH[name] for name in ("input_ids", "segment_ids", "positions", "token_types")]


QUICK = ("ia3", "gpt2"), ("ia3", "llama"), ("parallel", "llama")
CASES = tiny.by_family(KINDS, *QUICK, encoder=["houlsby"])


@functools.cache
def made(kind, family="bert", **options):
    return tiny.make(TRAIN, adapter=KINDS[kind], family=family, **options)


def moved(params):
    """Every leaf of the adapter away from where it starts."""
    rng = np.random.default_rng(0)
    noise = lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    own = lambda name: adapters.wrapper.re.fullmatch(adapters.LEAVES, name)
    return paths.map_names(lambda name, x: x + noise(x) if own(name) else x, params)


@functools.cache
def program(model):
    def states(params):
        apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
        hidden = apply(*ARRAYS, method="encode")
        if not model.decodes:
            return hidden
        return apply(*ARRAYS[:3], hidden, ARRAYS[1], method="decode")

    return jax.jit(states)


@pytest.mark.parametrize("kind, family", CASES)
def test_outputs_are_the_bases_at_first_and_not_after(kind, family):
    run = made(kind, family)
    params = run.state().params
    base = merge.separate(params)[0]
    plain = program(adapters.base(run.model))(base)
    np.testing.assert_allclose(program(run.model)(params), plain, atol=1e-5)
    assert np.abs(program(run.model)(moved(params)) - plain).max() > 0.01


@pytest.mark.parametrize("kind, family", CASES)
def test_two_steps_move_all_of_the_adapter_and_nothing_else(kind, family):
    run = made(kind, family)
    current = run.state()
    before = paths.unstack(jax.device_get(current.params))
    for seed in (0, 1):
        current, _ = run.step(current, tiny.batch(4, seed))
    after = paths.unstack(jax.device_get(current.params))
    moving = {name for name in after if not np.array_equal(before[name], after[name])}
    assert moving == {
        name for name in after if adapters.wrapper.re.fullmatch(adapters.LEAVES, name)
    }


EVERY = dict(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    "layout, kind, family",
    [
        *((EVERY, kind, "bert") for kind in KINDS),
        *(pytest.param(dict(fsdp=8), x, "bert", marks=pytest.mark.slow) for x in KINDS),
        pytest.param(EVERY, "houlsby", "llama", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_any_layout_gives_the_same_numbers(layout, kind, family):
    def two_steps(mesh):
        with jax.set_mesh(mesh):
            run = made(kind, family, mesh=mesh, dropout=0.0, attention_dropout=0.0)
            place = jax.sharding.NamedSharding(mesh, sharding.BATCH)
            current, losses = run.state(), []
            for seed in (0, 1):
                batch = {name: jax.device_put(x, place) for name, x in tiny.batch(8, seed).items()}
                current, found = run.step(current, batch)
                losses.append(float(found["loss"]))
        return paths.flatten(jax.device_get(current.params)), losses

    params, losses = two_steps(sharding.make_mesh(**{"data": 1, **layout}))
    wanted, wanted_losses = two_steps(tiny.mesh())
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-6)
    for path, leaf in params.items():
        np.testing.assert_allclose(leaf, wanted[path], atol=1e-6, err_msg=path)


def test_ia3_by_hand():
    """x = [1, 2], W = [[1], [1]], b = 1: the input times (2, 3) gives 9, the output times 5 20."""
    params = dict(kernel=jnp.ones((2, 1)), bias=jnp.ones(1))
    x = jnp.array([[1.0, 2.0]])
    for side, scale, wanted in (("input", [2.0, 3.0], 9.0), ("output", [5.0], 20.0)):
        model = ia3.wrap(One(), targets=(("out", side),))
        given = {"out": params | {"ia3_scale": jnp.array(scale)}}
        assert model.apply({"params": given}, x) == wanted
        merged = merge.merge(model, given)
        assert merged["out"].keys() == params.keys()
        assert model.model.apply({"params": merged}, x) == wanted


def test_a_bottleneck_by_hand():
    """y = 3 + 1 = 4; behind it relu(4 * 2 - 5) = 3 times 10 and 1 more: 4 + 0.5 * 31."""
    leaves = dict(down=jnp.full((1, 1), 2.0), down_bias=jnp.array([-5.0]))
    leaves |= dict(up=jnp.full((1, 1), 10.0), up_bias=jnp.ones(1))
    own = dict(kernel=jnp.ones((2, 1)), bias=jnp.ones(1))
    own |= {f"bottleneck_{name}": leaf for name, leaf in leaves.items()}
    model = bottleneck.wrap(One(), targets=(("out", 1),), scale=0.5)
    assert model.apply({"params": {"out": own}}, jnp.array([[1.0, 2.0]])) == 19.5
    with pytest.raises(
        ConfigError, match="out has an adapter that no weight of the base can stand for"
    ):
        merge.merge(model, {"out": own})


class One(bert.nn.Module):
    def example(self):
        return (jnp.ones((1, 2)),)

    @bert.nn.compact
    def __call__(self, x):
        return bert.layers.Linear(1, name="out")(x)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ia3_merges_into_the_weights(family):
    run = made("ia3", family)
    params = moved(run.state().params)
    model, merged = adapters.merged(run.model, params)
    assert paths.unstack(merged).keys() == paths.unstack(param_init.abstract_params(model)).keys()
    np.testing.assert_allclose(program(model)(merged), program(run.model)(params), atol=1e-5)


def test_dropout_of_a_bottleneck_is_each_modules_own():
    inner = bert.Model("tiny", **tiny.SIZES, dropout=0.0, attention_dropout=0.0)
    model = adapters.wrap(inner, dict(adapter=KINDS["houlsby"] | dict(dropout=0.5)))
    model = model.clone(stacks=(3,))
    params = moved(param_init.init_params(model, jax.random.key(0)))
    from fmjax.params import randomness

    seeds = randomness.seeds(jax.random.key(1), jnp.arange(2))
    encode = lambda seeds: model.apply({"params": params}, *ARRAYS, seeds, method="encode")
    assert np.abs(encode(seeds) - encode(None)).max() > 0.05
    np.testing.assert_array_equal(encode(seeds), encode(seeds))
    numbers = paths.unstack(model._with_streams(params))
    own = [int(x) for name, x in numbers.items() if name.endswith("adapter_stream")]
    assert len(set(own)) == len(own) == 6


@pytest.mark.parametrize(
    "adapter, message",
    [
        (dict(name="ia3", targets=((r".*/query", "both"),)), "'.*/query' has 'both'; possible are"),
        (dict(name="ia3", targets=((r".*norm", "output"),)), r"adapted: .*\(LayerNorm\)"),
        (dict(name="bottleneck", targets=((r"embed/token", 4),)), r"embed/token \(Embedding\)"),
        (dict(name="ia3", targets=((r".*/query", "output"),), rank=3), "adapter.rank is not"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(adapter, message):
    with pytest.raises(ConfigError, match=message):
        tiny.make(TRAIN, adapter=adapter)


def test_a_module_has_one_adapter_and_a_base_is_quantised_once():
    from fmjax.adapters import lora, quantise

    model = bert.Model("tiny", **tiny.SIZES)
    scaled = ia3.wrap(model, targets=((r".*/(key|value)", "output"),))
    with pytest.raises(ConfigError, match="attn/value would have two adapters, Ia3 and Lora"):
        lora.wrap(scaled, targets=((r".*/(query|value)", 2),))
    int8 = quantise.wrap(model, name="int8", targets=r".*/query")
    with pytest.raises(
        ConfigError, match="attn/query would have two adapters, Quantised and Quantised"
    ):
        quantise.wrap(int8, name="fp8", targets=r".*/query")
    with pytest.raises(ConfigError, match="quantise first, and adapt a module once"):
        quantise.wrap(scaled, name="int8", targets=r".*/key")
    both = lora.wrap(scaled, targets=((r".*/query", 2),)).clone(stacks=(3,))
    params = moved(param_init.init_params(both, jax.random.key(0)))
    whole, merged = adapters.merged(both, params)
    assert whole == model.clone(stacks=(3,))
    np.testing.assert_allclose(program(whole)(merged), program(both)(params), atol=1e-5)


def test_adapters_train_over_one_another():
    """A bottleneck behind what LoRA adds to, over a base of few bits: all get gradients."""
    from fmjax.adapters import lora, quantise

    model = quantise.wrap(bert.Model("tiny", **tiny.SIZES), name="int8", targets=r".*/query")
    model = lora.wrap(model, targets=((r".*/query", 2),))
    model = bottleneck.wrap(model, targets=((r".*/attn/out", None),), width=4)
    model = model.clone(stacks=(3,))
    params = moved(param_init.init_params(model, jax.random.key(0)))
    frozen, own = merge.separate(params)
    loss = lambda own: jnp.sum(jnp.square(program(model)(merge.join(frozen, own))))
    slopes = paths.flatten(jax.grad(loss)(own))
    assert {name.rpartition("/")[2] for name in slopes} == {
        "lora_a", "lora_b", "bottleneck_down", "bottleneck_down_bias", "bottleneck_up",
        "bottleneck_up_bias",
    }  # fmt: skip
    assert all(np.abs(slope).max() > 0 for slope in slopes.values())


def test_one_adapter_for_all_is_not_chosen_by_example():
    run = made("ia3")
    params = run.state().params
    with pytest.raises(ConfigError, match="Ia3 is one adapter for all examples"):
        run.model.apply({"params": params}, *ARRAYS, method="encode", adapter_ids=jnp.zeros(2, int))
    with pytest.raises(ConfigError, match="Ia3 is one adapter for all examples"):
        merge.unmerge(run.model, params, params)
