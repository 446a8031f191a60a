"""Evaluation: an objective's metrics over a whole split, and the task that runs it on a folder."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import build, data, logs, processes, progress, sharding
from fmjax import objectives as losses
from fmjax.data.settings import DataSettings, read
from fmjax.errors import ConfigError, DataError

FILE = "evaluation.jsonl"
# A new source replaces all that names the run's; only these say how rows are made of documents.
ROWS = ("seq_len", "format", "pair", "long", "cache", "workers")


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: measures the model of `config.folder` on `config.split` of any data.

    Where the config has None, a run folder is measured as while it was trained, any other as
    configs/mlm.py trains. Adds a line to evaluation.jsonl in the run folder, else in `workdir`.
    """
    with processes.start(config) as mesh:
        opened = build.open_folder(config.folder, mesh, config.precision, config.step)
        saved = opened.config
        settings, goals, batch_size = _settings(config, saved)
        sharding.check_batch(mesh, batch_size)
        build.check_length(opened.model, settings["seq_len"])
        for name in goals:
            opened.require_head(name)
        dataset = data.prepare(settings, {"name": str(opened.tokenizer)})
        split = _split(dataset, config.split, opened)
        rows = min(len(split), config.limit * batch_size or len(split))
        source = settings["train"] or settings["path"] or settings["name"]
        dtype = opened.model.cfg.dtype
        _show(f"\n{opened}: {config.split} of {source}, {rows:,} rows of {split.seq_len}, {dtype}")
        if dry_run:
            return
        pair = settings["pair"] if settings["format"] == "pairs" else ""
        objectives = losses.build(goals, vocab=dataset.vocab, pair=pair)
        batches = data.eval_batches(
            split,
            batch_size=batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            limit=config.limit,
        )
        step = jax.jit(make_step(build.apply(opened.model), objectives))
        steps = data.eval_steps(split, batch_size, config.limit)
        with progress.part(_show, enabled=jax.process_index() == 0) as show:
            metrics = evaluate(
                step,
                opened.params,
                batches,
                objectives,
                mesh,
                show=lambda done: show(done / steps, f"evaluated {done:,} of {steps:,} batches"),
            )
    metrics |= perplexity(metrics)
    for name, value in metrics.items():
        _show(f"  {name:<16} {value:>12,.4f}")
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "folder": opened.source,
        "step": opened.step,
        "averaged": opened.averaged,
        "split": config.split,
        "rows": rows,
        "precision": dtype,
        "data": settings,
        "objectives": goals,
        "metrics": metrics,
    }
    _append(Path(opened.source if saved else workdir) / FILE, record)


def make_step(apply: Callable, objectives: list[losses.Objective]) -> Callable:
    """`step(params, batch, rng) -> {metric: (sum, weight)}`, without dropout, to be jitted."""

    def eval_step(params, batch, rng):
        return losses.metrics(objectives, apply, params, batch, rng, train=False)

    return eval_step


def evaluate(
    step: Callable,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    objectives: list[losses.Objective],
    mesh: jax.sharding.Mesh,
    stop: Callable[[], bool] = lambda: False,
    show: Callable[[int], None] = lambda done: None,
) -> dict[str, float] | None:
    """Means over all examples, each counted once; None if `stop()` turned true on the way.

    `show` is told how many batches are done. Masks are a function of the row number, so every
    evaluation sees the same ones.
    """
    rng = jax.random.key(0)
    totals: dict[str, np.ndarray] = {}
    for done, batch in enumerate(sharding.to_device(batches, mesh), 1):
        if stop():
            return None
        add(totals, step(params, batch, rng))
        show(done)
    return losses.mean(totals, objectives)


def add(totals: dict[str, np.ndarray], found: Mapping[str, tuple[Any, Any]]) -> None:
    """Adds (sum, weight) pairs, on a device or not, in float64 on the host."""
    for name, pair in jax.device_get(found).items():
        totals[name] = totals.get(name, 0) + np.asarray(pair, np.float64)


def perplexity(metrics: Mapping[str, float]) -> dict[str, float]:
    """{"mlm/perplexity": e^loss} for a loss that is a mean over words."""
    return {
        f"{name.removesuffix('loss')}perplexity": float(np.exp(value))
        for name, value in metrics.items()
        if name.endswith("mlm/loss")
    }


def _settings(config: Any, saved: Any) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(data settings, objectives, batch size): what is given, else the run's, else the defaults."""
    given = {key: value for key, value in config.data.items() if value is not None}
    kept = saved.data.to_dict() if saved else {}
    if given.keys() & {"name", "train", "path"}:
        kept = {key: kept[key] for key in ROWS if key in kept}
    goals = config.objectives or (saved and saved.objectives)
    return (
        dataclasses.asdict(read(DataSettings, kept | given, "data")),
        goals.to_dict() if goals else {"mlm": {}},
        config.batch_size or (saved.batch_size if saved else 64),
    )


def _split(dataset: data.Dataset, name: str, opened: build.Opened) -> Any:
    if name not in dataset.splits:
        raise DataError(
            f"The data have no rows for config.split={name!r}. Set config.data.validation, or "
            "config.data.validation_fraction to the share of documents to measure on."
        )
    if dataset.vocab.size > opened.model.cfg.vocab_size:
        raise ConfigError(
            f"{opened.source}: the tokenizer has {dataset.vocab.size:,} ids, the model "
            f"{opened.model.cfg.vocab_size:,}: they do not belong together."
        )
    return dataset.splits[name]


def _show(text: str) -> None:
    if jax.process_index() == 0:
        print(text)


def _append(path: Path, record: Mapping[str, Any]) -> None:
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(logs.plain(record)) + "\n")
        _show(f"added to {path}")
