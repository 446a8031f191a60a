"""Evaluation: an objective's metrics over a whole split, and the task that runs it on a folder."""

import os
import time
from typing import Any

import jax

from fmjax.checkpoints import pretrained
from fmjax.distributed import launch
from fmjax.evaluation.eval_loop import perplexity
from fmjax.evaluation.measurement import Measure, _show
from fmjax.evaluation.results_log import ResultsLog
from fmjax.io import progress

FILE = "evaluation.jsonl"


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: measures the model of `config.folder` on `config.split` of any data.

    Where the config has None, a run folder is measured as while it was trained, any other as
    configs/mlm.py trains. Adds a line to evaluation.jsonl in the run folder, else in `workdir`.
    """
    with launch.start(config, dry_run=dry_run) as mesh:
        log = ResultsLog(config.folder, workdir, FILE)
        opened = pretrained.open_folder(
            config.folder, mesh, config.precision, config.step, texts=False
        )
        measure = Measure(config, opened, mesh)
        settings, split = measure.settings, measure.split
        keys = "train", "path", "name", "format"
        source = next(settings[key] for key in keys if settings.get(key))
        dtype, rows = opened.model.cfg.dtype, f"{measure.rows:,} rows of {split.row_size}"
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
    log.append(record)
