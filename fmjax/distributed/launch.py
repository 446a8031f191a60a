"""The start of several processes that act as one."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the one way to its key-value store

from fmjax.distributed import agreement, connections, processes
from fmjax.distributed.coordination import Peers
from fmjax.distributed.signals import Stop
from fmjax.errors import ConfigError, DataError, ResourceError
from fmjax.io import compiled_programs, disk_cache
from fmjax.params import devices, sharding

PATIENCE_SEC = 10  # of waiting for the others in silence


@contextlib.contextmanager
def start(config: Any, stop: Stop | None = None, **flags: Any) -> Iterator[jax.sharding.Mesh]:
    """Joins the other processes if the config says so; the mesh over all devices, which is set.

    From now on only process 0 writes to standard output. Until the block ends `stop.poll` is agreed
    between all processes, and an error of one ends all with its exit code. `flags` are words of the
    command line that all have in common. Raises ConfigError where counts do not fit or the
    processes were not started alike (fmjax/distributed/agreement.py), ResourceError where there is
    no device; ends the process with the exit code of a ResourceError where the others do not come
    within config.distributed.timeout_sec.
    """
    _connect(config.distributed)
    _keep_programs()
    with contextlib.ExitStack() as stack:
        state = jax_distributed.global_state
        if state.num_processes > 1:
            here = state.client, state.process_id, state.num_processes
            peers = Peers(*here, stop or Stop(), config.distributed.heartbeat_sec)
            stack.enter_context(processes.joined(peers))
            if peers.index > 0:
                _silence()
        stack.enter_context(processes.together())
        devices.require()
        if state.num_processes > 1:
            agreement.check_start(config, flags)
        mesh = sharding.make_mesh(**config.mesh)
        if state.num_processes > 1:
            connections.connect(mesh)
        stack.enter_context(jax.set_mesh(mesh))
        yield mesh


def _keep_programs() -> None:
    """Keep compiled programs in the cache folder; without them a start takes longer, no more."""
    try:
        root = disk_cache.root(settings="$FMJAX_CACHE")  # config.data.cache is for data alone
        compiled_programs.keep_in(disk_cache.private(root / "xla"))
    except (OSError, DataError) as error:
        compiled_programs.warn(error)


def _silence() -> None:
    """Lets standard output go nowhere, also that of libraries that are not Python's: gloo talks."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _connect(distributed: Any) -> None:
    """Starts jax.distributed where the config says so, and waits until all processes are there."""
    if not distributed.auto and distributed.num_processes == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler of SIGTERM would replace those of fmjax/distributed/signals.py.
    jax.config.update("jax_enable_preemption_service", False)
    who = dict(
        coordinator_address=distributed.coordinator,
        num_processes=distributed.num_processes,
        process_id=distributed.process_id,
        cluster_detection_method="deactivate",
    )
    here = threading.Event()
    watch = threading.Thread(target=_watch, args=(distributed.timeout_sec, here), daemon=True)
    watch.start()
    try:
        jax.distributed.initialize(
            **({} if distributed.auto else who),
            initialization_timeout=distributed.timeout_sec + 60,  # `_watch` comes first
            heartbeat_timeout_seconds=distributed.heartbeat_sec,
        )
    except (ValueError, RuntimeError) as error:
        how = "auto=True" if distributed.auto else f"coordinator={distributed.coordinator!r}"
        raise ConfigError(
            f"config.distributed.{how} does not work here ({error}). Automatic are TPU VMs, SLURM, "
            "Open MPI and Kubernetes; else set config.distributed.coordinator=<host>:<port> (of "
            "process 0, a free port), num_processes and process_id."
        ) from error
    finally:
        here.set()
    watch.join()


def _watch(timeout_sec: float, here: threading.Event) -> None:
    """Says who is missing at the start, and ends the process after `timeout_sec`: jax would abort
    it without a word of who it waited for."""
    patience = min(PATIENCE_SEC, timeout_sec / 2)
    if here.wait(patience):
        return
    print(f"{_missing()}; waiting", file=sys.stderr, flush=True)
    if here.wait(timeout_sec - patience):
        return
    print(
        f"error: {_missing()}, after {timeout_sec} s (config.distributed.timeout_sec). Look how "
        "the others ended, and compare their config.distributed.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(ResourceError.exit_code)


def _missing() -> str:
    state = jax_distributed.global_state
    if state.coordinator_address is None:
        return "config.distributed.auto=True has not found out yet who the other processes are"
    address = state.coordinator_address
    if state.process_id == 0:
        others = f"1 to {state.num_processes - 1}" if state.num_processes > 2 else "1"
        return f"process 0 is at {address}, but not all others (process {others}) have come there"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return f"process {state.process_id} finds no process 0 at {address} ({error})"
    return f"process {state.process_id} has found process 0 at {address}, but others have not"
