"""Numbers that go wrong: spikes, examples that break every run, counters, small updates."""

import contextlib
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import saved_states
import tiny
from ml_collections import ConfigDict

from fmjax import objectives
from fmjax.checkpoints.checkpointer import Checkpointer, load_params
from fmjax.errors import DataError, NumericsError
from fmjax.io import metrics_log
from fmjax.training import setup, spike_skipping
from fmjax.training.monitor import Monitor
from fmjax.training.state import TrainState
from fmjax.training.step import make_train_step

pytest_plugins = ["runs"]

ROW = {"segment_ids": jnp.ones((1, 4), jnp.int32)}


@functools.partial(jax.jit, static_argnums=3)
def judge(state, loss, gradient, sigma):
    return spike_skipping.guard(optax.sgd(1.0), sigma).update({"w": gradient}, state, loss=loss)


def skipped(losses, norms=None, sigma=6.0):
    """Which of the updates with these losses and gradients (of one number) are left out."""
    norms = np.ones(len(losses)) if norms is None else norms
    state, found = spike_skipping.guard(optax.sgd(1.0), sigma).init({"w": jnp.float32(0)}), []
    for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        _, state = judge(state, jnp.float32(loss), jnp.float32(norm), sigma)
        if spike_skipping.spiked(state):
            found.append(i)
    return found


def noise(count, seed=0):
    return np.random.default_rng(seed).normal(0.0, 0.1, count)


def test_row35_one_spike_is_one_update_skipped():
    losses = 3 + noise(300)
    assert skipped(losses) == []
    losses[200] += 10 * 0.1
    assert skipped(losses) == [200]
    assert skipped(3 - (losses - 3)) == []  # a loss far below is none
    assert skipped(np.full(300, 3.0), norms=losses) == [200]  # nor need the loss show it
    losses[200] -= 5 * 0.1
    assert skipped(losses) == [] and skipped(losses, sigma=4.0) == [200]


def test_row35_a_new_level_is_known_after_four():
    """By the formula at the top of spike_skipping.py: 4 entries of 128 are the first whose share f
    has 6 √(f (1 - f)) > 1 - f, for any distance much larger than the noise."""
    for distance in (100, 1e6):
        assert skipped(3 + noise(300) + distance * (np.arange(300) >= 200)) == [200, 201, 202, 203]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_row35_what_is_not_finite_poisons_nothing(bad):
    """It is no spike, which make_train_step decides, and the window never sees it: neither a window
    that fills nor a full one, whose oldest number it would take the place of."""
    losses = 3 + noise(300)
    losses[[10, 100, 249]] = bad
    losses[[101, 250]] += 1.0
    assert skipped(losses) == [101, 250]
    assert skipped(np.full(300, 3.0), norms=losses) == [101, 250]


def test_row35_nothing_is_judged_before_half_the_window():
    """And where all numbers are the same, none is one."""
    losses = 3 + noise(80)
    losses[[20, spike_skipping.WINDOW // 2 - 1]] += 5.0
    assert skipped(losses) == []
    assert skipped(np.full(300, 3.3), norms=np.full(300, 0.7)) == []


def three_weights(tx):
    """(step, state) of a model of three weights; the batch says what their gradient is."""

    def loss_fn(apply, params, batch):
        weights = params["head"]["w"].astype(jnp.bfloat16)
        return {"loss": (jnp.sum(weights.astype(jnp.float32)) * batch["slope"], jnp.float32(1))}

    goal = [objectives.Objective("sum", 1.0, None, loss_fn)]
    step = make_train_step(lambda: None, goal, tx, lambda params: (params, {}))
    params = {"head": {"w": jnp.ones(3)}}
    return step, TrainState(jnp.int32(0), params, tx.init(params), jax.random.key(0))


def sloping(slope):
    return tiny.batch(8) | {"slope": jnp.float32(slope)}


def test_row35_a_spike_changes_the_window_and_nothing_else(monkeypatch, tmp_path):
    """And the window is saved: what is skipped after a restart is what was skipped without it."""
    monkeypatch.setattr(spike_skipping, "WINDOW", 8)
    step, state = three_weights(spike_skipping.guard(optax.adam(1e-3), 20.0))
    step = jax.jit(step)
    for slope in (1.0, 1.1, 0.9, 1.0, 1.1):
        state, found = step(state, sloping(slope))
        assert (float(found["spike"]), float(found["skipped"])) == (0.0, 0.0)
    after, found = step(state, sloping(100.0))
    assert (float(found["spike"]), float(found["skipped"])) == (1.0, 0.0)
    assert int(after.step) == int(after.opt_state.count) == 6
    assert float(after.opt_state.norms[5]) == float(found["grad_norm"])
    saved_states.assert_equal(after.params, state.params)
    saved_states.assert_equal(after.opt_state.inner, state.opt_state.inner)
    bad, found = step(state, sloping(np.nan))
    assert (float(found["spike"]), float(found["skipped"])) == (0.0, 1.0)
    saved_states.assert_equal((bad.params, bad.opt_state), (state.params, state.opt_state))
    with contextlib.closing(Checkpointer(tmp_path)) as saver:
        saver.save(5, state, {})
        restored, _ = saver.restore(saved_states.abstract(state))
    saved_states.assert_equal(
        step(restored, sloping(100.0)), (after, step(state, sloping(100.0))[1])
    )
    moved, _ = step(restored, sloping(1.0))
    assert (moved.params["head"]["w"] != after.params["head"]["w"]).all()


@pytest.mark.slow
def test_row35_a_run_skips_a_spike_says_so_and_goes_on(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spike_skipping, "WINDOW", 8)
    here = functools.partial(runs.run_here, home, tmp_path, monkeypatch=monkeypatch)
    here("--config.optim.skip_spikes=20.0", "--config.max_skipped=1", faults="spike@12")
    (event,) = [e for e in metrics_log.read(tmp_path)[1] if e["event"].startswith("skipped")]
    assert (event["event"], event["step"], event["examples"]) == ("skipped_spike", 12, [88, 96])
    assert (
        event["grad_norm"] > 100 and "step 12: update skipped as a spike" in capsys.readouterr().out
    )
    rows = {row["step"]: row for row in metrics_log.read(tmp_path)[0] if "optim/spike" in row}
    assert [rows[step]["optim/spike"] for step in (10, 15, 20)] == [0.0, 0.2, 0.0]
    assert all(row["optim/skipped"] == 0.0 for row in rows.values())
    # The schedule waits for what was skipped: at step 40 it is where 39 updates bring it.
    rate = runs.configs.load(str(tmp_path / "config.json")).optim.lr * (40 - 38) / 36
    assert rows[40]["optim/lr"] == pytest.approx(rate, rel=1e-5)
    assert json.loads((tmp_path / "summary.json").read_text())["skipped_spikes"] == 1


@pytest.fixture
def broken_examples(monkeypatch):
    """Training on any of the examples 48 to 63 gives NaN: the batches 7 and 8, of eight."""
    original = objectives.metrics

    def metrics(*args):
        found, index, train = original(*args), args[3]["index"], args[5]
        bad = jnp.where(train & jnp.any((index >= 48) & (index < 64)), jnp.nan, 1.0)
        return {name: (value * bad, weight) for name, (value, weight) in found.items()}

    monkeypatch.setattr(objectives, "metrics", metrics)


@pytest.mark.slow
def test_row36_examples_that_break_a_run_can_be_skipped(
    home, tmp_path, monkeypatch, broken_examples
):
    folder, skip = tmp_path / "run", "--config.data.skip=((48, 64),)"
    flags = "--config.total=12 steps", "--config.max_skipped=2", "--config.eval_every=0"
    here = functools.partial(runs.run_here, home, monkeypatch=monkeypatch)
    with pytest.raises(NumericsError, match="last at step 8.*config.data.skip"):
        here(folder, *flags)
    bad = [event for event in metrics_log.read(folder)[1] if event["event"] == "skipped_update"]
    assert [(e["step"], e["examples"]) for e in bad] == [(7, [48, 56]), (8, [56, 64])]
    with pytest.raises(DataError, match="of the 40 examples before step 5"):
        here(folder, *flags, "--config.data.skip=((8, 16),)")
    here(folder, *flags, skip)
    assert runs.status(folder)["state"] == "done" and saved_states.steps(folder) == [10, 12]
    here(tmp_path / "straight", *flags, skip)
    ours, theirs = (load_params(path) for path in (folder, tmp_path / "straight"))
    assert ours[1]["data"] == theirs[1]["data"] == {"next_index": 12, "skip": [[48, 64]]}
    saved_states.assert_equal(ours[0], theirs[0])


def test_row39_counters_of_the_state_are_exact_where_float32_is_not():
    """16,777,217 is the first whole number that float32 cannot hold."""
    made, far = tiny.make(), 2**24 + 1
    whole = lambda x: jnp.issubdtype(x.dtype, jnp.integer)
    start = made.state()
    start = start.replace(
        step=start.step + far,
        opt_state=jax.tree.map(lambda x: x + far if whole(x) else x, start.opt_state),
    )
    after, _ = made.step(start, tiny.batch(8))
    assert int(after.step) == far + 1
    counts = [np.asarray(x) for x in jax.tree.leaves(after.opt_state) if whole(x)]
    assert len(counts) > 1 and all((count == far + 1).all() for count in counts)


def monitor(folder, first, saved=None):
    """The log of a run that does nothing, in an empty folder."""
    made = tiny.make()
    config = ConfigDict({"tensorboard": False, "wandb": False, "batch_size": 8, "best": ""})
    config.update({"data": {"skip": ()}, "optim": {"skip_spikes": 6.0}})
    run = SimpleNamespace(
        config=config,
        total=2**40,
        objectives=made.objectives,
        optimizer=made.optimizer,
        dataset=SimpleNamespace(unit="tokens"),
    )
    folder = SimpleNamespace(path=folder, update=lambda **facts: None, failure=None)
    made = Monitor(run, folder, first, saved or {}, 0.0, 0.0)
    made.flops[setup.shapes(ROW)] = 0  # as a compiled step has told it
    return made


def numbers(skipped=0.0, spike=0.0, tokens=1):
    found = {"sums": {"mlm/loss": (2.0, 1.0)}, "loss": 2.0, "grad_norm": 1.0}
    return found | {"skipped": skipped, "spike": spike, "units": jnp.int32(tokens)}


def test_row35_a_spike_neither_counts_as_not_finite_nor_as_an_update(tmp_path):
    """Each call returns how many in a row were not finite, up to the step before."""
    bad, spike, good = numbers(skipped=1.0), numbers(spike=1.0), numbers()
    steps = [bad, spike, bad, good, spike, spike, bad, good]
    with monitor(tmp_path, 0) as log:
        found = [log.step(i, numbers, ROW) for i, numbers in enumerate(steps, 1)]
        assert found == [0, 1, 1, 2, 0, 0, 0, 1]
        log.log(8)
        assert log.saved()["skipped"] == 6
    (row,) = metrics_log.read(tmp_path)[0]
    assert (row["optim/skipped"], row["optim/spike"]) == (3 / 8, 3 / 8)


def test_row39_tokens_are_counted_beyond_32_bits(tmp_path):
    most, before = 2**31 - 1, 2**53 + 1  # float64 cannot hold the sum
    with monitor(tmp_path, 2**33, {"units": before}) as log:
        for step in (2**33 + 1, 2**33 + 2):
            log.step(step, numbers(tokens=most), ROW)
        log.log(2**33 + 2)
        assert json.loads(json.dumps(log.saved()))["units"] == before + 2 * most
    (row,) = metrics_log.read(tmp_path)[0]
    assert (row["step"], row["tokens"]) == (2**33 + 2, before + 2 * most)


def test_row40_a_thousand_small_updates_add_up():
    """From 1 by 1000 x 0.0001 down to 0.9; in bfloat16, 1 - 0.0001 is 1."""
    step, start = three_weights(optax.with_extra_args_support(optax.sgd(1e-4)))
    loop = lambda state: jax.lax.fori_loop(0, 1000, lambda _, s: step(s, sloping(1.0))[0], state)
    np.testing.assert_allclose(jax.jit(loop)(start).params["head"]["w"], 0.9, atol=5e-5)


def test_row40_all_that_is_updated_is_float32():
    made = tiny.make(dtype="bfloat16", changes={"ema": 0.9})
    after, _ = jax.eval_shape(made.raw_step, made.abstract, tiny.batch(8))
    kinds = {str(x.dtype) for x in jax.tree.leaves((after.params, after.opt_state))}
    assert kinds == {"float32", "int32"}
