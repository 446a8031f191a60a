"""Classification of a text or a pair of texts (Devlin et al. 2019, §4.1).

The examples are `config.data.format = "classes"`, one class of several each, or "labels", any of
several each, for which every output is a yes or no of its own. The head has an output for each
label of the training split.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax.objectives import losses

SEVERAL = "labels"  # the target of examples with any number of labels
TARGET = ("classes", SEVERAL)
SCORES = ("f1", "matthews", "ece", "brier")


def heads(labels: Sequence[str]) -> dict[str, int]:
    """The linear heads that the objective needs: {name: outputs}."""
    return {"classify": len(labels)}


def loss_fn(
    apply: Callable,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    pool: str = "",
    target: str = "classes",
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Cross-entropy in nats of `labels` (B,), or its mean over each of (B, C), and accuracy: how
    often all of an example are right; empty rows weigh nothing."""
    logits = pooled_logits(apply, params, batch, "classify", pool, batch["seeds"])
    return (
        losses.each_label(logits, batch)
        if target == SEVERAL
        else losses.classification(logits, batch)
    )


def outputs(
    apply: Callable,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    pool: str = "",
    target: str = "classes",
) -> dict[str, jax.Array]:
    """`probabilities` (B, C) of the classes; of several labels also which are `chosen` (B, C)."""
    logits = pooled_logits(apply, params, batch, "classify", pool, batch["seeds"])
    if target == SEVERAL:
        return {"probabilities": jax.nn.sigmoid(logits), "chosen": (logits > 0).astype(jnp.int32)}
    return {"probabilities": jax.nn.softmax(logits, axis=-1)}


def score(found: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """The mean F1 of the classes and Matthews' correlation coefficient, over a whole split; and of
    the probabilities the expected calibration error (Guo et al. 2017, eq. 3) in 15 bins, and the
    Brier score: the mean squared distance from the class, from 0 to 2. Of several labels an example
    all but F1 are those of the single yes and no."""
    from sklearn import metrics

    if "chosen" in found:
        pairs = np.stack([1 - found["probabilities"].ravel(), found["probabilities"].ravel()], 1)
        single = score({"probabilities": pairs}, labels.ravel())
        how = dict(average="macro", zero_division=0.0)
        return single | {"f1": float(metrics.f1_score(labels, found["chosen"], **how))}
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
    """True where the most probable one is right, or all that are chosen of several."""
    if "chosen" in found:
        return {"accuracy": (found["chosen"] == labels).all(axis=1)}
    return {"accuracy": found["probabilities"].argmax(axis=1) == labels}


def describe(found: Mapping[str, np.ndarray], *, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each example the class chosen, or the list of those of several, and the probability of
    each."""
    each = [dict(zip(names, map(float, row), strict=True)) for row in found["probabilities"]]
    if "chosen" in found:
        chosen = [[names[i] for i in np.flatnonzero(row)] for row in found["chosen"]]
        return [{"labels": x, "probabilities": p} for x, p in zip(chosen, each, strict=True)]
    return [{"label": max(row, key=row.get), "probabilities": row} for row in each]


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
    hidden = apply(params, batch, method="encode")
    return apply(params, hidden, batch.get("segment_ids"), head, pool, seeds, method="classify")
