"""Processes on CPUs are connected at their start: later each waits for the slowest."""

import os
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from common import ROOT
from test_processes import free_port

from fmjax.distributed import connections

LATE = """
import sys, time
import jax, numpy as np
from fmjax.config import load as configs
from fmjax.distributed import launch
index, address, root = sys.argv[1:]
given = dict(coordinator=address, num_processes=2, process_id=index)
words = [f"--config.distributed.{key}={value}" for key, value in given.items()]
words += ["--config.mesh.fsdp=2"]
with launch.start(configs.load(f"{root}/configs/mlm.py:tiny", words)) as mesh:
    if index == "1":
        time.sleep(35)
    for axes in ("data", "fsdp", ("data", "fsdp")):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axes))
        x = jax.make_array_from_callback((4,), place, lambda index: np.ones(4)[index])
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        assert jax.jit(lambda x: x.sum(), out_shardings=whole)(x) == 4
"""


def test_every_set_of_axes_is_added_over():
    """Devices 0 to 7 are data x fsdp x tensor: 2 x 2 x 2."""
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    total = lambda *axes: np.broadcast_to(
        np.arange(8.0).reshape(2, 2, 2).sum(axes, keepdims=True), (2, 2, 2)
    ).reshape(8)
    found = jax.jit(connections.sums(mesh))(np.arange(8.0, dtype=np.float32))
    sets = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    for array, axes in zip(found, sets, strict=True):
        np.testing.assert_array_equal(array, total(*axes))
    text = jax.jit(connections.sums(mesh)).lower(np.ones(8, np.float32)).compile().as_text()
    assert len(set(re.findall(r"replica_groups=\S+", text))) == len(sets)  # none was left out
    connections.connect(mesh)


@pytest.mark.slow
def test_a_process_that_comes_half_a_minute_later_is_waited_for():
    address, started = f"127.0.0.1:{free_port()}", time.monotonic()
    own = dict(PYTHONPATH=str(ROOT), XLA_FLAGS="--xla_force_host_platform_device_count=2")
    command = [sys.executable, "-c", LATE]
    both = [
        subprocess.Popen(
            [*command, str(index), address, str(ROOT)],
            env=os.environ | own,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    done = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], done
    assert time.monotonic() - started > 35
