"""What LoRA computes, what it leaves as it was, and what a training step keeps and costs."""

import functools
import re
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fmjax.adapters import initial, lora, low_rank, merge, wrapper
from fmjax.errors import ConfigError
from fmjax.models import bert, layers, param_init
from fmjax.params import paths, precision, randomness
from fmjax.training import flops

KEY = jax.random.key(0)
ALL = ((r"block_.*/(attn|mlp)/.*", 4),)
MIXED = ((r"block_0[12]/attn/query", 3), *ALL)
TRAIN = ((r".*/lora_.", "train"), (".*", "freeze"))
BATCH = tiny.batch(2)
ARRAYS = [BATCH[name] for name in ("input_ids", "segment_ids", "positions", "token_types")]
SEEDS = randomness.seeds(KEY, jnp.arange(2))


def wrapped(targets=MIXED, family="bert", **settings):
    """Rows are (expression, rank); in as few stacks as can be."""
    model = lora.wrap(tiny.model(family), targets=targets, **settings)
    return model.clone(stacks=paths.runs(model.kinds))


def moved(params, scale=0.1):
    """Every leaf of the adapter away from where it starts, each by its own amount."""

    def noise(name, x):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return np.float32(scale) * rng.standard_normal(x.shape, np.float32)

    named = {n: x + noise(n, x) if "/lora_" in n else x for n, x in paths.unstack(params).items()}
    stacks = [re.match(r"blocks_(\d+)_(\d+)$", name) for name in params]
    stacks = [int(m[2]) - int(m[1]) + 1 for m in stacks if m]
    return paths.stack(named, stacks or None)


@functools.cache
def fresh(model):
    return jax.jit(functools.partial(param_init.init_params, model))(KEY)


@functools.cache
def program(model):
    encode = lambda p, seeds, **ids: model.apply(
        {"params": p}, *ARRAYS, seeds, method="encode", **ids
    )
    return jax.jit(encode)


def outputs(model, params, seeds=None, **ids):
    return np.asarray(program(model)(params, seeds, **ids))


def test_by_hand():
    """x = [1, 2], W = [[1], [1]], A = [[1], [2]], B = [[3]], alpha 4: 3 + 4 * (5 * 3)."""
    model = lora.wrap(Dense(1), targets=(("out", 1),), alpha=4)
    leaves = dict(
        kernel=jnp.ones((2, 1)), lora_a=jnp.array([[1.0], [2.0]]), lora_b=jnp.full((1, 1), 3.0)
    )
    assert model.apply({"params": {"out": leaves}}, jnp.array([[1.0, 2.0]])) == 63.0


class Dense(nn.Module):
    features: int

    def example(self):
        return (jnp.ones((1, 2)),)

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, use_bias=False, name="out")(x)


@pytest.mark.parametrize("scaling, scale", [("alpha/rank", 2.0), ("rslora", 4.0)])
def test_scales(scaling, scale):
    model = wrapped(((r".*/query", 4), (r".*/key", None)), scaling=scaling, alpha=8, rank=16)
    sites = model.sites()
    assert sites["block_00/attn/query"].scale == scale
    assert sites["block_00/attn/key"].scale == (0.5 if scaling == "alpha/rank" else 2.0)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_identity_at_first_to_the_bit(dora):
    """Module by module, and so of the whole: the compiler may fuse two programs differently."""
    model = wrapped(ALL, dora=dora, dropout=0.5)
    params = fresh(model)
    base, adapter = merge.separate(params)
    assert len(jax.tree.leaves(adapter)) == 6 * (3 if dora else 2)
    with jax.disable_jit():
        x = jax.random.normal(KEY, (2, 5, 32))
        for path, site in list(model.sites().items())[-2:]:  # (32, 64) and (64, 32)
            leaves = params["blocks_00_02"]
            for part in path.split("/")[1:]:
                leaves = leaves[part]
            leaves = {name: leaf[0] for name, leaf in leaves.items()}
            rows = x if site.shape[0] == 32 else jnp.concatenate([x, x], -1)
            module = layers.Linear(site.shape[1])
            plain = module.apply({"params": leaves}, rows)
            given = low_rank.Leaves(
                leaves["lora_a"], leaves["lora_b"], leaves.get("lora_m"), site.scale, 0.5, SEEDS
            )
            path = low_rank.linear(rows, given, jnp.float32)
            same = low_rank.add(plain, path, leaves["bias"], leaves["kernel"], given)
            np.testing.assert_array_equal(same, plain)
    np.testing.assert_allclose(outputs(model, params), outputs(model.model, base), atol=2e-6)


RANKS = {"all": ALL, "ranks by layer": MIXED}


@pytest.mark.parametrize("ranks, family", tiny.by_family(RANKS))
def test_the_base_starts_as_without_an_adapter_and_stacking_changes_no_number(ranks, family):
    targets = RANKS[ranks]
    model = wrapped(targets, family)
    assert model.stacks == ((3,) if targets is ALL and family != "t5" else (1, 2))
    base = paths.unstack(fresh(model.model.clone(stacks=None)))
    one, other = (
        paths.unstack(fresh(model.clone(stacks=stacks))) for stacks in (model.stacks, None)
    )
    assert {name for name in one if not re.fullmatch(wrapper.LEAVES, name)} == base.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name])
        if name in base:
            np.testing.assert_array_equal(leaf, base[name])
    first = [one[f"block_0{i}/attn/key/lora_a"] for i in range(3)]
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[1], first[2])
    assert np.abs(first[0]).max() <= 32**-0.5 and np.std(first[0]) == pytest.approx(
        96**-0.5, rel=0.1
    )


@pytest.fixture(scope="module")
def scanned():
    model = wrapped(dropout=0.5, alpha=2)
    params = moved(fresh(model))
    return model, params, outputs(model, params), outputs(model, params, SEEDS)


@pytest.mark.parametrize("change", ["unrolled", "block", "dots"])
def test_layouts_give_the_same_numbers(change, scanned):
    """Dropout too, of which every layer has its own."""
    model, params, plain, dropped = scanned
    if change == "unrolled":
        model, params = model.clone(stacks=None), paths.restack(params, None)
    else:
        changed = bert.Model("tiny", **tiny.SIZES, remat=change).clone(stacks=model.stacks)
        model = wrapper.Adapted(changed, model.adapter)
    np.testing.assert_allclose(outputs(model, params), plain, atol=1e-5)
    np.testing.assert_allclose(outputs(model, params, SEEDS), dropped, atol=1e-5)


def test_dropout_is_of_the_example_and_of_the_path_alone(scanned):
    model, params, plain, dropped = scanned
    assert np.abs(plain - dropped).max() > 0.05
    base = merge.separate(params)[0]
    base_alone = outputs(model.model, base, SEEDS)
    silent = paths.map_names(lambda p, x: 0 * x if p.endswith("lora_b") else x, params)
    np.testing.assert_allclose(outputs(model, silent, SEEDS), base_alone, atol=2e-6)
    again = outputs(model, params, SEEDS[::-1])
    assert np.abs(again - dropped).max() > 0.05


def test_every_module_of_every_layer_drops_its_own(scanned):
    model, params, *_ = scanned
    flat = paths.flatten(model._with_streams(params))
    numbers = [np.ravel(leaf) for path, leaf in flat.items() if path.endswith("adapter_stream")]
    assert len(np.unique(np.concatenate(numbers))) == 3 * 6


def test_dropout_scales_what_is_left():
    """Over many examples the mean is that of no dropout, and about half of the inputs are zero."""
    x, a, b = jnp.ones((2000, 4)), jnp.eye(4), jnp.eye(4)
    seeds = randomness.named(randomness.seeds(KEY, jnp.arange(2000)), "lora")
    leaves = low_rank.Leaves(a, b, None, 1.0, 0.5, seeds)
    y = np.asarray(low_rank.linear(x, leaves, jnp.float32))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert y.mean() == pytest.approx(1.0, abs=0.05)


def test_bfloat16_is_rounded_once():
    """1 and twice 3 * 2^-10 is nearest to 1 + 2^-7, the next number; with either alone, to 1."""
    model = lora.wrap(Bfloat(), targets=(("out", 1),), alpha=1)
    part = jnp.full((1, 1), 3 * 2.0**-10)
    leaves = dict(kernel=jnp.ones((1, 1)), bias=part[0], lora_a=jnp.ones((1, 1)), lora_b=part)
    y = model.apply({"params": {"out": leaves}}, jnp.ones((1, 1), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and y == 1 + 2.0**-7


class Bfloat(nn.Module):
    def example(self):
        return (jnp.ones((1, 1)),)

    @nn.compact
    def __call__(self, x):
        return layers.Linear(1, dtype=jnp.bfloat16, name="out")(x)


class Pictures(nn.Module):
    """A convolution with stride and padding, a table of flax, a projection."""

    def example(self):
        return jnp.ones((2, 6, 6, 3)), jnp.zeros((2, 4), jnp.int32)

    @nn.compact
    def __call__(self, x, ids):
        x = nn.Conv(8, (3, 3), strides=2, padding="SAME", name="conv")(x)
        x = nn.Dense(5, name="out")(x.mean((1, 2)))
        return x + nn.Embed(7, 5, name="table")(ids).mean(1)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_flax_modules_of_any_model_train_as_if_merged(dora):
    model = lora.wrap(Pictures(), targets=((r"conv|out", 2), ("table", 3)), dora=dora, alpha=2)
    x, ids = jax.random.normal(KEY, (2, 6, 6, 3)), jnp.array([[0, 1, 2, 6], [3, 3, 4, 5]])
    params = model.init(KEY, x, ids)["params"]
    assert params["conv"]["lora_a"].shape == (3, 3, 3, 2)
    assert params["table"]["lora_a"].shape == (7, 3)
    base = merge.separate(params)[0]
    jax.tree.map(np.testing.assert_array_equal, base, Pictures().init(KEY, x, ids)["params"])
    at_first = Pictures().apply({"params": base}, x, ids)
    np.testing.assert_allclose(model.apply({"params": params}, x, ids), at_first, atol=1e-6)
    params = moved(params, 0.5)
    y = model.apply({"params": params}, x, ids)
    merged = merge.merge(model, params)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_allclose(Pictures().apply({"params": merged}, x, ids), y, atol=1e-5)
    assert np.abs(y - at_first).max() > 0.1


@pytest.mark.parametrize(
    "dora, family", tiny.by_family([False, True], (False, "gpt2"), (True, "llama"))
)
def test_merged_outputs_are_equal_and_cost_what_the_base_costs(dora, family):
    model = wrapped(ALL, family, dora=dora)
    params = moved(fresh(model))
    merged = merge.merge(model, params)
    expected = outputs(model, params)
    np.testing.assert_allclose(outputs(model.model, merged), expected, atol=1e-5)
    adapter = merge.separate(params)[1]
    if dora:
        with pytest.raises(ConfigError, match="cannot be taken out"):
            merge.unmerge(model, merged, adapter)
    else:
        np.testing.assert_allclose(
            outputs(model, merge.unmerge(model, merged, adapter)), expected, atol=1e-5
        )
        encode = lambda m: lambda p: m.apply({"params": p}, *ARRAYS, method="encode")
        base = merge.separate(params)[0]
        cost = flops.count(encode(model.model), base)
        assert flops.count(encode(model.model), merged) == cost < flops.count(encode(model), params)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_table_that_the_output_reads_is_not_merged(family):
    model = wrapped(((r"embed/(token|position)", 2),), family)
    sites = model.sites()
    assert sites["embed/token"].shared and not sites["embed/position"].shared
    with pytest.raises(ConfigError, match="embed/token is adapted where it is looked up"):
        merge.merge(model, fresh(model))


def test_a_table_beside_which_the_output_has_its_own_is_merged():
    model = wrapped(((r"embed/token", 2),), "llama")
    params = moved(fresh(model))
    merged = merge.merge(model, params)
    np.testing.assert_allclose(outputs(model.model, merged), outputs(model, params), atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_output_matrix_has_an_adapter(dora):
    model = wrapped(((r"head/lm", 2),), "llama", dora=dora, alpha=4)
    params = moved(fresh(model))
    hidden = jax.random.normal(KEY, (2, 5, 32))
    logits = lambda model, params: model.apply({"params": params}, hidden, method="logits")
    found = logits(model, params)
    np.testing.assert_allclose(logits(model.model, merge.merge(model, params)), found, atol=1e-5)
    own = params["head"]["lm"]
    if not dora:
        whole = own["kernel"] + 2 * own["lora_a"] @ own["lora_b"]
        np.testing.assert_allclose(found, hidden @ whole, atol=1e-5)
    kept = {**own, "kernel": precision.Rows(own["kernel"].T)}  # as what writes text keeps it
    kept = {**params, "head": {**params["head"], "lm": kept}}
    np.testing.assert_allclose(logits(model, kept), found, atol=1e-5)


def test_the_output_matrix_has_no_dropout_and_no_adapter_by_example():
    with pytest.raises(ConfigError, match="config.adapter.dropout=0.1 has no place.*'head/lm', 0"):
        wrapped(((r"head/lm", 2),), "llama", dropout=0.1)
    model = wrapped(((r"head/lm", 2),), "llama")
    params = fresh(model)
    both, ids = merge.combine(params, [params, params]), jnp.zeros(2, jnp.int32)
    with pytest.raises(ConfigError, match="not chosen by example"):
        model.apply({"params": both}, jnp.ones((2, 32)), method="logits", adapter_ids=ids)


@pytest.mark.parametrize("dora, family", [(False, "bert"), (True, "bert"), (True, "llama")])
def test_each_example_has_the_adapter_it_asks_for(dora, family):
    model = wrapped((*MIXED, (r"embed/token", 2)), family, dora=dora)
    first = moved(fresh(model))
    other = paths.map_names(lambda p, x: -2 * x if "/lora_" in p else x, first)
    both = merge.combine(first, [first, other])
    one, two = outputs(model, first), outputs(model, other)
    chosen = outputs(model, both, adapter_ids=jnp.array([1, 0]))
    np.testing.assert_allclose(chosen, [two[0], one[1]], atol=1e-5)
    assert np.abs(one - two).max() > 0.1
    stray = outputs(model, both, adapter_ids=jnp.array([-1, 2]))
    assert np.isnan(stray).all()


def test_adapters_of_several_kinds_do_not_share_a_batch():
    one, other = (fresh(wrapped(((r".*/query", r),))) for r in (2, 3))
    with pytest.raises(ConfigError, match="same targets, ranks"):
        merge.combine(one, [one, other])
    with pytest.raises(ValueError, match="adapter_ids has 3 entries for 2 examples"):
        outputs(
            wrapped(((r".*/query", 2),)),
            merge.combine(one, [one]),
            adapter_ids=jnp.zeros(3, jnp.int32),
        )


@pytest.mark.parametrize("dora, family", [(False, "bert"), (True, "bert"), (False, "gpt2")])
def test_pissa_starts_at_the_weights_with_their_principal_part_outside(dora, family):
    model = wrapped(family=family, init="pissa", dora=dora)
    start = fresh(model)
    params = initial.start(model, start)
    np.testing.assert_allclose(outputs(model, params), outputs(model, start), atol=1e-5)
    path = ("blocks_01_02", "attn", "query")
    new, old = params, start
    for part in path:
        new, old = new[part], old[part]
    for layer in range(2):
        values = np.linalg.svd(old["kernel"][layer], compute_uv=False)
        left = np.linalg.svd(new["kernel"][layer], compute_uv=False)
        np.testing.assert_allclose(left[:5], values[3:8], atol=1e-5)  # rank 3


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_loftq_makes_up_for_what_quantising_loses(family):
    model = wrapped(ALL, init="loftq", family=family)
    start = fresh(model)
    params = initial.start(model, start)
    for path, site in list(model.places(params).items())[-2:]:
        new, old = params, start
        for part in path.split("/"):
            new, old = new[part], old[part]
        base = new["kernel"][0]
        assert all(len(np.unique(column)) <= 15 for column in base.T)
        product = site.scale * new["lora_a"][0] @ new["lora_b"][0]
        lost = np.linalg.norm(old["kernel"][0] - initial.int4(old["kernel"][0]))
        assert np.linalg.norm(old["kernel"][0] - base - product) < 0.9 * lost


def test_int4_by_hand():
    """The largest of a block is 7 steps of 0.5."""
    column = jnp.array([[3.5], [-0.6], [0.2], [1.3]])
    np.testing.assert_allclose(initial.int4(column), [[3.5], [-0.5], [0.0], [1.5]])
    np.testing.assert_array_equal(initial.int4(jnp.zeros((70, 2))), np.zeros((70, 2)))


def test_the_norm_of_dora_is_that_of_the_sum():
    rng = np.random.default_rng(0)
    w, a, b, m = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 5), (6, 2), (2, 5), 5))
    leaves = low_rank.Leaves(a, b, m, 0.5)
    norms = np.linalg.norm(w, axis=0), np.linalg.norm(w + 0.5 * a @ b, axis=0)
    np.testing.assert_allclose(1 + low_rank.excess(w, leaves), (norms[0] + m) / norms[1], rtol=1e-5)
    slope = jax.grad(lambda leaves: low_rank.excess(w, leaves).sum(), allow_int=True)(leaves)
    assert not slope.a.any() and not slope.b.any()
    np.testing.assert_allclose(slope.m, 1 / norms[1], rtol=1e-5)
    assert not low_rank.excess(w, leaves._replace(b=0 * b, m=0 * m)).any()


@pytest.mark.parametrize(
    "targets, message",
    [
        (((r"block_.*", 4),), r"cannot be adapted: block_00/attn_norm \(LayerNorm\)"),
        (
            ((r"block_07/attn/query", 4),),
            "'block_07/attn/query' decides nothing that can be adapted.*Did you",
        ),
        (((r"block_00/attn", 4),), "'block_00/attn' decides nothing that can be adapted"),
        (((r".*/query", 4), (r"block_00/attn/query", 2)), "earlier ones win"),
        (((r"block_00/attn/query/kernel", 4),), "must match the whole path"),
        (((r".*", 0),), "every value is 0"),
    ],
)
def test_targets_that_cannot_be_meant_are_refused(targets, message):
    with pytest.raises(ConfigError, match=message):
        wrapped(targets)


def test_a_grouped_convolution_is_refused_and_rank_0_leaves_modules_out():
    class Grouped(Pictures):
        @nn.compact
        def __call__(self, x, ids):
            return nn.Conv(6, (3, 3), feature_group_count=3, name="conv")(x)

    with pytest.raises(ConfigError, match=r"cannot be adapted: conv \(Conv\)"):
        lora.wrap(Grouped(), targets=(("conv", 2),))
    model = wrapped(((r"block_00/.*", 0), (r".*/(query|value)", 2)))
    assert {name.split("/")[0] for name in model.sites()} == {"block_01", "block_02"}


def test_a_base_without_the_leaves_is_not_run_in_silence():
    model = wrapped()
    base = merge.separate(fresh(model))[0]
    with pytest.raises(ValueError, match="has no lora_a among the parameters"):
        outputs(model, base)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_backward_pass_keeps_x_and_x_a(rate):
    """Of a layer with 3 x 5 rows, 16 inputs, 24 outputs and rank 2."""
    seeds = randomness.named(randomness.seeds(KEY, jnp.arange(3)), "lora")

    def layer(x, a, b):
        leaves = low_rank.Leaves(a, b, None, 2.0, rate, seeds)
        kernel = jnp.ones((16, 24))
        return precision.linear(x, kernel, jnp.float32) + low_rank.linear(x, leaves, jnp.float32)

    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 5, 16), (16, 2), (2, 24)))
    kept = [
        leaf for leaf in jax.tree.leaves(jax.vjp(layer, x, a, b)[1]) if leaf.shape[:2] == (3, 5)
    ]
    assert {leaf.shape for leaf in kept} == {(3, 5, 16), (3, 5, 2)}
    assert sum(leaf.shape == (3, 5, 2) for leaf in kept) == 1
    for leaf in kept:  # x is listed for each product that keeps it, and is one array
        if leaf.shape == x.shape:
            np.testing.assert_array_equal(leaf, x)


SIZES = dict(width=24, mlp=56, heads=4)  # no other array of the step has these shapes
WEIGHTS = {(24, 24), (24, 56), (56, 24)}


@pytest.mark.parametrize("layout", [dict(), dict(remat="block")], ids=str)
def test_the_compiled_step_forms_no_gradient_of_a_weight(layout):
    adapter = dict(name="lora", targets=ALL, dropout=0.1)

    def formed(groups):
        made = tiny.make(groups, depth=2, adapter=adapter, **SIZES, **layout)
        text = jax.jit(made.raw_step).lower(made.abstract, tiny.batch(8)).compile().as_text()
        shapes = re.findall(r"= f32\[([\d,]+)\]\S* (?:dot|reduce-scatter|all-reduce)\(", text)
        return WEIGHTS & {tuple(map(int, shape.split(","))) for shape in shapes}

    assert formed(TRAIN) == set()
    if not layout:
        assert formed(((".*", "train"),)) == WEIGHTS


def test_flops_are_two_thirds_of_those_of_full_training():
    """A weight's gradient, a third of a layer's products, falls away; the path costs 6 r (I + O)
    per row instead of its 2 I O."""
    rows = 8 * tiny.T
    shapes = [(32, 32)] * 4 + [(32, 64), (64, 32)]
    adapter = dict(name="lora", targets=ALL)
    blocks = ((r"block_.*/kernel", "train"), (".*", "freeze"))

    def count(groups, **changes):
        made = tiny.make(groups, **changes)
        return flops.count(made.raw_step, made.abstract, tiny.batch(8))

    less = 3 * rows * sum(2 * i * o - 6 * 4 * (i + o) for i, o in shapes)
    assert count(blocks) - count(TRAIN, adapter=adapter) == less


def test_training_moves_the_adapter_alone_and_lora_plus_is_a_group():
    """At first B is zero, and with it the gradient of A: one step of SGD moves B alone."""
    made = tiny.make(
        ((r".*/lora_b", "lora_b"), *TRAIN),
        depth=1,
        adapter=dict(name="lora", targets=ALL),
        changes=dict(name="sgd", args={}, weight_decay=0),
        group_optim={"lora_b": {"lr": 16e-2}},
    )
    assert made.optimizer.rates["lora_b"](0) == 16 * made.optimizer.rates["train"](0)
    start = made.state()
    end, metrics = made.step(start, tiny.batch(8))
    assert float(metrics["skipped"]) == 0 and float(metrics["grad_norm"]) > 0
    before = paths.flatten(jax.device_get(start.params))
    for path, leaf in paths.flatten(jax.device_get(end.params)).items():
        changed = np.abs(leaf - before[path]).max() > 0
        assert changed == path.endswith("lora_b"), path


def test_an_unknown_start_is_refused():
    with pytest.raises(ConfigError, match="config.adapter.init='svd' is not known.*pissa"):
        wrapped(init="svd")
