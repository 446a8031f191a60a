"""The numbered folders of a run's checkpoints: which steps count, which stay, which go.

A step is finished when it has its manifest (fmjax/io/manifest.py). The manifest is the last thing
written and the first thing deleted, so that a process killed at any time leaves finished steps and
unfinished ones, never a step that looks finished and is not.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from fmjax.errors import CheckpointError
from fmjax.io import manifest
from fmjax.io.storage import writing

log = logging.getLogger(__name__)


def finished(directory: Path) -> list[int]:
    """The steps that were saved completely, oldest first. Says nothing about damage since."""
    folders = _numbered(directory)
    return sorted(step for step in folders if (folders[step] / manifest.NAME).is_file())


def newest(directory: Path, *, quarantine: bool) -> int | None:
    """The newest undamaged step; None if there never was a step.

    With `quarantine`, damaged steps on the way are renamed to <step>.corrupt. Raises
    CheckpointError if all are damaged.
    """
    there = finished(directory)
    if unfinished := sorted(_numbered(directory).keys() - set(there)):
        log.warning("%s: ignoring unfinished steps %s", directory, unfinished)
    for step in reversed(there):
        folder = directory / str(step)
        found = manifest.problems(folder)
        if not found:
            return step
        kept = ""
        if quarantine:
            target = _unused(directory / f"{step}.corrupt")
            with writing(target):
                folder.rename(target)
            kept = f", kept as {target.name}"
        log.error("CHECKPOINT %s IS DAMAGED%s. %s", folder, kept, "; ".join(found))
    if there or any(directory.glob("*.corrupt*")):
        raise CheckpointError(
            f"no usable checkpoint in {directory}: all are damaged. Training does not start from "
            "zero by itself. Start over with --fresh, or put a copy of a checkpoint there."
        )
    return None


def intact(directory: Path, step: int) -> int:
    """`step`, having verified that it is there and undamaged. Raises CheckpointError."""
    there = finished(directory)
    if step not in there:
        listed = ", ".join(map(str, there)) or "none"
        raise CheckpointError(f"{directory} has no finished step {step}. There are: {listed}.")
    if found := manifest.problems(directory / str(step)):
        raise CheckpointError(f"checkpoint {directory / str(step)} is damaged. {'; '.join(found)}")
    return step


def read_meta(folder: Path) -> dict:
    """The JSON saved with a step.

    Raises CheckpointError where it cannot be read or its format is newer than this fmjax.
    """
    try:
        # Orbax's JsonSave gives the file this name.
        meta = json.loads((folder / "meta" / "metadata").read_bytes())
        manifest.check_format(int(meta["format"]), folder)
        kinds = {key: type(meta[key]) for key in ("step", "metrics", "arrays")}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{folder}/meta cannot be read: {error!r}") from error
    if kinds != {"step": int, "metrics": dict, "arrays": dict}:
        raise CheckpointError(f"{folder}/meta is not what fmjax writes: {kinds}")
    # Written when all data were texts, of which tokens are counted and a tokenizer is kept.
    if "tokens" in meta:
        meta["units"] = meta.pop("tokens")
    if "tokenizer" in meta:
        meta["processors"] = {"tokenizer": meta.pop("tokenizer")}
    return meta


def make_room(directory: Path, step: int) -> None:
    """Before `step` is written: deletes it, all newer steps and all unfinished ones."""
    directory.mkdir(parents=True, exist_ok=True)
    there = finished(directory)
    for other, folder in sorted(_numbered(directory).items()):
        if other in there and other >= step:
            log.warning("saving step %d after a roll-back: deleting step %d", step, other)
        if other not in there or other >= step:
            remove(folder)
    (directory / str(step)).unlink(missing_ok=True)  # a stray file of that name


def common(directories: Iterable[Path]) -> list[int]:
    """The steps that are finished in all of them, oldest first."""
    return sorted(set.intersection(*(set(finished(directory)) for directory in directories)))


def delete_old(
    directory: Path,
    *,
    keep: int,
    keep_best: int,
    best: str,
    mode: str,
    beside: Sequence[Path] = (),
) -> None:
    """Keeps the last `keep` steps, unless `best` is "" the `keep_best` with the best metric, and
    the last one that is in all of the folders `beside` it, too.

    Of equal ones the older is better.
    """
    there = finished(directory)
    kept = {*there[-keep:], *common([directory, *beside])[-1:]}
    scores = {step: _score(directory / str(step), best) for step in there} if best else {}
    scores = {step: score for step, score in scores.items() if score is not None}
    kept |= set(sorted(scores, key=scores.get, reverse=mode == "max")[:keep_best])
    for step in there:
        if step not in kept:
            remove(directory / str(step))


def remove(folder: Path) -> None:
    """Deletes a step. Killed half-way, it leaves an unfinished one."""
    if folder.is_symlink():  # what it leads to is not this run's
        return folder.unlink()
    (folder / manifest.NAME).unlink(missing_ok=True)
    # Threads of a failed save may still be writing here; make_room takes what they leave.
    shutil.rmtree(folder, ignore_errors=True)


def _numbered(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    found = (path for path in directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name))
    return {int(path.name): path for path in found if path.is_dir()}


def _score(folder: Path, metric: str) -> float | None:
    try:
        return read_meta(folder)["metrics"].get(metric)
    except CheckpointError:
        return None  # damage is judged on restoring, where it matters


def _unused(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}.{number}") for number in range(2, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())
