"""Evaluation: an objective's metrics over a whole split, and the task that runs it on a folder."""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fmjax import (
    build,
    data,
    logs,
    needs,
    pretrained,
    processes,
    progress,
    sharding,
    storage,
)
from fmjax import losses as array_losses
from fmjax import objectives as losses
from fmjax.data.settings import ALONE, DataSettings, read
from fmjax.errors import ConfigError, DataError, NumericsError
from fmjax.models import AnyModel

FILE = "evaluation.jsonl"
# A new source replaces all that names the run's; only these say how rows are made of documents.
ROWS = ("seq_len", "target_len", "source_prefix", "pack", "format", "pair", "long", "frame")
ROWS += ("room", "template", "stride")
ROWS += ("columns", "label", "cache", "workers")


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: measures the model of `config.folder` on `config.split` of any data.

    Where the config has None, a run folder is measured as while it was trained, any other as
    configs/mlm.py trains. Adds a line to evaluation.jsonl in the run folder, else in `workdir`.
    """
    with processes.start(config, dry_run=dry_run) as mesh:
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        measure = Measure(config, opened, mesh)
        settings, split = measure.settings, measure.split
        source = settings["train"] or settings["path"] or settings["name"]
        dtype, rows = opened.model.cfg.dtype, f"{measure.rows:,} rows of {split.seq_len}"
        _show(f"\n{opened}: {config.split} of {source}, {rows}, {dtype}")
        if dry_run:
            return
        steps = measure.steps
        with progress.part(_show, enabled=jax.process_index() == 0) as part:
            show = lambda done: part(done / steps, f"evaluated {done:,} of {steps:,} batches")
            metrics = measure(opened.model, opened.params, mesh, show)
    metrics |= perplexity(metrics)
    for name, value in metrics.items():
        _show(f"  {name:<16} {value:>12,.4f}")
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "folder": opened.source,
        "step": opened.step,
        "averaged": opened.averaged,
        "split": config.split,
        "rows": measure.rows,
        "precision": dtype,
        "data": settings,
        "objectives": measure.goals,
        "metrics": metrics,
    }
    append(Path(opened.source if opened.config else workdir) / FILE, record)


class Measure:
    """What the model of a folder is measured for, and on which rows: called with a model and its
    stored parameters it gives the metrics.

    Of `config` are read data, objectives, batch_size, split and limit, as in configs/evaluate.py.
    With `alone` texts stand in rows of their own, as a prompt has to be before each. Raises
    ConfigError and DataError where the model and the rows do not fit.
    """

    def __init__(
        self, config: Any, opened: pretrained.Opened, mesh: jax.sharding.Mesh, alone: bool = False
    ):
        settings, self.goals, self.batch_size = settings_of(config, opened)
        if alone:
            settings["format"] = ALONE.get(settings["format"], settings["format"])
        sharding.check_batch(mesh, self.batch_size)
        build.check_rows(opened.model, settings)
        self.settings, self.limit = settings, config.limit
        self.source, self.name = opened.source, config.split
        self.dataset = opened.prepare(settings)
        self.split = split_of(self.dataset, config.split)
        check_labels(self.dataset, opened, self.goals)
        self.rows = min(len(self.split), self.limit * self.batch_size or len(self.split))
        self.steps = data.eval_steps(self.split, self.batch_size, self.limit)
        self.objectives = losses.build(
            self.goals, target=self.dataset.target, vocab=self.dataset.vocab
        )

    def __call__(
        self,
        model: AnyModel,
        params: Any,
        mesh: jax.sharding.Mesh,
        show: Callable[[int], None] = lambda done: None,
    ) -> dict[str, float]:
        """{metric: mean over the rows}; `show` is told how many batches are done."""
        batches = data.eval_batches(
            self.split,
            batch_size=self.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            limit=self.limit,
            alike=not any(objective.whole_batch for objective in self.objectives),
        )
        kept = keeps(self.objectives)
        totals, outputs = collect(self._step(model), params, batches, mesh, kept, show=show)
        if outputs:
            given, _, rows = in_order(outputs)
            check_finite(given, self.source, lambda i: f"row {rows[i]:,} of {self.name}")
        for name, (value, _) in totals.items():
            if not np.isfinite(value).all():
                raise NumericsError(
                    f"{self.source}: {name} of {self.name} is not finite: its weights are damaged, "
                    "or it needs config.precision=float32."
                )
        about = dict(names=self.dataset.labels, split=self.split)
        return measured(totals, outputs, self.objectives, **about)

    @functools.cache  # noqa: B019  (seeds have one model; there are few of these in a process)
    def _step(self, model: AnyModel) -> Callable:
        return jax.jit(make_step(build.apply(model), self.objectives))


def make_step(apply: Callable, objectives: list[losses.Objective]) -> Callable:
    """`step(params, batch, rng) -> ({metric: (sum, weight)}, {objective: outputs})`, without
    dropout, to be jitted."""

    def eval_step(params, batch, rng):
        sums, outputs = losses.evaluation(objectives, apply, params, batch, rng)
        real = array_losses.real_rows(batch) > 0
        return sums, {"rows": (batch["index"], real, batch.get("labels")), **outputs}

    return eval_step


def evaluate(
    step: Callable,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    objectives: list[losses.Objective],
    mesh: jax.sharding.Mesh,
    stop: Callable[[], bool] = lambda: False,
    show: Callable[[int], None] = lambda done: None,
    **about: Any,
) -> dict[str, float] | None:
    """The metrics of what `collect` finds, None if `stop()` turned true on the way."""
    found = collect(step, params, batches, mesh, keeps(objectives), stop, show)
    return None if found is None else measured(*found, objectives, **about)


def collect(
    step: Callable,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: jax.sharding.Mesh,
    keep: bool,
    stop: Callable[[], bool] = lambda: False,
    show: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, np.ndarray], list[Any]] | None:
    """({metric: (sum, weight)} of all examples, the outputs of the first batch, if there are any,
    or, if `keep`, of each); None if `stop()` turned true on the way.

    `show` is told how many batches are done. Masks are a function of the row number, so every
    evaluation sees the same ones.
    """
    rng = jax.random.key(0)
    totals: dict[str, np.ndarray] = {}
    kept = []
    for done, batch in enumerate(sharding.to_device(batches, mesh), 1):
        if stop():
            return None
        sums, outputs = step(params, batch, rng)
        add(totals, sums)
        if keep or done == 1 and len(outputs) > 1:  # not the rows alone
            kept.append(on_host(outputs))
        show(done)
    return totals, kept


def measured(
    totals: Mapping[str, np.ndarray],
    kept: list[Any],
    objectives: list[losses.Objective],
    **about: Any,
) -> dict[str, float]:
    """Means over all examples, each counted once, and scores over all of them at once.

    `about` are the `names` and the `split` that scores may ask for.
    """
    found = losses.mean(totals, objectives)
    if kept:
        outputs, labels, rows = in_order(kept)
        scored = [objective for objective in objectives if objective.score]
        for objective in scored:
            found_here = outputs[objective.name]
            scores = losses.told(objective.score, found_here, labels, rows=rows, **about)
            if not_finite(found_here).any():  # of which a comparison makes numbers all the same
                scores = dict.fromkeys(scores, float("nan"))
            found |= {f"{objective.name}/{name}": value for name, value in scores.items()}
    return found


def keeps(objectives: Iterable[losses.Objective]) -> bool:
    """Whether anything is said of single examples, so that `collect` has to keep the outputs."""
    return any(objective.score or objective.each for objective in objectives)


def by_example(
    kept: list[Any], objectives: list[losses.Objective], split: Any
) -> dict[str, np.ndarray]:
    """{metric: [N]}, what each example of the split adds to means; with `label` [N] and, where the
    split knows it, `tokens` [N]. {} where no objective says such a thing."""
    if not kept or not any(objective.each for objective in objectives):
        return {}
    outputs, labels, rows = in_order(kept)
    found = {"label": labels}
    if hasattr(split, "extent"):
        first, last = split.extent(rows)
        found["tokens"] = last - first
    for objective in objectives:
        if objective.each:
            told = objective.each(outputs[objective.name], labels)
            if (bad := not_finite(outputs[objective.name])).any():
                told = {name: np.where(bad, np.nan, values) for name, values in told.items()}
            found |= {f"{objective.name}/{name}": values for name, values in told.items()}
            if len(objectives) == 1 and "loss" in told and objective.weight == 1:
                found["loss"] = told["loss"]
    return found


def on_host(outputs: Any) -> Any:
    """Arrays of all processes in the memory of each."""
    if jax.process_count() > 1:
        outputs = multihost_utils.process_allgather(outputs, tiled=True)
    return jax.device_get(outputs)


def in_order(
    batches: list[dict[str, Any]],
) -> tuple[dict[str, Any], np.ndarray | None, np.ndarray]:
    """({objective: outputs}, labels if there are any, numbers of the rows) of all examples in the
    order of the split; what fills the last batch is left out."""
    whole = jax.tree.map(lambda *parts: np.concatenate(_as_wide(parts)), *batches)
    index, real, labels = whole.pop("rows")
    order = np.argsort(np.where(real, index, np.iinfo(np.int32).max), kind="stable")[: real.sum()]
    return jax.tree.map(lambda x: x[order], (whole, labels, index))


def not_finite(outputs: Any) -> np.ndarray:
    """[N], for each example whether any of its outputs (a tree of [N, …]) is NaN or infinite; minus
    infinity fills columns that an example does not have."""
    found = [np.zeros(len(jax.tree.leaves(outputs)[0]), bool)]
    for leaf in jax.tree.leaves(outputs):
        if np.issubdtype(leaf.dtype, np.floating):
            bad = np.isnan(leaf) | (leaf == np.inf)
            found.append(bad.reshape(len(leaf), -1).any(axis=1))
    return np.any(found, axis=0)


def check_finite(outputs: Any, source: str, place: Callable[[int], str]) -> None:
    """Raises NumericsError where outputs of the model `source` are not finite; `place` says where
    the record of an example stands."""
    if len(bad := np.flatnonzero(not_finite(outputs))):
        raise NumericsError(
            f"{source} gives numbers that are not finite for {len(bad):,} records, the first is "
            f"{place(int(bad[0]))}: nothing is written. Are its parameters finite, and does "
            "config.precision='float32' help?"
        )


def _as_wide(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Batches as wide as the widest, filled with what no label and no likely token is."""
    shape = np.max([part.shape[1:] for part in parts], axis=0).astype(int)
    filled = []
    for part in parts:
        missing = [(0, 0), *((0, int(n)) for n in shape - part.shape[1:])]
        nothing = -np.inf if np.issubdtype(part.dtype, np.floating) else -1
        filled.append(np.pad(part, missing, constant_values=nothing) if shape.size else part)
    return filled


def add(totals: dict[str, np.ndarray], found: Mapping[str, tuple[Any, Any]]) -> None:
    """Adds (sum, weight) pairs, on a device or not, in float64 on the host."""
    for name, pair in jax.device_get(found).items():
        totals[name] = totals.get(name, 0) + np.asarray(pair, np.float64)


def perplexity(metrics: Mapping[str, float]) -> dict[str, float]:
    """{"mlm/perplexity": e^nats} for losses that are means over tokens."""
    return {
        f"{name.removesuffix('loss')}perplexity": float(
            np.exp(metrics.get(f"{name.removesuffix('loss')}nats", value))
        )
        for name, value in metrics.items()
        if name.endswith(("mlm/loss", "clm/loss"))
    }


def settings_of(
    config: Any, opened: pretrained.Opened
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(data settings, objectives, batch size): what is given, else the run's, else the defaults."""
    saved = opened.config
    given = {key: value for key, value in config.data.items() if value is not None}
    if opened.labels and not given.get("classes"):
        given["classes"] = opened.labels  # what its outputs mean, whichever labels the data have
    if opened.several and given.get("format") == "classes":
        given["format"] = "labels"  # as its outputs are read, whether there are labels or not
    kept = saved.data.to_dict() if saved else {}
    if given.keys() & {"name", "train", "path"}:
        kept = {key: kept[key] for key in ROWS if key in kept}
    goals = config.objectives or (saved and saved.objectives)
    return (
        dataclasses.asdict(read(DataSettings, kept | given, "data")),
        goals.to_dict() if goals else {"clm" if opened.model.causal else "mlm": {}},
        config.batch_size or (saved.batch_size if saved else 64),
    )


def check_labels(dataset: data.Dataset, opened: pretrained.Opened, goals: Iterable[str]) -> None:
    """Refuses heads that are not trained, or whose outputs are not as many as the names."""
    for name in goals:
        if needs.vocabulary([name]):
            opened.require_output()
        opened.require_head(name)
        outputs = dict(opened.model.cfg.classes).get(name)
        if name == "classify" and opened.several != (dataset.target == "labels"):
            form = "labels" if opened.several else "classes"
            raise ConfigError(
                f"The head 'classify' of {opened.source} is not for config.data.format="
                f"{dataset.target!r}: set it to {form!r}."
            )
        named = dataset.target in ("classes", "labels", "tags")
        if named and outputs is not None and outputs != len(dataset.labels):
            raise ConfigError(
                f"The head {name!r} of {opened.source} has {outputs} outputs, but there are "
                f"{len(dataset.labels)} names of classes, {list(dataset.labels)[:10]}: set "
                "config.data.classes to the names of its outputs, in their order."
            )


def split_of(dataset: data.Dataset, name: str) -> Any:
    """The split that is called so. Raises DataError where it has no rows."""
    if name not in dataset.splits:
        raise DataError(
            f"The data have no rows for config.split={name!r}. Set config.data.validation, or "
            "config.data.validation_fraction to the share of documents to measure on."
        )
    return dataset.splits[name]


def _show(text: str) -> None:
    if jax.process_index() == 0:
        print(text)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line to a file of results, and says so."""
    if jax.process_index() == 0:
        with storage.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(logs.plain(record)) + "\n")
        _show(f"added to {path}")
