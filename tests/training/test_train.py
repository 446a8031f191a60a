import functools
import json

import inject
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from common import ROOT, dots

from fmjax import objectives
from fmjax.config import load
from fmjax.errors import ConfigError
from fmjax.models import param_init
from fmjax.params import paths, sharding
from fmjax.tasks import train
from fmjax.training import flops, loop


def values(tree):
    return paths.unstack(jax.device_get(tree))


def close(a, b, atol=2e-6):
    a, b = values(a), values(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=atol, rtol=0, err_msg=name)


def loss_of(made, found):
    return objectives.mean(jax.device_get(found["sums"]), made.objectives)["loss"]


@functools.cache
def plain(family="bert"):
    return tiny.make(family=family, dropout=0.1, attention_dropout=0.1)


@functools.cache
def after_two_steps(family="bert"):
    made = plain(family)
    current, losses = made.state(), []
    for seed in (0, 1):
        current, found = made.step(current, tiny.batch(8, seed))
        losses.append(loss_of(made, found))
    return current, losses


def test_loss_falls_and_starts_at_ln_v():
    made = tiny.make()
    current, losses = made.state(), []
    for _ in range(30):
        current, found = made.step(current, tiny.batch(8))
        losses.append(loss_of(made, found))
    assert losses[0] == pytest.approx(np.log(tiny.V), abs=0.1)
    assert losses[-1] < losses[0] - 0.5
    assert int(current.step) == 30


@pytest.mark.parametrize("parts, family", tiny.by_family([2, 8], (8, "gpt2"), encoder=[2]))
def test_row42_accumulation_is_the_large_batch(parts, family):
    """With dropout on and another number of targets in every microbatch."""
    made = tiny.make(accumulate=parts, family=family, dropout=0.1, attention_dropout=0.1)
    current = made.state()
    for seed, expected in zip((0, 1), after_two_steps(family)[1], strict=True):
        current, found = made.step(current, tiny.batch(8, seed))
        assert loss_of(made, found) == pytest.approx(expected, abs=1e-6)
    close(current.params, after_two_steps(family)[0].params)


@pytest.mark.slow
def test_accumulation_does_no_work_twice():
    """The weights of the whole batch come from a pass that the compiler removes."""
    cost = lambda made: jax.jit(made.raw_step).lower(
        made.abstract, tiny.batch(8)
    ).compile().cost_analysis()["flops"]  # fmt: skip
    once = cost(tiny.make(scan=False))
    # A scan body counts once: one part in eight is an eighth of the work, plus the optimizer.
    assert cost(tiny.make(scan=False, accumulate=8)) < 0.45 * once


def test_best_must_be_a_metric_that_evaluation_brings():
    metrics = ["mlm/loss", "mlm/accuracy"]
    for best in ("", "validation/loss", "validation/mlm/accuracy", "validation/mlm/perplexity"):
        loop.check_best(best, metrics)
    with pytest.raises(ConfigError, match="config.best = .*acuracy.*'validation/mlm/accuracy'"):
        loop.check_best("validation/mlm/acuracy", metrics)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_empty_rows_change_nothing(family):
    made = tiny.make(family=family, dropout=0.1)
    full, more = tiny.batch(8), tiny.batch(16)
    padded = {name: jnp.concatenate([full[name], 0 * more[name][8:]]) for name in full}
    a, found_a = made.step(made.state(), full)
    b, found_b = made.step(made.state(), padded)
    assert loss_of(made, found_a) == pytest.approx(loss_of(made, found_b), abs=1e-6)
    close(a.params, b.params)
    assert int(found_a["units"]) == int(found_b["units"])


@pytest.mark.parametrize(
    "remat, family",
    tiny.by_family(["none", "block", "dots"], ("block", "llama"), encoder=["none"]),
)
def test_row42_scanned_and_unrolled_models_are_the_same(remat, family):
    options = dict(family=family, dropout=0.1, attention_dropout=0.1)
    made = tiny.make(scan=remat != "none", remat=remat, **options)
    current = made.state()
    assert ("block_00" in current.params) == (remat == "none")
    for seed in (0, 1):
        current, _ = made.step(current, tiny.batch(8, seed))
    close(current.params, after_two_steps(family)[0].params)


@pytest.mark.parametrize("family", tiny.families())
def test_less_is_kept_for_the_backward_pass_and_no_number_changes(family):
    """By the compiler's count of temporaries, where layers are scanned: of unrolled ones a CPU's
    compiler finds out that what is computed again is what it has, and keeps it."""
    sizes = dict(family=family, depth=6, width=64, mlp=64, mesh=tiny.mesh())
    taken, ends = [], []
    for remat in ("none", "dots", "block"):
        made = tiny.make(remat=remat, dropout=0.1, attention_dropout=0.1, **sizes)
        step = jax.jit(made.raw_step).lower(made.abstract, tiny.batch(32)).compile()
        taken.append(step.memory_analysis().temp_size_in_bytes)
        ends.append(step(made.state(), tiny.batch(32)))
    # What lies between: of a layer the products, and its input alone.
    assert taken[0] > 1.2 * taken[1] > 1.2**2 * taken[2]
    for state_, found in ends[1:]:
        assert loss_of(made, found) == pytest.approx(loss_of(made, ends[0][1]), abs=1e-6)
        norms = float(found["grad_norm"]), float(ends[0][1]["grad_norm"])
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        close(state_.params, ends[0][0].params)


LAYOUTS = dict(data=8), dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(tensor=4, fsdp=2)
LAYOUTS = {"x".join(f"{axis}{n}" for axis, n in layout.items()): layout for layout in LAYOUTS}


@pytest.mark.parametrize(
    "layout, family",
    tiny.by_family(LAYOUTS, ("tensor4xfsdp2", "llama"), encoder=["data2xfsdp2xtensor2"]),
)
def test_row12_any_layout_gives_the_same_numbers(layout, family):
    """The mesh of the other tests is data=8; this compares with one device holding everything. The
    two heads of keys of a Llama are cut in four too."""
    single = single_device(tiny.mesh(), family)
    mesh = sharding.make_mesh(**{"data": 1, **LAYOUTS[layout]})
    with jax.set_mesh(mesh):
        made = tiny.make(mesh=mesh, family=family, dropout=0.1, attention_dropout=0.1)
        current, losses = made.state(), []
        place = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        for seed in (0, 1):
            batch = {name: jax.device_put(x, place) for name, x in tiny.batch(8, seed).items()}
            current, found = made.step(current, batch)
            losses.append(loss_of(made, found))
    np.testing.assert_allclose(losses, single[1], rtol=1e-6)
    close(current.params, single[0])
    # Really laid out: each device holds its share of a matrix, and of its Adam moments.
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    kernels = [x for p, x in paths.flatten(current.params).items() if p.endswith("up/kernel")]
    kernels += [x for x in jax.tree.leaves(current.opt_state) if x.shape == kernels[0].shape]
    # Of a Llama with the moments of its gates; of a T5 two stacks.
    assert len(kernels) == {"llama": 5, "t5": 4}.get(family, 3)
    assert all(x.addressable_shards[0].data.size * ways == x.size for x in kernels)


@functools.cache
def single_device(mesh, family):
    made = tiny.make(mesh=mesh, family=family, dropout=0.1, attention_dropout=0.1)
    current, losses = made.state(), []
    for seed in (0, 1):
        current, found = made.step(current, tiny.batch(8, seed))
        losses.append(loss_of(made, found))
    return jax.device_get(current.params), losses


def test_row41_same_seed_same_numbers_other_seed_other_numbers():
    made = plain()
    a, b, c = (made.step(made.state(seed), tiny.batch(8))[0] for seed in (3, 3, 4))
    assert all(
        (x == y).all()
        for x, y in zip(values(a.params).values(), values(b.params).values(), strict=True)
    )
    assert (
        values(a.params)["block_00/mlp/up/kernel"] != values(c.params)["block_00/mlp/up/kernel"]
    ).any()


def poisoned(made, current, path, where="params"):
    flat = paths.flatten(current.params)
    return current.replace(params=paths.unflatten({**flat, path: flat[path].at[0].set(jnp.nan)}))


def test_row33_a_non_finite_loss_changes_nothing_but_the_step():
    made = tiny.make()
    bad = poisoned(made, made.state(), "embed/norm/scale")
    after, found = made.step(bad, tiny.batch(8))
    assert float(found["skipped"]) == 1.0
    assert int(after.step) == 1
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(bad.params), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(after.opt_state), jax.tree.leaves(bad.opt_state), strict=True):
        np.testing.assert_array_equal(a, b)
    good, found = made.step(made.state(), tiny.batch(8))
    assert float(found["skipped"]) == 0.0


def test_row34_one_non_finite_gradient_under_a_finite_loss_is_caught(monkeypatch):
    inject.install("nan_grad@1:head/mlm/bias", monkeypatch.setattr)
    made = tiny.make()
    before = made.state()
    after, found = made.step(before, tiny.batch(8))
    assert np.isfinite(float(found["loss"]))
    assert float(found["skipped"]) == 1.0
    close(after.params, before.params, atol=0)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_row37_a_batch_without_targets_has_loss_zero_and_no_nan(family):
    made = tiny.make(family=family, changes={"weight_decay": 0.0})
    before = made.state()
    empty = {name: 0 * x for name, x in tiny.batch(8).items()}
    after, found = made.step(before, empty)
    assert float(found["loss"]) == 0.0 and float(found["skipped"]) == 0.0
    close(after.params, before.params, atol=0)


@pytest.mark.parametrize("family", tiny.families("bert", "llama"))
def test_frozen_parameters_stay_and_hold_no_optimizer_memory(family):
    groups = ((r"block_02/.*|head/.*", "train"), (r".*", "freeze"))
    made = tiny.make(groups=groups, family=family)
    assert made.model.stacks == ((1, 1, 1) if family == "t5" else (2, 1))
    before = made.state()
    after, _ = made.step(before, tiny.batch(8))
    now, old = values(after.params), values(before.params)
    moved = {name for name, x in now.items() if (x != old[name]).any()}
    trains = {name for name, group in made.assigned.items() if group == "train"}
    assert moved == trains - {n for n in trains if "pooler" in n}
    trainable = paths.size(made.split(before.params)[0])
    assert paths.size(before.opt_state) - 2 * trainable < 10  # counters only
    # And the numbers are those of an unrolled model.
    unrolled = tiny.make(groups=groups, family=family, scan=False)
    close(unrolled.step(unrolled.state(), tiny.batch(8))[0].params, after.params)


def compiled(groups, adapter=None, scan=True):
    """The compiler's analysis of a donated step of 12 layers."""
    made = tiny.make(
        groups=groups, scan=scan, depth=12, width=512, mlp=2048, mesh=tiny.mesh(),
        losses={"mlm": {"rate": 0.15}}, adapter=adapter,
    )  # fmt: skip
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny.batch(64).items()}
    return jax.jit(made.raw_step, donate_argnums=0).lower(made.abstract, spec).compile()


EVERYTHING = ((".*", "train"),)
HEAD = (("head/.*", "train"), (".*", "freeze"))
LAST_TWO = (("block_1[01]/.*|head/.*", "train"), (".*", "freeze"))
ADAPTER = ((".*/lora_.|head/.*", "train"), (".*", "freeze"))


@pytest.mark.slow
def test_what_is_frozen_costs_nothing_by_the_compilers_count():
    """Of what is multiplied: layers are unrolled, 0.25 % is optimizer and norms."""
    flops = lambda groups: compiled(groups, scan=False).cost_analysis()["flops"]
    everything = flops(EVERYTHING)
    assert flops(HEAD) <= 0.34 * everything
    assert flops(LAST_TWO) <= 0.45 * everything


@pytest.mark.slow
def test_what_is_frozen_takes_no_memory_by_the_compilers_count():
    """Of temporaries: nothing is kept for layers without a backward pass, and LoRA has none of the
    gradients of the weights beside it, but its own, and keeps its products of rank 8."""
    temporary = lambda *args: compiled(*args).memory_analysis().temp_size_in_bytes
    everything = temporary(EVERYTHING)
    assert temporary(HEAD) < 0.06 * everything
    assert temporary(LAST_TWO) < 0.27 * everything  # two of twelve layers, and the vocabulary
    adapter = dict(name="lora", targets=(("block_.*/(attn|mlp)/.*", None),))
    gradients = 4 * 12 * (4 * 512 * 512 + 2 * 512 * 2048)
    own = 4 * 12 * 8 * (4 * (512 + 512) + 2 * (512 + 2048))
    products = 4 * 12 * 8 * (4 + 2) * 64 * tiny.T
    assert temporary(ADAPTER, adapter) <= everything - gradients + own + products


def test_bfloat16_dots_keep_their_operands():
    """No product of the whole step multiplies float32 operands, forwards or backwards."""
    made = tiny.make(dtype="bfloat16", attention_dropout=0.1, dropout=0.1)
    found = dots(jax.make_jaxpr(made.raw_step)(made.abstract, tiny.batch(8)))
    assert len(found) > 20
    for dot in found:
        assert [str(x.aval.dtype) for x in dot.invars] == ["bfloat16"] * 2, dot
        assert str(dot.outvars[0].aval.dtype) == "float32"


@pytest.mark.slow
def test_bfloat16_step_runs_and_stays_near_float32():
    made, exact = tiny.make(dtype="bfloat16"), tiny.make()
    _, found = made.step(made.state(), tiny.batch(8))
    _, wanted = exact.step(exact.state(), tiny.batch(8))
    assert loss_of(made, found) == pytest.approx(loss_of(exact, wanted), rel=5e-3)


def test_flops_by_hand():
    """A step is three times its forward products: backward takes two for each of them."""
    made = tiny.make()
    d, f, depth, rows, t = 32, 64, 3, 8, tiny.T
    k = int(np.ceil(0.3 * t))
    per_token = depth * (4 * d * d + 2 * d * f + 2 * t * d)
    forward = 2 * rows * (t * per_token + k * (d * d + d * tiny.V))
    assert flops.count(made.raw_step, made.abstract, tiny.batch(rows)) == 3 * forward


def test_flops_count_what_the_mathematics_needs():
    """Neither the accumulation's discarded pass nor recomputation is part of the model."""
    plain, batch = tiny.make(), tiny.batch(8)
    parts, again = tiny.make(accumulate=2), tiny.make(remat="block")
    needed = flops.of_step(plain, batch)
    assert flops.of_step(parts, batch) == flops.of_step(again, batch) == needed
    assert flops.count(parts.raw_step, parts.abstract, batch) == needed
    assert flops.count(again.raw_step, again.abstract, batch) > needed


@pytest.mark.slow
def test_decay_of_single_layers_is_the_same_scanned_and_unrolled():
    """lr 0.01, decay 0.5, no gradient but on batches of no targets: p becomes p (1 - 0.005)."""
    changes = {"weight_decay": 0.5, "decay": r"block_01/mlp/up/kernel"}
    empty = {name: 0 * x for name, x in tiny.batch(8).items()}
    for scan in (True, False):
        made = tiny.make(scan=scan, changes=changes)
        before = made.state()
        after = values(made.step(before, empty)[0].params)
        for name, x in values(before.params).items():
            factor = 1 - 0.01 * 0.5 if name == "block_01/mlp/up/kernel" else 1.0
            np.testing.assert_allclose(after[name], x * factor, rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_sentence_pairs_and_masks_share_one_forward_pass():
    alone = tiny.make(classes={"nsp": 2})
    both = tiny.make(classes={"nsp": 2}, losses={"mlm": {"rate": 0.3}, "nsp": {"weight": 0.5}})
    batch = tiny.batch(8) | {"labels": jnp.arange(8) % 2}
    count = lambda made, b: flops.count(made.raw_step, made.abstract, b)
    head = 3 * 2 * 8 * (32 * 32 + 32 * 2)
    assert count(both, batch) == count(alone, tiny.batch(8)) + head
    _, found = both.step(both.state(), batch)
    means = objectives.mean(jax.device_get(found["sums"]), both.objectives)
    assert means["nsp/loss"] == pytest.approx(np.log(2), abs=0.05)
    assert means["loss"] == pytest.approx(means["mlm/loss"] + 0.5 * means["nsp/loss"], rel=1e-6)


def test_init_does_not_depend_on_stacking():
    whole = tiny.make()
    cut = tiny.make(groups=((r"block_00/.*", "freeze"), (".*", "train")))
    close(whole.state().params, cut.state().params, atol=0)
    assert param_init.abstract_params(cut.model)["blocks_00_00"]


@pytest.mark.slow
def test_a_run_may_be_as_long_as_its_operations(tmp_path):
    words = ["--config.tensorboard=False", "--config.log_every=1"]
    one = [*words, "--config.total=1"]
    train.run(load.load(f"{ROOT}/configs/mlm.py:tiny", one), tmp_path / "one")
    flops = json.loads((tmp_path / "one/summary.json").read_text())["metrics"]["flops"]
    for given, steps in ((3 * flops, 3), (3 * flops + 1, 4)):
        three = [*words, f"--config.total={given} flops"]
        train.run(load.load(f"{ROOT}/configs/mlm.py:tiny", three), tmp_path / str(steps))
        found = json.loads((tmp_path / str(steps) / "summary.json").read_text())
        assert found["step"] == steps and found["metrics"]["flops"] == steps * flops
