"""Predictions of a fine-tuned model for each record of a file: labels, probabilities, values."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import build, data, objectives
from fmjax.checkpoints import pretrained
from fmjax.data import sources
from fmjax.data.documents import documents_of
from fmjax.distributed import launch
from fmjax.errors import ConfigError
from fmjax.evaluation import eval_loop, measurement
from fmjax.evaluation.readable import cut, readable
from fmjax.io import metrics_log
from fmjax.objectives import losses
from fmjax.params import sharding

SHOWN = 5  # records that the terminal gets


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: a line of JSON for each record of `config.data.train`, in their order.

    A line holds the columns that the model reads, and what each objective of the run says. Records
    need no label. Written to `config.output`, else predictions.jsonl in `workdir`.
    """
    with launch.start(config) as mesh:
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        settings, goals, batch_size = measurement.settings_of(config, opened)
        settings |= {"label": "", "validation": "", "validation_fraction": 0}
        if not (settings["train"] or settings["path"]):
            raise ConfigError("config.data.train is empty: set it to the file to predict on.")
        if settings["long"] == "drop":
            raise ConfigError("config.data.long='drop' leaves records out: set it to truncate.")
        sharding.check_batch(mesh, batch_size)
        build.check_rows(opened.model, settings)
        dataset = opened.prepare(settings)
        split = measurement.split_of(dataset, "train")
        measurement.check_labels(dataset, opened, goals)
        built = objectives.build(goals, target=dataset.target, vocab=dataset.vocab)
        if not any(objective.describe for objective in built):
            raise ConfigError(
                f"The objectives {list(goals)} of {config.folder!r} say nothing of single records."
            )
        if dry_run:
            return
        outputs, rows = predictions(opened, built, split, batch_size, mesh)
        documents = documents_of(settings)
        alone = len(documents) == len(rows)  # else windows of the contexts of questions
        place = lambda i: documents[i].where if alone else f"row {rows[i]:,}"
        eval_loop.check_finite(outputs, opened.source, place)
    if jax.process_index() != 0:
        return
    columns = data.settings.read(data.settings.DataSettings, settings, "data").column_names
    words = [len(document.fields[columns[0]]) for document in documents]
    about = dict(names=dataset.labels, split=split, rows=rows, words=words)
    told = {
        o.name: objectives.call_with_declared(o.describe, outputs[o.name], **about)
        for o in built
        if o.describe
    }
    path = Path(config.output or Path(workdir) / "predictions.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    records = _records(documents, told)
    with path.open("w", encoding="utf-8") as file:
        for fields, said in records:
            file.write(json.dumps(metrics_log.plain(fields | said), ensure_ascii=False) + "\n")
    print(f"\n{opened}")
    for fields, said in records[:SHOWN]:
        texts = " | ".join(cut(str(value)) for value in fields.values())
        print(f"  {texts}\n    {readable(said)}")
    print(f"{len(records):,} predictions written to {path}")


def predictions(
    opened: pretrained.Opened,
    built: list[objectives.Objective],
    split: Any,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> tuple[dict[str, dict[str, Any]], np.ndarray]:
    """({objective: outputs}, numbers of the rows) of all rows of a split, in their order."""
    step = jax.jit(make_step(build.apply(opened.model), built))
    batches = data.eval_batches(
        split,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    kept = [
        eval_loop.on_host(step(opened.params, batch)) for batch in sharding.to_device(batches, mesh)
    ]
    outputs, _, rows = eval_loop.in_order(kept)
    return outputs, rows


def make_step(apply: Callable, built: list[objectives.Objective]) -> Callable:
    """`step(params, batch) -> {objective: outputs}`, with which rows they are of, to be jitted."""

    def step(params: Any, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        rows = batch["index"], losses.real_rows(batch) > 0, None
        return {"rows": rows, **objectives.outputs_of(built, apply, params, batch)}

    return step


def _records(
    documents: list[sources.Document], told: Mapping[str, list[dict]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(columns, what was told) of each record; one objective's words stand by themselves."""
    records = []
    for document, *words in zip(documents, *told.values(), strict=True):
        said = words[0] if len(words) == 1 else dict(zip(told, words, strict=True))
        records.append((document.fields, said))
    return records
