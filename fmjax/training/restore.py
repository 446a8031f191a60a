"""The initial state of runs: from their newest checkpoints, from `config.init`, or fresh."""

import contextlib
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fmjax import data
from fmjax.checkpoints import checkpointer, frozen, pretrained
from fmjax.data import tokenizer
from fmjax.errors import CheckpointError, ConfigError
from fmjax.io import retention, run_config, workdir
from fmjax.io.storage import writing
from fmjax.params import groups
from fmjax.training import initialize, state
from fmjax.training.setup import Run
from fmjax.training.state import TrainState
from fmjax.training.vmapped_runs import VmappedRuns


def states(
    vmapped: VmappedRuns,
    folders: Sequence[workdir.Folder],
    savers: Sequence[checkpointer.Checkpointer],
) -> tuple[TrainState, list[dict[str, Any]], str]:
    """(state, meta of each run) of the newest step that all have a verified checkpoint of, else
    (new state, {} of each); and the digest of the frozen parameters as they are saved, "" for none.
    """
    checkpoints = [folder.path / "checkpoints" for folder in folders]
    processor_digests.cache_clear()  # of runs that this process had in the same folders
    if found := restored(vmapped, folders, savers):
        states, saved = zip(*found, strict=True)
        for folder, meta in zip(folders, saved, strict=True):
            pretrained.check_unchanged(folder.path, meta)
        digests = {meta["frozen"] for meta in saved}
        if len(digests) > 1:
            raise CheckpointError(
                f"the arms of {folders[0].path.parent} have different frozen parameters: they are "
                "of different runs. Put the right folders back, or start over with --fresh."
            )
        (frozen_digest,) = digests
        if frozen_digest:
            rest = vmapped.padded_run.split(vmapped.padded_run.abstract.params)[1]
            rest = frozen.restore(checkpoints[0], rest, frozen_digest)
            states = [one.replace(params=groups.merge(one.params, rest)) for one in states]
        return vmapped.stack(states), list(saved), frozen_digest
    if jax.process_index() == 0:
        # A run folder reads alone: evaluation, export and people need its processors.
        for folder in folders:
            for name, source in vmapped.padded_run.dataset.processors.items():
                with writing(folder.path / name):
                    shutil.copytree(source, folder.path / name, dirs_exist_ok=True)
    current = vmapped.stack(created(vmapped.runs))
    rest = vmapped.padded_run.split(current.params)[1]
    frozen_digest = frozen.save(checkpoints[0], rest) if jax.tree.leaves(rest) else ""
    for other in checkpoints[1:] if frozen_digest else ():
        frozen.share(checkpoints[0], other)
    return current, [{} for _ in folders], frozen_digest


def before(run: Run, folder: Path, step: int) -> tuple[TrainState, dict[str, Any]]:
    """(state, position of the data) of the newest checkpoint before the update `step` (from 1);
    the state at the start, and {}, where there is none. Raises CheckpointError for damage."""
    checkpoints = folder / "checkpoints"
    there = [one for one in retention.finished(checkpoints) if one < step]
    if not there:
        return created([run])[0], {}
    with contextlib.closing(checkpointer.Checkpointer(folder)) as saver:
        same_data = lambda saved: data.check_fingerprint(saved["fingerprint"], fingerprint(run))
        state, meta = saver.restore(moving(run, run.abstract), there[-1], check=same_data)
    if meta["frozen"]:
        rest = frozen.restore(checkpoints, run.split(run.abstract.params)[1], meta["frozen"])
        state = state.replace(params=groups.merge(state.params, rest))
    return state, meta["data"]


def restored(
    vmapped: VmappedRuns,
    folders: Sequence[workdir.Folder],
    savers: Sequence[checkpointer.Checkpointer],
) -> list[tuple[TrainState, dict[str, Any]]]:
    """(what moves, meta) of each run, all at the same step; [] where one has no checkpoint yet."""

    def newest(run, folder, saver, step=None):
        def check(meta):
            data.check_fingerprint(meta["fingerprint"], fingerprint(run))
            run_config.check_meta(folder.path, meta, run.config)

        return saver.restore(moving(run, run.abstract), step, check=check)

    each = list(zip(vmapped.runs, folders, savers, strict=True))
    found = [newest(*one) for one in each]
    for folder, one in zip(folders, found, strict=True):
        if one is None and folder.previous.get("checkpoint"):
            raise CheckpointError(
                f"{folder.path} had a checkpoint of step {folder.previous['checkpoint']}, which is "
                "no longer there. Put checkpoints/ back, or start from zero with --fresh."
            )
    if all(one is None for one in found):
        return []
    there = {folder.path: retention.finished(folder.path / "checkpoints") for folder in folders}
    without = [folder for folder, one in zip(folders, found, strict=True) if one is None]
    if without and all(folder.previous for folder in without):
        return []  # killed while the first step was being saved: they have begun, and no more
    steps = {int(one[0].step) if one else None for one in found}
    if len(steps) == 1:
        return found
    # Killed when it had saved one arm and not the next.
    both = retention.common(path / "checkpoints" for path in there)
    if not both:
        listed = "; ".join(f"{path}: {each or 'none'}" for path, each in there.items())
        raise CheckpointError(
            f"there is no step that all arms have a checkpoint of ({listed}), as where one has "
            "gone on alone. Put the missing ones back, or start over with --fresh."
        )
    return [newest(*one, both[-1]) for one in each]


def created(runs: Sequence[Run]) -> list[TrainState]:
    """The states at step 0; what is frozen is the same arrays in all, and where runs begin alike,
    as with other learning rates, all is."""
    first = runs[0]
    initialize.check_head(first.config, first.dataset.labels)
    begun = initialize.initial(first.config, first.model, first.abstract.params)
    kept = [name for name, group in first.assigned.items() if group == groups.FREEZE]
    random = [name for name in kept if begun is None or name in begun.fresh]
    if random and len({run.config.seed for run in runs}) > 1:
        raise ConfigError(
            f"config.arms has several seeds, but {random[0]} is frozen and drawn by the seed, and "
            "arms share what is frozen: start from config.init, or let it train."
        )

    def create(run):
        params = begun and begun.params
        if begun and run is not first:
            own = run.split(run.abstract.params)[0]
            params = initialize.initial(run.config, run.model, own, params).params
        parts = run.abstract, run.model, run.optimizer.tx, run.split
        return state.create(*parts, run.config.seed, params)

    made: dict[str, TrainState] = {}
    found = []
    for run in runs:
        alike = repr((run.config.seed, run.config.adapter))
        if alike not in made:
            made[alike] = create(run)
        found.append(made[alike])
    return found


@functools.cache  # the files of a run that continues must not change under it
def processor_digests(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """{processor: {file: digest}} of a run folder."""
    return {name: tokenizer.digests(folder / name) for name in names}


def fingerprint(run: Run) -> dict[str, Any]:
    return data.fingerprint(run.dataset, seed=run.config.seed, batch_size=run.config.batch_size)


def moving(run: Run, state: TrainState) -> TrainState:
    """The state without the frozen parameters: what checkpoints hold."""
    return state.replace(params=run.split(state.params)[0])
