"""The frozen parameters of a run: saved once, beside checkpoints that hold what trains.

checkpoints/frozen/ has state/ (the arrays, Orbax's format) and a manifest, and every checkpoint
keeps the digest of that manifest, so that no step is ever put together with other weights.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from fmjax.distributed import processes
from fmjax.errors import CheckpointError
from fmjax.io import manifest

FOLDER = "frozen"


def save(checkpoints: Path, tree: Any) -> str:
    """Writes the frozen `tree` in place of what is there; returns its digest.

    Raises CheckpointError where it cannot be written.
    """
    folder = checkpoints / FOLDER
    atomicity = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)
    handler = ocp.CompositeCheckpointHandler()
    try:
        with ocp.AsyncCheckpointer(handler, atomicity_options=atomicity) as orbax:
            arguments = ocp.args.Composite(state=ocp.args.StandardSave(tree))
            orbax.save(folder, args=arguments, force=True)
            orbax.wait_until_finished()
        if jax.process_index() == 0:
            manifest.write(folder)
    except (OSError, ValueError) as error:  # what file systems raise, through tensorstore
        raise CheckpointError(
            f"{folder} cannot be written: {' '.join(str(error).split())[:300]}. Free space or "
            "repair the storage, or choose another --workdir."
        ) from error
    return processes.first(lambda: manifest.digest(folder))


def share(checkpoints: Path, other: Path) -> None:
    """Puts what `checkpoints` has saved beside `other` checkpoints too, on most file systems
    without taking room again."""

    def copy(source, target):
        try:
            os.link(source, target)
        except OSError:  # no links here, or another file system
            shutil.copy2(source, target)

    def shared():
        shutil.rmtree(other / FOLDER, ignore_errors=True)
        shutil.copytree(checkpoints / FOLDER, other / FOLDER, copy_function=copy)

    try:
        processes.first(shared)
    except OSError as error:
        raise CheckpointError(f"{other / FOLDER} cannot be written: {error}.") from error


def restore(checkpoints: Path, abstract: Any, digest: str) -> Any:
    """The frozen tree with the shapes and shardings of `abstract`, verified."""
    folder = _verified(checkpoints, digest)
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
        return orbax.restore(folder, args=arguments)["state"]


def load(checkpoints: Path, digest: str) -> Any:
    """The frozen tree as numpy arrays, verified."""
    folder = _verified(checkpoints, digest)
    handler = ocp.PyTreeCheckpointHandler()
    item = handler.metadata(folder / "state").tree
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with ocp.Checkpointer(handler) as orbax:
        return orbax.restore(folder / "state", args=ocp.args.PyTreeRestore(item, restore_args=how))


def _verified(checkpoints: Path, digest: str) -> Path:
    """The folder, if every byte is what the checkpoint with that `digest` was made beside."""
    folder = checkpoints / FOLDER

    def found() -> str:
        if not folder.is_dir():
            return "is missing"
        if damage := manifest.problems(folder):
            return f"is damaged ({damage[0]})"
        same = manifest.digest(folder) == digest
        return "" if same else "is of another run than the checkpoints beside it"

    if wrong := processes.first(found):
        raise CheckpointError(
            f"{folder} {wrong}: it holds the parameters that do not train, without which no "
            "checkpoint of the run can be used. Put it back from a copy, or start over with "
            "--fresh."
        )
    return folder
