"""Metrics of the objectives over a whole split."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fmjax import objectives as losses
from fmjax.errors import NumericsError
from fmjax.objectives import losses as array_losses
from fmjax.params import sharding


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
            scores = losses.call_with_declared(
                objective.score, found_here, labels, rows=rows, **about
            )
            if not_finite(found_here).any():  # of which a comparison makes numbers all the same
                scores = dict.fromkeys(scores, float("nan"))
            found |= {f"{objective.name}/{name}": value for name, value in scores.items()}
    return found


def keeps(objectives: Iterable[losses.Objective]) -> bool:
    """True if an objective says something about single examples, so that `collect` has to keep the
    outputs."""
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
