"""The metrics of an opened model on the rows that a config names."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fmjax import build, data
from fmjax import objectives as losses
from fmjax.checkpoints import pretrained
from fmjax.data.settings import ALONE, ROWS_OF_TASK
from fmjax.errors import ConfigError, DataError, NumericsError
from fmjax.evaluation.eval_loop import (
    check_finite,
    collect,
    in_order,
    keeps,
    make_step,
    measured,
)
from fmjax.models import AnyModel
from fmjax.objectives import requirements
from fmjax.params import sharding

# A new source replaces all that names the run's; only these say how rows are made of documents.
ROWS = (
    *("seq_len", "target_len", "source_prefix", "pack", "format", "pair", "long", "frame", "room"),
    *("template", "stride", "columns", "label", "cache", "workers"),
)


class Measure:
    """The objectives and rows that an opened model is measured on: called with a model and its
    stored parameters it gives the metrics.

    Of `config` are read data, objectives, batch_size, split and limit, as in configs/evaluate.py.
    With `alone` texts are in rows of their own, as a prompt has to be before each. Raises
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
        build.check_facts(opened.model, self.dataset.facts)
        self.split = split_of(self.dataset, config.split)
        check_labels(self.dataset, opened, self.goals)
        self.rows = min(len(self.split), self.limit * self.batch_size or len(self.split))
        self.steps = data.eval_steps(self.split, self.batch_size, self.limit)
        self.objectives = losses.build(self.goals, self.dataset.facts)

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


def settings_of(
    config: Any, opened: pretrained.Opened
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(data settings, objectives, batch size): what is given, else the run's, else what the heads
    of the model are for, else the defaults."""
    saved = opened.config
    heads = [] if saved else opened.heads
    given = {key: value for key, value in config.data.items() if value is not None}
    if opened.labels and not given.get("classes"):
        given["classes"] = opened.labels  # what its outputs mean, whichever labels the data have
    kept = saved.data.to_dict() if saved else {}
    for name in heads:
        kept |= ROWS_OF_TASK[name]
    if given.keys() & {"name", "train", "path"}:
        kept = {key: kept[key] for key in ROWS if key in kept}
    goals = config.objectives or (saved and saved.objectives)
    settings = kept | given
    if opened.several and settings.get("format") == "classes":
        settings["format"] = "labels"  # as its outputs are read, whether there are labels or not
    default = "clm" if opened.model.causal else "mlm"
    return (
        data.complete(settings),
        goals.to_dict() if goals else {name: {} for name in heads or [default]},
        config.batch_size or (saved.batch_size if saved else 64),
    )


def check_labels(
    dataset: data.Dataset, opened: pretrained.Opened, goals: Mapping[str, Any]
) -> None:
    """Raise ConfigError for heads that are not trained, or whose outputs are not as many as the
    names."""
    for name in goals:
        if requirements.vocabulary({name: goals[name]}):
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
