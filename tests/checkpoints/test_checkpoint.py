"""Saving and restoring. What `row12` in a name means is in faults/test_table.py; the values
expected are derived by hand in each test."""

import gc
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from saved_states import (
    TrainState,
    abstract,
    assert_equal,
    make_state,
    problems,
    save,
    step_folder,
    steps,
)

from fmjax.checkpoints import checkpointer as saving
from fmjax.checkpoints.checkpointer import Checkpointer, load_params
from fmjax.errors import CheckpointError, ConfigError
from fmjax.io import cleanup, manifest
from fmjax.training import optim, spike_skipping


@pytest.fixture
def checkpointer(tmp_path, monkeypatch):
    """Makes Checkpointers of the test's run folder and closes them."""
    monkeypatch.setattr(saving, "RETRY_SEC", 0.0)
    made = []

    def make(**options):
        made.append(Checkpointer(tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def until(condition, sec=20):
    end = time.monotonic() + sec
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def test_round_trip_of_every_kind_of_leaf(checkpointer):
    ckpt = checkpointer()
    assert ckpt.restore(abstract(make_state())) is None  # an empty folder is no error
    save(ckpt, 3)
    state, meta = ckpt.restore(abstract(make_state()))
    assert_equal(state, make_state(3))
    assert isinstance(state, TrainState)
    # The restored key continues the same random stream.
    assert jax.random.bits(state.rng) == jax.random.bits(jax.random.key(3))
    assert (meta["position"], meta["step"], meta["format"]) == (3, 3, 1)
    assert meta["arrays"]["params/dense/kernel"] == "float32[16,8]"
    assert meta["arrays"]["rng"] == "key<fry>[]"


def test_meta_and_state_are_those_of_the_call(checkpointer):
    """Training goes on into the same (donated) memory while the save is being written."""
    ckpt = checkpointer()
    state, meta = {"w": jnp.full((1 << 22,), 2.0)}, {"nested": {"position": 2}}
    target = abstract(state)
    ckpt.save(2, state, meta)
    meta["nested"]["position"] = 3
    train = jax.jit(lambda state: {"w": state["w"] + 1}, donate_argnums=0)
    for _ in range(5):
        state = train(state)
    restored, saved = ckpt.restore(target)
    assert saved["nested"] == {"position": 2}
    assert np.unique(restored["w"]) == [2.0] and np.unique(state["w"]) == [7.0]


def test_save_does_not_wait_for_the_manifest_but_wait_does(checkpointer, monkeypatch, tmp_path):
    go, write = threading.Event(), manifest.write
    monkeypatch.setattr(manifest, "write", lambda folder: go.wait(20) and write(folder))
    ckpt = checkpointer()
    assert ckpt.save(1, make_state(), {})
    assert ckpt.check() is False and ckpt.committed is None and steps(tmp_path) == []
    threading.Timer(0.1, go.set).start()
    ckpt.wait()
    assert ckpt.committed == 1 and steps(tmp_path) == [1] and problems(tmp_path, 1) == []


def test_saving_a_committed_step_again_is_idle_unless_forced(checkpointer, tmp_path):
    ckpt = checkpointer()
    save(ckpt, 1)
    assert ckpt.save(1, make_state(5), {}) is False
    assert ckpt.save(1, make_state(5), {}, force=True) is True
    assert_equal(ckpt.restore(abstract(make_state()))[0], make_state(5))
    assert ckpt.save(1, make_state(5), {}) is False  # restored: the same state is there


def test_keeps_the_last(checkpointer, tmp_path):
    save(checkpointer(keep=2), 1, 2, 3)
    assert steps(tmp_path) == [2, 3]
    save(checkpointer(keep=1), 10)
    assert steps(tmp_path) == [10]


def test_options_are_checked(checkpointer):
    with pytest.raises(ConfigError, match="config.keep = 0"):
        checkpointer(keep=0)
    with pytest.raises(ConfigError, match="min"):
        checkpointer(best_mode="lowest")
    with pytest.raises(ConfigError, match="config.best = 'validation/los'.*'validation/loss'"):
        checkpointer(best="validation/los").save(1, make_state(), {}, {"validation/loss": 1.0})


@pytest.mark.parametrize("before, after", [(8, 1), (8, 2), (8, 4), (1, 8), (2, 8)])
def test_row12_restore_on_another_number_of_devices(checkpointer, before, after):
    def shardings(devices):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        split = lambda x: P("data") if x.ndim == 2 else P()
        return jax.tree.map(lambda x: NamedSharding(mesh, split(x)), make_state())

    ckpt = checkpointer()
    ckpt.save(1, jax.device_put(make_state(1), shardings(before)), {})
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        make_state(),
        shardings(after),
    )
    state, _ = ckpt.restore(target)
    assert_equal(jax.device_get(state), jax.device_get(make_state(1)))
    assert len(state.params["dense"]["kernel"].sharding.device_set) == after
    assert state.params["dense"]["kernel"].addressable_shards[0].data.shape == (16 // after, 8)
    assert len(state.rng.sharding.device_set) == after


@pytest.fixture
def full_disk():
    """No file may grow beyond 1 MiB: real write errors, in Orbax's own threads."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def large_state():
    """4 MiB that do not compress."""
    return {"w": jax.random.bits(jax.random.key(0), (1 << 20,))}


def test_row23_disk_full_is_survived(checkpointer, tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr(saving, "RETRY_SEC", 0.3)
    ckpt = checkpointer()
    save(ckpt, 1)
    assert ckpt.save(2, large_state(), {})  # training goes on
    until(lambda: ckpt.check() or ckpt._failures == 1)
    assert ckpt.check() is False  # the pause before the repetition
    assert os.listdir(tmp_path / "checkpoints") == ["1"] and ckpt.committed == 1
    until(ckpt.check)
    full_disk()
    assert ckpt.save(3, large_state(), {})
    ckpt.wait()
    assert ckpt.check() is False and steps(tmp_path) == [1, 3] and problems(tmp_path, 3) == []


def test_row23_disk_full_for_good_aborts(checkpointer, tmp_path, full_disk):
    ckpt = checkpointer()
    save(ckpt, 1)
    attempts = 0
    with pytest.raises(CheckpointError, match="saving step 4.*3 in a row.*Free space") as caught:
        for step in range(2, 9):
            attempts += ckpt.save(step, large_state(), {})
            until(ckpt.check)
    assert attempts == 3 and caught.value.exit_code == 4
    assert os.listdir(tmp_path / "checkpoints") == ["1"]


def test_row23_a_failed_save_is_one_line(checkpointer, full_disk, caplog):
    ckpt = checkpointer()
    assert ckpt.save(1, large_state(), {})
    until(lambda: ckpt.check() or ckpt._failures == 1)
    gc.collect()  # where asyncio says what nobody asked for
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith("saving step 1 failed (1 of 3); next attempt in ")
    assert not any(record.exc_info for record in caplog.records)


def test_row23_errors_of_closing_are_lines(checkpointer, monkeypatch, caplog):
    """orbax raises what its threads have found; the error before is the one that counts."""
    ckpt, closed = checkpointer(), []

    def fail():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt._orbax, "close", fail)
    monkeypatch.setattr(ckpt._worker, "shutdown", lambda: closed.append(True))
    with pytest.raises(KeyError), cleanup.FirstError() as opened:
        opened.callback(ckpt.close)
        opened.callback(fail)
        raise KeyError
    assert closed == [True]
    assert [record.getMessage() for record in caplog.records] == [
        "while checkpoints are closed: [Errno 28] No space left on device",
        "while ending: OSError: [Errno 28] No space left on device",
    ]
    with pytest.raises(OSError), cleanup.FirstError() as opened:
        opened.callback(fail)
    monkeypatch.undo()


def test_row23_wait_repeats_the_last_save(checkpointer, tmp_path, monkeypatch):
    errors, write = [OSError(28, "No space left on device")] * 2, manifest.write

    def fail(folder):
        if errors:
            raise errors.pop()
        write(folder)

    monkeypatch.setattr(manifest, "write", fail)
    ckpt = checkpointer()
    ckpt.save(1, make_state(), {})
    ckpt.wait()
    assert not errors and ckpt.committed == 1
    errors.append(OSError(28, "No space left on device"))
    state = make_state(2)
    ckpt.save(2, state, {})
    state.params["dense"]["kernel"].delete()  # donated: there is nothing left to save
    with pytest.raises(CheckpointError, match="step 2 was not saved"):
        ckpt.wait()
    assert steps(tmp_path) == [1]


def change(state, **params):
    return state.replace(params={"dense": {**state.params["dense"], **params}})


@pytest.mark.parametrize(
    "wanted, line",
    [
        (
            lambda: change(make_state(), kernel=jnp.zeros((8, 16))),
            "params/dense/kernel: checkpoint float32[16,8], model float32[8,16]",
        ),
        (
            lambda: change(make_state(), scale=jnp.zeros(3)),
            "params/dense/scale: checkpoint has none, model float32[3]",
        ),
        (
            lambda: make_state().replace(params={"dense": {"bias": jnp.zeros(8, jnp.bfloat16)}}),
            "params/dense/kernel: checkpoint float32[16,8], model has none",
        ),
        (
            lambda: make_state().replace(opt_state=optax.sgd(1.0).init({})),
            "opt_state/1/0/mu/dense/bias: checkpoint bfloat16[8], model has none",
        ),
    ],
    ids=["shape", "missing", "extra", "optimizer"],
)
def test_row25_another_model_is_refused(checkpointer, tmp_path, wanted, line):
    ckpt = checkpointer()
    save(ckpt, 1)
    with pytest.raises(CheckpointError) as caught:
        ckpt.restore(abstract(wanted()))
    assert f"\n  {line}\n" in str(caught.value) and "config.model" in str(caught.value)
    assert steps(tmp_path) == [1]  # not damage: nothing is set aside


def test_row26_no_silent_cast(checkpointer):
    ckpt = checkpointer()
    save(ckpt, 1)
    half = change(make_state(), kernel=jnp.zeros((16, 8), jnp.bfloat16))
    line = r"params/dense/kernel: checkpoint float32\[16,8\], model bfloat16\[16,8\]"
    with pytest.raises(CheckpointError, match=line):
        ckpt.restore(abstract(half))


@pytest.mark.parametrize("meta_format, manifest_format", [(2, 1), (1, 2), (2, 2)])
def test_row27_newer_format_is_refused(
    checkpointer, tmp_path, monkeypatch, meta_format, manifest_format
):
    ckpt = checkpointer()
    monkeypatch.setattr(manifest, "FORMAT", meta_format)
    save(ckpt, 1)
    monkeypatch.setattr(manifest, "FORMAT", manifest_format)
    manifest.write(step_folder(tmp_path, 1))
    monkeypatch.setattr(manifest, "FORMAT", 1)
    with pytest.raises(CheckpointError, match="checkpoint format 2; this fmjax .* reads up to 1"):
        ckpt.restore(abstract(make_state()))
    assert steps(tmp_path) == [1]  # nothing is set aside


@pytest.mark.parametrize(
    "mode, values, kept",
    [
        ("min", [3.0, 2.0, float("nan"), 2.5, float("nan")], [2, 4, 5]),
        ("min", [float("-inf"), 2.0, 1.0, 9.0, 9.0], [3, 4, 5]),
        ("max", [3.0, float("inf"), 2.0, float("nan"), 1.0], [1, 4, 5]),
        ("min", [float("nan")] * 5, [4, 5]),
        ("min", [None, None, 7.0, None, None], [3, 4, 5]),
    ],
)
def test_row29_best_is_the_best_finite_one(checkpointer, tmp_path, mode, values, kept):
    ckpt = checkpointer(keep=2, best="loss", best_mode=mode)
    for step, value in enumerate(values, 1):
        save(ckpt, step, metric=value)
    assert steps(tmp_path) == kept


@pytest.mark.parametrize("mode, kept", [("min", [1, 3, 6]), ("max", [1, 2, 6])])
def test_several_best_ones_are_kept_and_of_equal_ones_the_older(checkpointer, tmp_path, mode, kept):
    ckpt = checkpointer(keep=1, keep_best=2, best="loss", best_mode=mode)
    for step, value in enumerate([1.0, 3.0, 0.5, 1.0, 1.0, 0.9 if mode == "max" else 2.0], 1):
        save(ckpt, step, metric=value)
    assert steps(tmp_path) == kept


def test_row30_saves_after_a_roll_back_are_written(checkpointer, tmp_path):
    ckpt = checkpointer(keep=3)
    save(ckpt, 1, 2, 3)
    state, _ = ckpt.restore(abstract(make_state()), step=1)
    assert_equal(state, make_state(1))
    assert ckpt.save(2, make_state(20), {})
    ckpt.wait()
    assert steps(tmp_path) == [1, 2]
    assert_equal(ckpt.restore(abstract(make_state()))[0], make_state(20))
    # Interrupted right after a roll-back: the next start must not find the newer step.
    ckpt.restore(abstract(make_state()), step=1)
    assert ckpt.save(1, make_state(1), {})
    ckpt.wait()
    assert steps(tmp_path) == [1]


def test_row31_four_bit_leaves_are_refused_with_a_remedy(checkpointer, tmp_path):
    ckpt = checkpointer()
    state = {"params": {"codes": jnp.zeros((4, 6), jnp.uint4)}}
    with pytest.raises(CheckpointError, match=r"params/codes is uint4\[4,6\].*uint8"):
        ckpt.save(1, state, {})
    assert steps(tmp_path) == []
    save(ckpt, 1)


def test_row31_leaves_that_cannot_be_stored_are_refused_before_the_first_step(checkpointer):
    state = {"params": {"codes": jnp.zeros((4, 6), jnp.uint4)}}
    with pytest.raises(CheckpointError, match=r"params/codes is uint4\[4,6\].*uint8"):
        checkpointer().restore(abstract(state))


def test_arrays_of_no_size_are_saved(checkpointer, tmp_path):
    """As of optimizers that keep something of matrices alone."""
    empty = {"scale": jnp.zeros((0, 8)), "count": jnp.zeros((0,), jnp.int32)}
    state = make_state(1).replace(opt_state=(empty, {"mu": jnp.ones(3)}))
    ckpt = checkpointer()
    ckpt.save(1, state, {})
    ckpt.wait()
    restored, meta = ckpt.restore(abstract(state))
    assert_equal(restored, state)
    assert meta["arrays"]["opt_state/0/scale"] == "float32[0,8]"
    assert_equal(load_params(tmp_path)[0], jax.device_get(state.params))
    other = state.replace(opt_state=(empty | {"scale": jnp.zeros((0, 4))}, {"mu": jnp.ones(3)}))
    with pytest.raises(CheckpointError, match=r"checkpoint float32\[0,8\], model float32\[0,4\]"):
        ckpt.restore(abstract(other))


def test_a_folder_that_is_not_utf8_is_refused(tmp_path):
    for use in (Checkpointer, load_params, saving.load_meta):
        with pytest.raises(CheckpointError, match="is not UTF-8"):
            use(tmp_path / os.fsdecode(b"bad\xff"))


def test_load_params_without_knowing_the_optimizer(checkpointer, tmp_path):
    with pytest.raises(CheckpointError, match="Is .* the folder of a single run"):
        load_params(tmp_path)
    save(checkpointer(), 1, 2)
    params, meta, averaged = load_params(tmp_path)
    assert meta["step"] == 2 and isinstance(params["dense"]["kernel"], np.ndarray)
    assert not averaged
    assert_equal(params, jax.device_get(make_state(2).params))
    assert_equal(load_params(tmp_path, 1)[0], jax.device_get(make_state(1).params))


@pytest.mark.parametrize("sigma", [0.0, 6.0])
def test_load_params_takes_the_average_of_what_trains(checkpointer, tmp_path, sigma):
    """The bias is frozen here: the optimizer does not know it."""
    state = make_state(1)
    tx = optax.chain(optax.adamw(1e-3), optim.moving_average(0.5))
    tx = spike_skipping.guard(tx, sigma) if sigma else tx
    average = {"dense": {"kernel": make_state(7).params["dense"]["kernel"]}}
    ckpt = checkpointer()
    ckpt.save(1, state.replace(opt_state=tx.init(average)), {})
    ckpt.wait()
    params, _, averaged = load_params(tmp_path)
    assert averaged
    expected = {"dense": {"bias": state.params["dense"]["bias"], **average["dense"]}}
    assert_equal(params, jax.device_get(expected))


def test_relative_folder(checkpointer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt = Checkpointer(Path("run"))
    save(ckpt, 1)
    ckpt.close()
    assert steps(tmp_path / "run") == [1]


@pytest.mark.slow
def test_two_processes_save_fall_back_and_agree(tmp_path):
    """Both hold half of w; process 0 alone reads, sets damage aside, and both restore step 1."""
    script = """
import sys
from pathlib import Path
import jax, numpy as np
index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, index)
from jax.experimental.multihost_utils import sync_global_devices
from jax._src.distributed import global_state
from fmjax.distributed import processes
from fmjax.checkpoints.checkpointer import Checkpointer, load_params
from fmjax.distributed.signals import Stop
from fmjax.distributed.coordination import Peers
from saved_states import abstract, array_file, flip
joined = processes.joined(Peers(global_state.client, index, 2, Stop(), 60.0))
joined.__enter__()
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
def state(value):
    make = lambda index: np.full((16,), value, np.float32)[index]
    return {"params": {"w": jax.make_array_from_callback((16,), sharding, make)}}
ckpt = Checkpointer(folder)
assert ckpt.restore(abstract(state(0), sharding)) is None
for step in (1, 2):
    ckpt.save(step, state(step), {})
ckpt.wait()
if index == 0:
    flip(array_file(Path(folder) / "checkpoints" / "2"), 0)
sync_global_devices("damaged")
restored, meta = ckpt.restore(abstract(state(0), sharding))
assert meta["step"] == 1
assert all((shard.data == 1).all() for shard in restored["params"]["w"].addressable_shards)
assert load_params(folder)[0]["w"].sum() == 16
ckpt.save(3, state(3), {})
ckpt.wait()
ckpt.close()
processes.meet()
joined.__exit__(None, None, None)
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    command = [sys.executable, "-c", script]
    processes = [
        subprocess.Popen([*command, str(index), port, str(tmp_path)], env=environment)
        for index in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2.corrupt", "3"]
