"""Outputs of a fine-tuned model for each record of a file: labels, probabilities, values."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fmjax import build, data, objectives
from fmjax.checkpoints import pretrained
from fmjax.data import sources
from fmjax.data.documents import documents_of
from fmjax.data.settings import DataSettings, read
from fmjax.errors import ConfigError
from fmjax.evaluation import eval_loop, measurement
from fmjax.objectives import losses
from fmjax.params import sharding

Record = tuple[dict[str, Any], dict[str, Any]]  # (the columns that the model reads, its output)


class Predictor:
    """Predictions of an opened model for the records of `config.data.train`.

    `config` has the keys of configs/predict.py; records need no label. Raises ConfigError and
    DataError where the model and the records do not fit.
    """

    def __init__(self, config: Any, opened: pretrained.Opened, mesh: jax.sharding.Mesh):
        settings, goals, self.batch_size = measurement.settings_of(config, opened)
        settings |= {"label": "", "validation": "", "validation_fraction": 0}
        if not (settings["train"] or settings["path"]):
            raise ConfigError("config.data.train is empty: set it to the file to predict on.")
        if settings["long"] == "drop":
            raise ConfigError("config.data.long='drop' leaves records out: set it to truncate.")
        if settings["format"] in ("classes", "labels", "tags") and not settings["classes"]:
            settings["classes"] = opened.output_names
        sharding.check_batch(mesh, self.batch_size)
        build.check_rows(opened.model, settings)
        self.opened, self.mesh, self.settings = opened, mesh, settings
        self.dataset = opened.prepare(settings)
        self.split = measurement.split_of(self.dataset, "train")
        measurement.check_labels(self.dataset, opened, goals)
        self.objectives = objectives.build(goals, self.dataset.facts)
        if not any(objective.describe for objective in self.objectives):
            raise ConfigError(
                f"The objectives {list(goals)} of {opened.source!r} say nothing of single records."
            )

    def __call__(self) -> list[Record]:
        """The records, in their order. Raises NumericsError for outputs that are not finite."""
        arguments = self.objectives, self.split, self.batch_size, self.mesh
        outputs, rows = predictions(self.opened, *arguments)
        documents = documents_of(self.settings)
        alone = len(documents) == len(rows)  # else windows of the contexts of questions
        place = lambda i: documents[i].where if alone else f"row {rows[i]:,}"
        eval_loop.check_finite(outputs, self.opened.source, place)
        settings = read(DataSettings, self.settings, "data")
        columns = settings.column_names
        words = [len(document.fields[columns[0]]) for document in documents]
        about = dict(names=self.dataset.labels, split=self.split, rows=rows, words=words)
        described = {
            one.name: objectives.call_with_declared(one.describe, outputs[one.name], **about)
            for one in self.objectives
            if one.describe
        }
        return _records(documents, described)


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
    documents: list[sources.Document], described: Mapping[str, list[dict]]
) -> list[Record]:
    """(columns, output) of each record; the outputs of a single objective are not named by it."""
    records = []
    for document, *outputs in zip(documents, *described.values(), strict=True):
        output = outputs[0] if len(outputs) == 1 else dict(zip(described, outputs, strict=True))
        records.append((document.fields, output))
    return records
