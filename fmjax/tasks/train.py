"""Training: `loop` is the only loop there is, and the only place that knows the order of things.

A batch walks: data -> mesh -> train step (corrupt, forward, backward, update) -> log -> evaluate
-> save.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from typing import Any

import jax

from fmjax.config import load as configs
from fmjax.distributed import launch, processes, signals, watchdog
from fmjax.errors import NumericsError, Preempted
from fmjax.experiments import vmapped_summary
from fmjax.io import storage, workdir
from fmjax.params import sharding
from fmjax.training import (
    initialize,
    plan,
    side_effects,
    vmapped_runs,
)
from fmjax.training.loop import loop


def run(
    config: Any,
    workdir_path: str | os.PathLike,
    *,
    dry_run: bool = False,
    fresh: bool = False,
    changed: Sequence[tuple[str, Any, Any]] = (),
) -> None:
    """Trains until `config.total`, resuming from the newest verified checkpoint of the folder.

    `changed` are the (key, default, value) in which the config differs from its file, for the
    report.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        grace_sec = config.distributed.get("grace_sec", watchdog.GRACE_SEC)
        stop = stack.enter_context(signals.catch(grace_sec))
        stop.plan = signals.PREPARING
        stop.note_progress()

        def poll():
            stop.note_progress()
            if stop.signal:
                raise Preempted(
                    f"stopped by {stop.signal} while preparing data; the same command goes on"
                )

        workdir_path = os.path.abspath(workdir_path)
        flags = dict(dry_run=dry_run, fresh=fresh, workdir=workdir_path)
        mesh = stack.enter_context(launch.start(config, stop, **flags))
        if dry_run:
            vmapped = vmapped_runs.prepare(config, mesh, poll)
            initialize.check_head(vmapped.padded_run.config, vmapped.padded_run.dataset.labels)
            signals.end_at_once()  # nothing polls while it compiles, and nothing is to be saved
            return plan.show(vmapped)
        writes = jax.process_index() == 0

        how = dict(fresh=fresh, writes=writes, first=processes.first)
        folder = stack.enter_context(workdir.open(workdir_path, config, **how))
        print(sharding.table(mesh))
        stop.last_words = folder.close
        stack.enter_context(processes.together(folder.close))
        with workdir.memory_errors(), storage.writing_in(folder.path):
            with contextlib.ExitStack() as opened:
                each = zip(workdir.of_arms(folder.path, config), configs.arms(config), strict=True)
                folders = [folder]
                if config.arms:
                    folders = [opened.enter_context(workdir.open(*own, **how)) for own in each]
                vmapped = vmapped_runs.prepare(config, mesh, poll)
                kept = side_effects.Ledger(config, vmapped, mesh)
                loop(vmapped, folders, stop, started, changed)
                kept.write(folders)
            if not config.arms:
                return
            if writes:
                vmapped_summary.write(folder, config, folders)
            if failed := [other for other in folders if other.failure]:
                raise NumericsError(
                    f"{len(failed)} of {len(folders)} arms failed, the others are done. "
                    f"{failed[0].path.name}: {failed[0].failure}"
                )
