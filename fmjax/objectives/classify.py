"""Classification of a text or a pair of texts (Devlin et al. 2019, §4.1): one class of several.

The examples are `config.data.format = "classes"`; the head has an output for each label of the
training split.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fmjax import losses

TARGET = "classes"
SCORES = ("f1", "matthews", "ece", "brier")


def heads(labels: Sequence[str]) -> dict[str, int]:
    """The linear heads that the objective needs: {name: outputs}."""
    return {"classify": len(labels)}


def loss_fn(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], *, pool: str = ""
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Cross-entropy in nats of `labels` (B,), and accuracy; empty rows weigh nothing."""
    logits = pooled_logits(apply, params, batch, "classify", pool, batch["seeds"])
    return losses.classification(logits, batch)


def outputs(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], *, pool: str = ""
) -> dict[str, jax.Array]:
    """`probabilities` (B, C) of the classes."""
    logits = pooled_logits(apply, params, batch, "classify", pool, batch["seeds"])
    return {"probabilities": jax.nn.softmax(logits, axis=-1)}


def score(found: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """The mean F1 of the classes and Matthews' correlation coefficient, over a whole split; and of
    the probabilities the expected calibration error (Guo et al. 2017, eq. 3) in 15 bins, and the
    Brier score: the mean squared distance from the class, from 0 to 2."""
    from sklearn import metrics

    told = found["probabilities"]
    chosen, sure = told.argmax(axis=1), told.max(axis=1)
    bins = np.minimum(np.nan_to_num(sure) * 15, 14).astype(int)
    # Of each bin the sum of how sure minus how right.
    excess = np.bincount(bins, weights=sure - (chosen == labels), minlength=15)
    missed = told - (np.arange(told.shape[1]) == labels[:, None])
    return {
        "ece": float(np.abs(excess).sum() / len(labels)),
        "brier": float(np.square(missed).sum(axis=1).mean()),
        "f1": metrics.f1_score(labels, chosen, average="macro", zero_division=0.0),
        "matthews": metrics.matthews_corrcoef(labels, chosen),
    }


def each(found: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """Whether the most probable one is right."""
    return {"accuracy": found["probabilities"].argmax(axis=1) == labels}


def describe(found: Mapping[str, np.ndarray], *, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each example the class chosen, and the probability of each."""
    return [
        {
            "label": names[int(row.argmax())],
            "probabilities": {name: float(p) for name, p in zip(names, row, strict=True)},
        }
        for row in found["probabilities"]
    ]


def pooled_logits(
    apply: Callable,
    params: Any,
    batch: Mapping[str, jax.Array],
    head: str,
    pool: str = "",
    seeds: Any = None,
) -> jax.Array:
    """The outputs (B, C) of a linear `head` on what stands for the whole sequence; `seeds` turn
    dropout before the head on."""
    names = ("input_ids", "segment_ids", "positions", "token_types", "seeds")
    hidden = apply(params, *(batch[name] for name in names), method="encode")
    return apply(params, hidden, batch["segment_ids"], head, pool, seeds, method="classify")
