"""One step of a run again: the loss of each example, the norms of each layer, what the model saw.

A batch is a function of the seed and the step, and randomness of both and the place in the order:
the nearest checkpoint before the step is restored, and those in between are done again, on the same
machine to the last bit. What was computed together with other arms, or with a cached prefix, agrees
but for the order of floating-point sums. Nothing of the run is changed.
"""

import bisect
import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import build
from fmjax import objectives as losses
from fmjax.config import load as configs
from fmjax.data.tokenizer import load as load_tokenizer
from fmjax.distributed import launch
from fmjax.errors import ConfigError, DataError, quoted
from fmjax.evaluation.results_log import COPY
from fmjax.io import atomic, metrics_log, progress, results, summary
from fmjax.params import paths, sharding
from fmjax.training import loop, restore, vmapped_runs
from fmjax.training.setup import Run
from fmjax.training.state import TrainState
from fmjax.training.step import make_gradient


def run(config: Any, workdir_path: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: does step `config.step` of the run `config.folder` again and writes what it was
    made of to dumps/ there.

    Raises ConfigError for a folder or a step that is none.
    """
    folder = Path(config.folder)
    if not os.path.isfile(folder / "config.json"):
        raise ConfigError(
            f"config.folder={quoted(str(config.folder))} is not a run folder: it has no config.json"
        )
    saved = configs.load(str(folder / "config.json"))
    if saved.arms:
        raise ConfigError(f"{folder} is of several runs: give that of one, such as {folder}/arms/0")
    with launch.start(config) as mesh, configs.missing_keys(folder / "config.json"):
        if jax.process_count() > 1:
            raise ConfigError("The task 'replay' works in one process.")
        file = folder / "dumps" / f"replay_{config.step}.json"
        results.check_file(file, COPY)
        vmapped = vmapped_runs.prepare(saved, mesh, lambda: None)
        _check_data(folder, vmapped.padded_run)
        total = vmapped.padded_run.total
        if not 1 <= config.step <= total:
            raise ConfigError(f"config.step={config.step}: the run has the steps 1 to {total}.")
        if dry_run:
            return
        found = again(vmapped, folder, config.step)
    results.make_folder(file.parent, COPY)
    text = json.dumps(metrics_log.plain(found), indent=2, ensure_ascii=False)
    atomic.write_atomic(file, text, COPY)
    show(found, config.top_k)
    print(f"written to {file}")


def _check_data(folder: Path, run: Run) -> None:
    """Raise DataError if the data have changed since the run, as far as a finished run recorded
    it."""
    before = summary.read(folder)
    if before.get("data_digest", run.dataset.digest) != run.dataset.digest:
        raise DataError(
            f"{folder} was trained on data with the digest {before['data_digest']}, but "
            f"config.data gives {run.dataset.digest} now: its steps would be others."
        )


def again(vmapped: vmapped_runs.VmappedRuns, folder: Path, step: int) -> dict[str, Any]:
    """The contents of step `step` (from 1) of the run; JSON."""
    run = vmapped.padded_run
    state, position = restore.before(run, folder, step)
    first = int(state.step)
    train_step = jax.jit(vmapped.train_step(), donate_argnums=0)  # the program of the loop
    with contextlib.closing(loop.train_batches(vmapped)) as batches:
        if position:
            batches.restore(position)
        with progress.part(print) as show:
            for number in range(first, step - 1):
                batch = sharding.put(batches.next(state), vmapped.batch_sharding)
                state, _ = train_step(state, batch)
                show((number + 1 - first) / (step - first), f"step {number + 1} of {step}")
        batch = sharding.put(batches.next(state), vmapped.batch_sharding)
    after, told = jax.device_get(train_step(jax.tree.map(jnp.copy, state), batch))
    return {
        "step": step,
        "checkpoint": first,
        "loss": float(told["loss"]),
        "grad_norm": float(told["grad_norm"]),
        "skipped": bool(told["skipped"]),
        "spike": bool(told["spike"]),
        "layers": norms(run, state, after, batch),
        "examples": examples(run, state, batch),
    }


def norms(run: Run, state: TrainState, after: TrainState, batch: Mapping) -> dict[str, dict]:
    """{parameter: {"parameter", "gradient", "update"}} of all that trains: Euclidean norms before
    the step, before clipping, and of what the step has added."""
    gradient = make_gradient(
        build.apply(run.model), run.objectives, run.split, run.config.accumulate
    )
    _, grads = jax.jit(gradient)(state, batch)
    own, moved = (run.split(one.params)[0] for one in (state, after))
    update = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), moved, own)
    of = lambda tree: {
        name: float(np.linalg.norm(np.asarray(x, np.float64).ravel()))
        for name, x in paths.unstack(jax.device_get(tree)).items()
    }
    each = {"parameter": of(own), "gradient": of(grads), "update": of(update)}
    return {name: {kind: each[kind][name] for kind in each} for name in each["gradient"]}


def examples(run: Run, state: TrainState, batch: Mapping[str, jax.Array]) -> list[dict[str, Any]]:
    """For each example of the batch: its place in the order, its loss by each objective, the text,
    and for masked words the text as the model sees it and the targets."""
    apply = build.apply(run.model)
    cuts, phases = losses.phases(run.objectives)
    learnt = phases[bisect.bisect_right(cuts, int(state.step))]
    alone = [objective for objective in learnt if not objective.whole_batch]

    def of_row(row):
        part = {name: x[None] for name, x in row.items()}
        rng = jax.random.fold_in(state.rng, state.step)
        return losses.metrics(alone, apply, state.params, part, rng, True, state.step)

    each = jax.device_get(jax.jit(lambda batch: jax.lax.map(of_row, batch))(batch)) if alone else {}
    rng = jax.random.fold_in(state.rng, state.step)
    seen = losses.prepare(learnt, batch, rng, True, state.step)
    seen = jax.device_get(seen)
    batch = jax.device_get(batch)
    tokenizer, found = load_tokenizer(run.dataset.tokenizer_dir), []
    for row, index in enumerate(batch["index"]):
        told = {"index": int(index)}
        for name, (total, weight) in each.items():
            if name.endswith("/loss"):
                told[name] = float(total[row] / weight[row]) if weight[row] else None
        told["text"] = decoded(tokenizer, batch, row)
        if "labels" in batch and batch["labels"][row].ndim == 0:
            label = batch["labels"][row].item()
            named = run.dataset.labels and isinstance(label, int)
            told["label"] = run.dataset.labels[label] if named else label
        if "mlm_labels" in seen:
            told["seen"] = decoded(tokenizer, seen, row)
            kept = seen["mlm_weights"][row] > 0
            order = np.argsort(seen["mlm_positions"][row][kept])
            ids = seen["mlm_labels"][row][kept][order]
            told["targets"] = tokenizer.convert_ids_to_tokens(ids.tolist())
        found.append(told)
    return found


def decoded(tokenizer: Any, batch: Mapping[str, np.ndarray], row: int) -> str:
    """The real tokens of a row as text; of several sequences an example, a line each."""
    ids, real = batch["input_ids"][row], batch["segment_ids"][row] > 0
    rows = zip(np.atleast_2d(ids), np.atleast_2d(real), strict=True)
    return "\n".join(tokenizer.decode(own[kept]) for own, kept in rows)


def show(found: Mapping[str, Any], most: int) -> None:
    """The examples with the highest losses, and the layers."""
    print(
        f"\nstep {found['step']}, from the checkpoint of step {found['checkpoint']}: loss "
        f"{found['loss']:.6g}, gradient norm {found['grad_norm']:.6g}"
        + (", update skipped" if found["skipped"] else "")
    )
    names = [key for key in found["examples"][0] if key.endswith("/loss")]
    for one in sorted(found["examples"], key=lambda one: -_height(one, names))[:most]:
        told = ", ".join(f"{name} {one[name]:.4g}" for name in names if one[name] is not None)
        text = one.get("seen", one["text"]).replace("\n", " ")
        print(f"\nexample {one['index']}: {told}\n  {text[:300]}{'…' if len(text) > 300 else ''}")
    print()
    print(progress.table([["", "parameters", "gradient", "update"], *_layers(found["layers"])]))


def _height(one: Mapping[str, Any], names: Sequence[str]) -> float:
    """The largest loss of an example; one that is not finite is the highest."""
    total = sum(one[name] or 0.0 for name in names)
    return total if math.isfinite(total) else math.inf


def _layers(each: Mapping[str, Mapping[str, float]]) -> Sequence[list[str]]:
    """The norms of all parameters of a layer, or of what else is named together."""
    layers: dict[str, list] = {}
    for name, own in each.items():
        layers.setdefault(name.partition("/")[0], []).append(own)
    whole = lambda rows, kind: sum(row[kind] ** 2 for row in rows) ** 0.5
    kinds = ("parameter", "gradient", "update")
    return [[name, *(f"{whole(rows, k):.4g}" for k in kinds)] for name, rows in layers.items()]
