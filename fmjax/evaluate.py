"""Evaluation: an objective's metrics over a whole split, and the task that runs it on a folder."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from fmjax import objectives as losses
from fmjax import sharding


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
) -> dict[str, float] | None:
    """Means over all examples, each counted once; None if `stop()` turned true on the way.

    Masks are a function of the row number, so every evaluation sees the same ones.
    """
    rng = jax.random.key(0)
    totals: dict[str, np.ndarray] = {}
    for batch in sharding.to_device(batches, mesh):
        if stop():
            return None
        add(totals, step(params, batch, rng))
    return losses.mean(totals, objectives)


def add(totals: dict[str, np.ndarray], found: losses.Metrics) -> None:
    """Adds (sum, weight) pairs in float64 on the host."""
    for name, pair in jax.device_get(found).items():
        totals[name] = totals.get(name, 0) + np.asarray(pair, np.float64)
