"""Regression on a text or a pair of texts: one number (STS-B in Devlin et al. 2019, §4.1).

The examples are `config.data.format = "values"`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax.objectives import losses
from fmjax.objectives.classify import pooled_logits

TARGET = "values"
SCORES = ("pearson", "spearman")


def heads(labels: Sequence[str]) -> dict[str, int]:
    """The linear heads that the objective needs: {name: outputs}."""
    return {"regress": 1}


def loss_fn(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], *, pool: str = ""
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The squared error against `labels` (B,); empty rows weigh nothing."""
    value = pooled_logits(apply, params, batch, "regress", pool, batch["seeds"])[:, 0]
    weights = losses.real_rows(batch)
    return {"loss": (jnp.sum(jnp.square(value - batch["labels"]) * weights), jnp.sum(weights))}


def outputs(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], *, pool: str = ""
) -> dict[str, jax.Array]:
    """`value` (B,)."""
    return {"value": pooled_logits(apply, params, batch, "regress", pool, batch["seeds"])[:, 0]}


def score(found: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation with the labels, over a whole split; NaN where either
    side is constant."""
    from scipy import stats

    value = found["value"]
    if len(value) < 2 or np.ptp(value) == 0 or np.ptp(labels) == 0:
        return dict.fromkeys(SCORES, float("nan"))
    return {
        "pearson": float(stats.pearsonr(value, labels).statistic),
        "spearman": float(stats.spearmanr(value, labels).statistic),
    }


def each(found: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """The squared error."""
    return {"loss": np.square(found["value"] - labels)}


def describe(found: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """For each example its value."""
    return [{"value": float(value)} for value in found["value"]]
