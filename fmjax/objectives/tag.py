"""Tagging: a class for each word, such as the entities in a sentence (Devlin et al. 2019, §5.3).

The examples are `config.data.format = "tags"`. A word is classified at the first of its pieces; the
others, which have no label, count nowhere.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.objectives import losses

TARGET = "tags"
SCORES = ("precision", "recall", "f1")

NONE = -1  # of outputs: no tag stands here
UNKNOWN = -2  # of labels, and less: that of word UNKNOWN - label is not known
ENTITIES = r"O|[BIES]-.+"  # tags that say where an entity begins and continues


def heads(labels: Sequence[str]) -> dict[str, int]:
    """The linear heads that the objective needs: {name: outputs}."""
    return {"tag": len(labels)}


def loss_fn(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Cross-entropy in nats of `labels` (B, T) where they are not negative, and accuracy."""
    logits, labels = _logits(apply, params, batch), batch["labels"]
    # An empty row that fills the last batch has zeros for labels, too.
    weights = ((labels >= 0) & (batch["segment_ids"] > 0)).astype(jnp.float32)
    labels = jnp.maximum(labels, 0)
    nats = losses.cross_entropy(logits, labels)
    right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    weight = jnp.sum(weights)
    return {
        "loss": (jnp.sum(nats * weights), weight),
        "accuracy": (jnp.sum(right * weights), weight),
    }


def outputs(apply: Callable, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """(B, T) at the first piece of each word, -1 elsewhere: `tags`, its class, and where its label
    is not known `words`, its number; `logits`, the largest, 0 elsewhere."""
    labels, logits = batch["labels"], _logits(apply, params, batch)
    largest = jnp.max(logits, axis=-1)  # NaN where any is
    return {
        "tags": jnp.where(labels != NONE, jnp.argmax(logits, axis=-1), NONE),
        "logits": jnp.where(labels != NONE, largest, 0),
        "words": jnp.where(labels <= UNKNOWN, UNKNOWN - labels, NONE),
    }


def score(
    found: Mapping[str, np.ndarray], labels: np.ndarray, *, names: Sequence[str]
) -> dict[str, float]:
    """Precision, recall and F1 of whole entities over a whole split, as conlleval counts them.

    What is beyond the end of a truncated row is neither found nor missed. NaN where the tags are
    not those of entities.
    """
    from seqeval import metrics

    if not all(re.fullmatch(ENTITIES, name) for name in names):
        return dict.fromkeys(SCORES, float("nan"))
    known = labels >= 0
    right, chosen = (_words(x, known, names) for x in (labels, found["tags"]))
    how = dict(average="micro", zero_division=0)
    return {name: float(getattr(metrics, f"{name}_score")(right, chosen, **how)) for name in SCORES}


def describe(
    found: Mapping[str, np.ndarray], *, names: Sequence[str], words: Sequence[int]
) -> list[dict[str, Any]]:
    """For each example, which has so many `words`, their tags: None for a word that the model does
    not see, since the tokenizer drops it or it is beyond the end of a truncated row."""
    described = []
    for tags, numbers, count in zip(found["tags"], found["words"], words, strict=True):
        seen = {int(i): names[tag] for tag, i in zip(tags, numbers, strict=True) if i >= 0}
        described.append({"tags": [seen.get(i) for i in range(count)]})
    return described


def _words(tags: np.ndarray, known: np.ndarray, names: Sequence[str]) -> list[list[str]]:
    """The names of `tags` [n, T] where they are known: a list a row."""
    return [[names[i] for i in row[here]] for row, here in zip(tags, known, strict=True)]


def _logits(apply: Callable, params: Any, batch: Mapping[str, jax.Array]) -> Float[Array, "B T C"]:
    hidden = apply(params, batch, method="encode")
    return apply(params, hidden, "tag", batch["seeds"], method="project")
