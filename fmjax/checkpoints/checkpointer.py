"""Checkpoints: saved while training continues, verified before they are used, never silently wrong.

A run folder holds checkpoints/<step>/ with state/ (the arrays, Orbax's format), meta/ (JSON) and
MANIFEST.json, its digests (fmjax/io/manifest.py), written last. Which steps count, stay and go is
in fmjax/io/retention.py.

Orbax writes and reads the arrays. What it leaves open is decided here: what happens when a save
fails, which step is restored, and that a checkpoint of another model is refused, not bent to fit.
"""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore  # what orbax stores arrays with
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from fmjax.checkpoints import frozen
from fmjax.distributed import processes
from fmjax.errors import CheckpointError, ConfigError, did_you_mean, first_line
from fmjax.io import manifest, retention
from fmjax.io.storage import check_name

MAX_FAILURES = 3  # this many failed saves in a row end the run
RETRY_SEC = 5.0  # pause after the first failure, doubled after each further one
# Where a moving average of the parameters is in a state: a link of the optimizer's chain.
AVERAGE = r"opt_state/(?:inner/)?\d+/average/(.*)"

log = logging.getLogger(__name__)


class _Handled(logging.Filter):
    """Drops the tracebacks that orbax and asyncio log of a failed save: its error is one line,
    and is raised or logged here."""

    def filter(self, record: logging.LogRecord) -> bool:
        by_orbax = record.name == "asyncio" or "orbax" in record.pathname
        return not (by_orbax and record.exc_info)


_handled = _Handled()


class Checkpointer:
    """Saves and restores the training state of one run folder. Used by one thread.

    Keeps the last `keep` steps and the best `keep_best` by the metric named `best` ("" for none;
    `best_mode` "min" or "max"), and the newest that the runs `beside` it have too, which continue
    together with it. `committed` is the newest step known to be safely stored.

    With several processes all of them call every method; process 0 does the work on files, so that
    only its `wait` covers the manifest.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep: int = 2,
        keep_best: int = 1,
        best: str = "",
        best_mode: str = "min",
        beside: Sequence[str | Path] = (),
    ):
        if keep < 1:
            raise ConfigError(f"config.keep = {keep}: at least 1 checkpoint must be kept.")
        if best_mode not in ("min", "max"):
            raise ConfigError(
                f"best_mode is {best_mode!r}.{did_you_mean(best_mode, ['min', 'max'])}"
            )
        self.committed: int | None = None
        self._directory = _directory(workdir)
        self._beside = [_directory(other) for other in beside]
        self._keep, self._keep_best = keep, keep_best
        self._best, self._best_mode = best, best_mode
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_handled)  # once, however often
        atomicity = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), atomicity_options=atomicity
        )
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._latest: tuple = ()  # arguments of the save in progress, kept until it is committed
        self._failures, self._retry_at = 0, 0.0

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        force: bool = False,
    ) -> bool:
        """Starts saving `state` (a tree of arrays) and `meta` (JSON) as `step`.

        Returns once the arrays may be donated; the rest happens in the background. If the save
        before is still being written, waits for it. Steps newer than `step`, left from
        before a roll-back, are deleted. Returns False, having done nothing, when `step` is
        already committed by this object and not `force`.

        `metrics` decide which step is best; a non-finite one never is.
        """
        self._collect(block=True)
        if step == self.committed and not force:
            return False
        if self._best and metrics and self._best not in metrics:
            hint = did_you_mean(self._best, metrics)
            raise ConfigError(f"config.best = {self._best!r} is not a metric of this run.{hint}")
        own = {
            "format": manifest.FORMAT,
            "step": step,
            "metrics": {name: _finite(value) for name, value in (metrics or {}).items()},
            "arrays": _described(state),
        }
        assert not own.keys() & meta.keys(), f"reserved keys in meta: {own.keys() & meta.keys()}"
        # A copy: the file is written later, when the caller may have changed what it passed.
        self._start(step, state, json.loads(json.dumps({**own, **meta})))
        return True

    def check(self) -> bool:
        """Call at every step: True when a save has failed and the present state should be saved.

        A failed save (a full disk) is logged, its files are removed, and the attempt is repeated
        after a pause that doubles. Raises CheckpointError after MAX_FAILURES failures in a row,
        or after the first one with several processes, which could not agree on a repetition.
        """
        self._collect(block=False)
        return self._failures > 0 and time.monotonic() >= self._retry_at

    def wait(self) -> None:
        """Blocks until the last save is committed, manifest included.

        A failed save is repeated here as long as its arrays live, so call this before the state
        is donated to another step. Raises CheckpointError when the save cannot be completed.
        """
        self._collect(block=True)
        while self._failures:
            step, state, _ = self._latest
            leaves = jax.tree.leaves(state)
            if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
                raise CheckpointError(f"step {step} was not saved, and its state is gone.")
            time.sleep(max(0.0, self._retry_at - time.monotonic()))
            self._start(*self._latest)
            self._collect(block=True)

    def close(self) -> None:
        """Waits for a save in progress and frees the threads. An error is only logged."""
        for finish in (lambda: self._collect(block=True), self._orbax.close, self._worker.shutdown):
            try:
                finish()
            except Exception as error:  # orbax raises here what its threads have found
                log.error("while checkpoints are closed: %s", first_line(error))

    def restore(
        self,
        abstract: Any,
        step: int | None = None,
        check: Callable[[dict], None] = lambda meta: None,
    ) -> tuple[Any, dict] | None:
        """(state, meta) of the newest undamaged step, or of `step`; None if nothing was ever saved.

        `abstract` is the state as a tree of jax.ShapeDtypeStruct with shardings, on any number of
        devices. Damaged steps on the way to the newest are renamed to <step>.corrupt. Raises
        CheckpointError when all steps or the requested one are damaged, and when shapes, dtypes or
        structure differ from `abstract`: nothing is cast, dropped or initialised. `check(meta)` may
        raise first, before the arrays are compared and read.
        """
        leaves = jax.tree.leaves(abstract)
        assert all(leaf.sharding is not None for leaf in leaves), "abstract state without shardings"
        wanted = _described(abstract)  # before the first step, so that no training is lost
        self._collect(block=True)
        found = _find(self._directory, step, quarantine=True)
        if found is None:
            return None
        folder = self._directory / str(found)
        meta = retention.read_meta(folder)
        check(meta)
        _require_equal(meta["arrays"], wanted, folder)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(_without_empty(abstract)))
        state = _with_empty(self._orbax.restore(folder, args=arguments)["state"], abstract)
        # After a roll-back, saving the requested step again is not idle: it deletes the newer ones.
        self.committed = found if step is None else None
        return state, meta

    def _start(self, step: int, state: Any, meta: dict) -> None:
        self._latest = (step, state, meta)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(_without_empty(state)), meta=ocp.args.JsonSave(meta)
        )
        try:
            if jax.process_index() == 0:
                retention.make_room(self._directory, step)
            self._orbax.save(self._directory / str(step), args=arguments)
        except (OSError, ValueError) as error:  # what file systems raise, through tensorstore
            self._failed(step, error)
        else:
            self._pending = self._worker.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        """In the background: waits for the arrays, seals the step, then deletes old ones."""
        folder = self._directory / str(step)
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                manifest.write(folder)
        except Exception:
            if jax.process_index() == 0:
                retention.remove(folder)  # so that it does not hold the disk that may be full
            raise
        if jax.process_index() == 0:
            retention.delete_old(
                self._directory,
                keep=self._keep,
                keep_best=self._keep_best,
                best=self._best,
                mode=self._best_mode,
                beside=self._beside,
            )

    def _collect(self, *, block: bool) -> None:
        """Takes the result of the save in progress, if it has ended or `block`."""
        if self._pending is None or not (block or self._pending.done()):
            return
        error, self._pending = self._pending.exception(), None
        if error is not None:
            self._failed(self._latest[0], error)
        else:
            self.committed = self._latest[0]
            self._latest, self._failures = (), 0

    def _failed(self, step: int, error: BaseException) -> None:
        self._failures += 1
        allowed = MAX_FAILURES if jax.process_count() == 1 else 1
        reason = " ".join(str(error).split())[:300]
        if self._failures >= allowed:
            saved = "No step" if self.committed is None else f"Step {self.committed}, the last one,"
            raise CheckpointError(
                f"saving step {step} in {self._directory} failed, {self._failures} in a row: "
                f"{reason}. Free space or repair the storage, or choose another --workdir. "
                f"{saved} is saved."
            ) from error
        pause = RETRY_SEC * 2 ** (self._failures - 1)
        self._retry_at = time.monotonic() + pause
        log.error(
            "saving step %d failed (%d of %d); next attempt in %g s: %s",
            *(step, self._failures, allowed, pause, reason),
        )


def load_params(workdir: str | Path, step: int | None = None) -> tuple[Any, dict, bool]:
    """(params, meta, averaged) of a run folder's newest undamaged step, or of `step`, verified.

    The parameters are nested dicts of numpy arrays. Where the optimizer keeps their moving average
    (config.optim.ema), that is read instead, and `averaged` is True; what does not train has none.
    Of the optimizer nothing else is read. The folder may belong to a run in progress: nothing in it
    is changed.
    """
    folder = _verified(workdir, step)
    meta = retention.read_meta(folder)
    average = _named(AVERAGE, meta["arrays"])
    paths = {**_named("params/(.*)", meta["arrays"]), **average}
    wanted = set(paths.values())
    handler = ocp.PyTreeCheckpointHandler()
    item = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if _path(path) in wanted else ocp.PLACEHOLDER,
        handler.metadata(folder / "state").tree,
    )
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with ocp.Checkpointer(handler) as orbax:
        state = orbax.restore(folder / "state", args=ocp.args.PyTreeRestore(item, restore_args=how))
    found = {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
    named = {name: found[path] for name, path in paths.items()}
    if meta.get("frozen"):
        named |= flatten_dict(frozen.load(folder.parent, meta["frozen"]), sep="/")
    return unflatten_dict(named, "/"), meta, bool(average)


def load_meta(workdir: str | Path, step: int | None = None) -> dict:
    """Metadata of the newest undamaged step of a run folder, or of `step`."""
    return retention.read_meta(_verified(workdir, step))


def _verified(workdir: str | Path, step: int | None) -> Path:
    """The folder of a run's newest undamaged step, or of `step`; nothing in it is changed."""
    directory = _directory(workdir)
    found = _find(directory, step, quarantine=False)
    if found is None:
        arms = f" Its arms are: {workdir}/arms/0, …" if Path(workdir, "arms").is_dir() else ""
        raise CheckpointError(
            f"{directory} holds no checkpoint. Is {workdir} the folder of a single run?{arms}"
        )
    return directory / str(found)


def _directory(workdir: str | Path) -> Path:
    folder = Path(workdir).absolute()  # orbax fails late on a relative path
    check_name(folder)
    return folder / "checkpoints"


def _find(directory: Path, step: int | None, *, quarantine: bool) -> int | None:
    """The undamaged step to restore. Process 0 reads and decides for all processes."""

    def find():
        if step is None:
            return retention.newest(directory, quarantine=quarantine)
        return retention.intact(directory, step)

    return processes.first(find)


def _path(keys: Iterable[Any]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _named(pattern: str, paths: Iterable[str]) -> dict[str, str]:
    """{what the pattern's group holds: path} of the paths that match."""
    return {match[1]: path for path in paths if (match := re.fullmatch(pattern, path))}


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _described(tree: Any) -> dict[str, str]:
    """{path: "float32[8,16]"} of a tree of arrays. Refuses dtypes that cannot be stored."""
    described = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = _path(path)
        described[name] = f"{leaf.dtype}[{','.join(str(size) for size in leaf.shape)}]"
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            try:
                tensorstore.dtype(str(leaf.dtype))
            except (TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{name} is {described[name]}, which cannot be stored. Pack its values into "
                    "uint8 (two 4-bit codes a byte) or keep it out of the training state."
                ) from error
    return described


def _without_empty(tree: Any) -> Any:
    """The tree with None for arrays of no size, which Orbax does not write: `arrays` of the meta
    has their shapes."""
    return jax.tree.map(lambda leaf: leaf if math.prod(leaf.shape) else None, tree)


def _with_empty(tree: Any, abstract: Any) -> Any:
    """The tree with the arrays of no size that `abstract` has."""

    def fill(like, leaf):
        if leaf is not None:
            return leaf
        return jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)()

    return jax.tree.map(fill, abstract, tree)


def _require_equal(saved: dict[str, str], wanted: dict[str, str], folder: Path) -> None:
    lines = [
        f"  {path}: checkpoint {saved.get(path, 'has none')}, model {wanted.get(path, 'has none')}"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]
    if lines:
        shown = "\n".join(lines[:40]) + (f"\n  and {len(lines) - 40} more" if lines[40:] else "")
        raise CheckpointError(
            f"{folder} does not match the model and optimizer of this run:\n{shown}\n"
            "Set config.model, config.optim and config.groups as in the run's config.json, or "
            "start over with --fresh."
        )
