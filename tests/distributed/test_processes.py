"""Several processes on this machine: one run, one stop, one end, whatever happens to one of them.

What they tell each other is tested in test_peers.py; that rows of the data are disjoint and
complete over any number of processes, in data/test_batches.py.
"""

import json
import re
import shutil
import signal
import socket
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import saved_states
from common import ROOT
from runs import (
    TOTAL,
    contents,
    ended,
    history,
    reached,
    run,
    start,
    status,
    wait,
    write_corpus,
)

from fmjax.config import load as configs
from fmjax.errors import ConfigError, ResourceError
from fmjax.io import metrics_log, workdir
from fmjax.params import devices, sharding

pytest_plugins = ["runs"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_all(
    home, folder, *flags, count=2, only=None, devices=2, faults=None, own=None, homes=None
):
    """`only` those of `count` processes; `faults`, `own` flags and other `homes` by index."""
    address = f"127.0.0.1:{free_port()}"
    return [
        start(
            (homes or {}).get(index, home),
            folder,
            f"--config.distributed.coordinator={address}",
            f"--config.distributed.num_processes={count}",
            f"--config.distributed.process_id={index}",
            *flags,
            *(own or {}).get(index, []),
            faults=(faults or {}).get(index, ""),
            devices=devices,
        )
        for index in only or range(count)
    ]


def slurm(home, folder, *flags, monkeypatch, faults):
    """Two, as srun starts them, one a task."""
    port, processes = free_port(), []
    for index in (0, 1):
        task = {"JOB_ID": 17, "STEP_NODELIST": "127.0.0.1", "NTASKS": 2, "PROCID": index}
        with monkeypatch.context() as patch:
            for name, value in (task | {"LOCALID": index}).items():
                patch.setenv(f"SLURM_{name}", str(value))
            patch.setenv("JAX_COORDINATOR_PORT", str(port))  # else it follows from the job's id
            auto = "--config.distributed.auto=True"
            fault = faults.get(index, "")
            processes.append(start(home, folder, auto, *flags, faults=fault, devices=2))
    return processes


def all_ended(processes):
    """What became of them; on standard output gloo speaks whoever we silence."""
    done = [ended(process) for process in processes]
    for each in done:
        each.stdout = "\n".join(x for x in each.stdout.splitlines() if not x.startswith("[Gloo]"))
    return done


def codes(done):
    return [each.returncode for each in done]


def assert_same_numbers(folder, straight, upto=TOTAL):
    expected = [row for row in history(straight) if row["step"] <= upto]
    assert len(history(folder)) == len(expected)
    for ours, theirs in zip(history(folder), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
def test_row8_two_processes_stop_at_one_step_and_are_the_run_of_one(
    home, straight, tmp_path, monkeypatch
):
    """Stopped in a step and in an evaluation, in two layouts, ended by one: the same numbers."""
    folder = tmp_path / "run"

    done = all_ended(start_all(home, folder, faults={1: "term@7"}))
    assert codes(done) == [75, 75], done
    step = status(folder)["step"]
    assert 7 <= step < 20 and saved_states.steps(folder)[-1] == step
    assert all(f"stopped by SIGTERM after step {step}, which is saved" in d.stderr for d in done)
    assert "devices     4 x cpu, 2 in each of 2 processes\nmesh        data 4" in done[0].stdout
    assert "SIGTERM to process 1: all finish" in done[0].stderr and done[1].stdout == ""
    assert_same_numbers(folder, straight, upto=step)

    # SLURM tells them the rest; the signal comes to the other one, in the midst of an evaluation.
    fsdp = ["--config.mesh.data=1", "--config.mesh.fsdp=4"]
    parts = slurm(home, folder, *fsdp, monkeypatch=monkeypatch, faults={0: "term@40:evaluate"})
    done = all_ended(parts)
    assert codes(done) == [75, 75], done
    assert f"resuming at step {step} of 40" in done[0].stdout
    assert status(folder)["step"] == saved_states.steps(folder)[-1] == TOTAL
    measured = [row["step"] for row in metrics_log.read(folder)[0] if "validation/loss" in row]
    assert measured == [20]

    alone = run(home, folder)
    assert alone.returncode == 0 and "resuming at step 40 of 40" in alone.stdout
    assert_same_numbers(folder, straight)

    before = contents(folder)
    done = all_ended(start_all(home, folder, devices=1))
    assert codes(done) == [0, 0], done
    assert "already finished at step 40" in done[0].stdout and done[1].stdout == ""
    changed = {path for path, content in contents(folder).items() if content != before[path]}
    assert changed == {str(folder / "config.json")}  # the number of processes


def test_a_refusal_of_process_0_ends_all_with_its_code(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    with workdir.open(tmp_path, configs.load("small.py")):
        begin = time.monotonic()
        done = all_ended(start_all(home, tmp_path, devices=1))
        assert time.monotonic() - begin < 100  # the heartbeat: nobody had to be given up
    assert codes(done) == [2, 2], done
    assert f"error: {tmp_path} is in use" in done[0].stderr
    assert f"error: process 0 of 2: {tmp_path} is in use" in done[1].stderr


def test_processes_with_different_configs_are_refused(home, tmp_path):
    done = all_ended(start_all(home, tmp_path, own={1: ["--config.optim.lr=0.5"]}, devices=1))
    assert codes(done) == [2, 2], done
    for each in done:
        assert "config.optim.lr=0.5 here, 0.001 in process 0" in each.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "own, said",
    [
        ({0: ["--dry_run"]}, "--dry_run=False here, True in process 0"),
        ({1: ["--dry_run"]}, "--dry_run=True here, False in process 0"),
        ({1: ["--fresh"]}, "--fresh=True here, False in process 0"),
        ({1: ["--workdir=elsewhere"]}, "--workdir='.*/elsewhere' here, '.*' in process 0"),
    ],
)
def test_processes_with_different_flags_are_refused(home, tmp_path, own, said):
    done = all_ended(start_all(home, tmp_path, own=own, devices=1))
    assert codes(done) == [2, 2], done
    for each in done:
        assert re.search(f"started alike, with the same config: {said}", each.stderr), each.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_with_different_data_are_refused(home, tmp_path):
    other = shutil.copytree(home, tmp_path / "home", ignore=shutil.ignore_patterns("*straight*"))
    write_corpus(other, seed=1)
    own = {1: [f"--config.data.cache={tmp_path}/cache"]}
    processes = start_all(home, tmp_path / "run", own=own, devices=1, homes={1: other})
    done = all_ended(processes)
    assert codes(done) == [5, 5], done
    for each in done:
        assert "all processes must have the same data: the digest of the tokens=" in each.stderr
    assert saved_states.steps(tmp_path / "run") == []


def test_row11_whoever_waits_for_the_others_says_for_whom_and_gives_up(home, tmp_path):
    flags = ["--config.distributed.timeout_sec=10"]
    parts = [start_all(home, tmp_path, *flags, only=[index]) for index in (0, 1)]
    done = all_ended(sum(parts, []))
    assert codes(done) == [6, 6], done
    assert "but not all others (process 1) have come there; waiting\n" in done[0].stderr
    assert "error: process 1 finds no process 0 at 127.0.0.1:" in done[1].stderr
    assert all("after 10 s (config.distributed.timeout_sec)" in each.stderr for each in done)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"process_id": 2, "num_processes": 2}, "process_id=2: processes are numbered from 0 to 1"),
        ({"num_processes": 2}, "num_processes=2 needs --config.distributed.coordinator"),
        ({"num_processes": 2, "coordinator": "here"}, "coordinator: got 'here', expected <host>"),
        ({"num_processes": 0}, "num_processes: got 0, expected"),
        ({"auto": True, "num_processes": 2}, "auto=True finds"),
        ({"heartbeat_sec": 1}, "heartbeat_sec: got 1, expected"),
    ],
)
def test_counts_that_cannot_be_are_refused_before_jax_starts(values, said):
    words = [f"--config.distributed.{name}={value}" for name, value in values.items()]
    with pytest.raises(ConfigError, match=said):
        configs.load(str(ROOT / "configs" / "mlm.py"), words)


class Device:
    """As much of a device as a mesh looks at."""

    platform = device_kind = "cpu"

    def __init__(self, process_index):
        self.process_index = process_index


def mesh_of(owners):
    """A mesh over devices of the processes `owners`, shaped (data, fsdp, expert, tensor)."""
    return jax.sharding.Mesh(np.vectorize(Device)(np.array(owners)), sharding.AXES)


def test_row13_layouts_that_do_not_fit_the_processes_are_refused(monkeypatch):
    within, across = [[[[0, 0]]], [[[1, 1]]]], [[[[0, 1]]], [[[0, 1]]]]
    sharding.check_batch(mesh_of(within), 8)
    with pytest.raises(ConfigError, match="config.mesh.tensor=2 joins devices of several proc"):
        sharding.check_batch(mesh_of(across), 8)
    with pytest.raises(ConfigError, match="config.batch_size=3 .* multiple of 2"):
        sharding.check_batch(mesh_of(within), 3)
    monkeypatch.setattr(jax, "devices", lambda: [Device(0), Device(0), Device(1)])
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match=r"different numbers of devices .*\{0: 2, 1: 1\}"):
        sharding.make_mesh()


def test_the_devices_are_shown_also_where_there_is_only_the_cpu(monkeypatch):
    mesh = sharding.make_mesh(data=4, tensor=2)
    assert sharding.table(mesh) == (
        "devices     8 x cpu\nmesh        data 4 x fsdp 1 x expert 1 x tensor 2"
    )
    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), sharding.AXES)
    assert sharding.table(alone) == "devices     1 x cpu"
    monkeypatch.setattr(devices, "unused", lambda: "this machine has a GPU that jax cannot use")
    assert sharding.table(alone).endswith(
        "\n            this machine has a GPU that jax cannot use"
    )


def test_a_kind_of_device_is_shown_with_its_platform_and_memory():
    stats = {"bytes_limit": 139 * 2**30}
    gpu = SimpleNamespace(device_kind="NVIDIA H200", platform="gpu", memory_stats=lambda: stats)
    assert devices.describe(gpu, 8) == "8 x NVIDIA H200 (gpu), 139.0 GiB each"


@pytest.mark.parametrize(
    "platform, error, advice",
    [
        ("cuda", AssertionError(), r"pip install -e '.\[gpu\]'"),  # jax as it is without the plugin
        (
            "tpu",
            RuntimeError("Unable to initialize backend 'tpu': no libtpu\nmore"),
            r"no libtpu\)",
        ),
    ],
)
def test_a_platform_without_a_device_is_an_error_of_one_line(platform, error, advice, monkeypatch):
    def fail():
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", platform)
    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(ResourceError, match=f"JAX_PLATFORMS={platform}: .*{advice}") as caught:
        devices.require()
    assert caught.value.exit_code == 6 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags, said", [("--nonsense", "Unknown flag.*--nonsense"), ("nonsense", "Could not open file")]
)
def test_flags_that_xla_cannot_read_are_an_error_and_no_end(flags, said, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(ConfigError, match=f"XLA_FLAGS='{flags}': {said}.*unset it$"):
        devices.require()


# ---- Slow: four processes, and deaths that take a heartbeat to be noticed -------------------


@pytest.fixture(scope="module")
def stopped(home, tmp_path_factory):
    """A run that two processes have saved at step 10, laid out over fsdp."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    flags = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.save_every=10"]
    done = all_ended(start_all(home, folder, *flags, devices=1, faults={0: "term@10"}))
    assert codes(done) == [75, 75], done
    for step in saved_states.steps(folder):
        if step != 10:
            shutil.rmtree(folder / "checkpoints" / str(step))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(4, 1), (1, 4), (2, 2)])
def test_four_processes_read_what_two_have_written(home, straight, stopped, tmp_path, layout):
    folder = shutil.copytree(stopped, tmp_path / "run")
    flags = [f"--config.mesh.data={layout[0]}", f"--config.mesh.fsdp={layout[1]}"]
    done = all_ended(start_all(home, folder, *flags, count=4, devices=1))
    assert codes(done) == [0] * 4, done
    assert "resuming at step 10 of 40" in done[0].stdout
    assert [each.stdout for each in done[1:]] == [""] * 3
    assert_same_numbers(folder, straight)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_row9_the_death_of_one_ends_the_other_and_a_restart_resumes(
    home, straight, tmp_path, victim
):
    folder, heartbeat = tmp_path / "run", 30
    beat = f"--config.distributed.heartbeat_sec={heartbeat}"
    processes = start_all(home, folder, beat, devices=1)
    wait(processes[0], lambda: reached(folder, 15))
    processes[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    done = all_ended(processes)
    assert time.monotonic() - begin < heartbeat + 30
    assert codes(done)[victim] == -signal.SIGKILL and codes(done)[1 - victim] not in (0, 75)
    done = all_ended(start_all(home, folder, devices=1))
    assert codes(done) == [0, 0], done
    assert "resuming at step" in done[0].stdout
    assert_same_numbers(folder, straight)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["connected", "prepare"])
def test_the_death_of_one_that_starts_ends_the_other(home, tmp_path, place):
    """Before the devices of all are known, and while the other waits for its data."""
    flags = ["--config.distributed.heartbeat_sec=20"]
    own = {index: [f"--config.data.cache={tmp_path}/{index}"] for index in (0, 1)}
    begin = time.monotonic()
    faults = {1: f"kill:{place}"}
    done = all_ended(start_all(home, tmp_path / "run", *flags, own=own, devices=1, faults=faults))
    assert time.monotonic() - begin < 20 + 70
    assert codes(done)[1] == -signal.SIGKILL and codes(done)[0] not in (0, 75), done


@pytest.mark.slow
@pytest.mark.parametrize("place", ["data", "evaluate"])
def test_row10_one_that_stands_still_is_found_and_ends_both(home, tmp_path, place):
    folder, heartbeat = tmp_path / "run", "--config.distributed.heartbeat_sec=20"
    more = ["--config.eval_every=5", heartbeat]
    faults = {1: f"deadlock@12:{place}"}
    done = all_ended(start_all(home, folder, *more, devices=1, faults=faults))
    assert codes(done) == [75, 75], done
    for index, each in enumerate(done):
        assert re.search(
            r"no process makes progress \(config.distributed.heartbeat_sec=20\): process",
            each.stderr,
        )
        assert f"The threads of process {index} are shown above" in each.stderr
    assert "in _deadlock" in done[1].stderr
    assert status(folder)["state"] == "preempted"
    done = all_ended(start_all(home, folder, heartbeat, devices=1))
    assert codes(done) == [0, 0], done
    assert "resuming at step 10 of 40" in done[0].stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim, fault, code, said",
    [
        (1, "raise@7:data", 1, "injected"),
        (0, "io_error@10", 4, "saving step 10 in .* failed"),
        # By then the other one may have dispatched its first steps.
        (1, "term:compile", 75, "stopped by SIGTERM (before the first|after) step"),
    ],
)
def test_what_happens_to_one_ends_both_with_its_code(home, tmp_path, victim, fault, code, said):
    done = all_ended(start_all(home, tmp_path, devices=1, faults={victim: fault}))
    assert codes(done) == [code, code], done
    for each in done:
        assert re.search(said, each.stderr), each.stderr
    assert status(tmp_path)["exit_code"] == code


@pytest.mark.slow
def test_numbers_that_are_not_finite_end_both(home, tmp_path):
    faults = dict.fromkeys([0, 1], "nan_loss@7x5")
    done = all_ended(start_all(home, tmp_path, "--config.max_skipped=3", faults=faults))
    assert codes(done) == [3, 3], done
    (dump,) = (tmp_path / "dumps").iterdir()
    assert json.loads(dump.read_text())["examples"] == list(range(64, 72))


@pytest.mark.slow
def test_a_signal_while_data_are_prepared_stops_both(home, tmp_path):
    cache = f"--config.data.cache={tmp_path}/cache"
    faults = dict.fromkeys([0, 1], "term:prepare")  # whoever prepares them
    done = all_ended(start_all(home, tmp_path / "run", cache, devices=1, faults=faults))
    assert codes(done) == [75, 75], done
    assert sum("stopped by SIGTERM while preparing data" in each.stderr for each in done) == 2
    assert status(tmp_path / "run")["state"] == "preempted"
    done = all_ended(start_all(home, tmp_path / "run", cache, devices=1))
    assert codes(done) == [0, 0], done


@pytest.mark.slow
def test_two_processes_measure_what_one_does(home, straight):
    flags = [f"--config={ROOT}/configs/evaluate.py", f"--config.folder={straight}"]
    done = all_ended(start_all(home, straight, *flags))
    assert codes(done) == [0, 0], done
    assert run(home, straight, *flags).returncode == 0
    lines = (straight / "evaluation.jsonl").read_text().splitlines()
    two, one = (json.loads(line)["metrics"] for line in lines)
    assert two == pytest.approx(one, rel=1e-6)
    (straight / "evaluation.jsonl").unlink()
