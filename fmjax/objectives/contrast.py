"""Sentence embeddings from pairs: the texts of an example close, those of others apart (InfoNCE).

The examples are `config.data.format = "texts"`: a text and one that belongs to it, whose in-batch
negatives are the second texts of all other examples (van den Oord et al. 2018, §2.3); a third
column is a hard negative, of all examples. A single column is SimCSE (Gao et al. 2021, §3): the
text belongs to itself, under another dropout.

The loss of an example so depends on the whole batch: on its size, and, unlike that of other
objectives, not on the example alone. Embeddings of the whole batch are compared whatever the number
of microbatches, devices and processes, which changes nothing. A validation loss is comparable at
one batch size only; the scores do not know of batches.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.errors import ConfigError
from fmjax.models import text_pooling
from fmjax.objectives import losses
from fmjax.objectives.choose import INPUTS, flat

TARGET = "texts"
SCORES = ("retrieval", "mrr")

BLOCK = 1024  # texts that are compared with all others at once


def check(*, columns: int, dropout: float) -> None:
    """Raise ConfigError if a text would be compared with itself and nothing tells the two apart."""
    if columns == 1 and not dropout:
        raise ConfigError(
            "config.objectives.contrast with a single column of texts compares each with itself "
            "under another dropout (SimCSE), but config.model.dropout is 0: set it to 0.1, or give "
            "pairs, config.data.columns=a,b."
        )


def features(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], *, pool: str = "mean"
) -> Float[Array, "B K D"]:
    """Embeddings of length 1 of the texts of each example; a single text is embedded twice."""
    return _embeddings(apply, params, _several(batch, 2), pool)


def compare(
    found: Float[Array, "B K D"], batch: Mapping[str, jax.Array], *, temperature: float = 0.05
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Cross-entropy in nats of the text that belongs to each first one, among all of the batch, by
    cosine similarity over `temperature`; and accuracy. Empty rows are nobody's negatives, and
    weigh nothing."""
    real = losses.real_rows(batch)
    others = found[:, 1:].swapaxes(0, 1).reshape(-1, found.shape[-1])  # second texts, then third
    similar = jnp.einsum("bd,nd->bn", found[:, 0], others, precision=jax.lax.Precision.HIGHEST)
    absent = jnp.tile(real, found.shape[1] - 1) == 0
    logits = jnp.where(absent[None], jnp.float32(-1e30), similar / temperature)
    return losses.classification(logits, {**batch, "labels": jnp.arange(len(real))})


def outputs(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], *, pool: str = "mean"
) -> dict[str, jax.Array]:
    """`embedding`, of length 1: (B, D), or (B, K, D) of the texts of examples with K > 1."""
    found = _embeddings(apply, params, _several(batch, 1), pool)
    one = batch["segment_ids"].ndim == 2
    return {"embedding": found[:, 0] if one else found}


def score(found: Mapping[str, np.ndarray], labels: np.ndarray | None) -> dict[str, float]:
    """The share of texts whose nearest of all second texts of a split is the right one, and the
    mean reciprocal rank; NaN for single texts.

    Texts that are equally near count as in any order: of n the right one is the nearest once in n
    times, and its rank is their mean.
    """
    embedding = found["embedding"]
    if embedding.ndim == 2:
        return dict.fromkeys(SCORES, float("nan"))
    first, second = embedding[:, 0], embedding[:, 1]
    nearest, reciprocal = [], []
    for start in range(0, len(first), BLOCK):
        similar = first[start : start + BLOCK] @ second.T
        right = similar[np.arange(len(similar)), np.arange(start, start + len(similar))]
        nearer = np.sum(similar > right[:, None], axis=1)
        equal = np.sum(similar == right[:, None], axis=1)  # itself among them
        nearest.append((nearer == 0) / equal)
        reciprocal.append(1 / (nearer + (1 + equal) / 2))
    mean = lambda parts: float(np.mean(np.concatenate(parts)))
    return {"retrieval": mean(nearest), "mrr": mean(reciprocal)}


def describe(found: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """For each example the embedding of its text, or one for each of its texts."""
    return [{"embedding": row.tolist()} for row in found["embedding"]]


def _several(batch: Mapping[str, jax.Array], times: int) -> dict[str, jax.Array]:
    """A batch of single texts as one of examples that hold theirs `times` times; others as they
    are."""
    if batch["segment_ids"].ndim == 3:
        return dict(batch)
    return dict(batch) | {name: jnp.stack([batch[name]] * times, axis=1) for name in INPUTS}


def _embeddings(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], pool: str
) -> Float[Array, "B K D"]:
    """The mean of the tokens of each text, or its first token, with length 1."""
    rows = flat(batch)
    hidden = apply(params, rows, method="encode")
    whole = text_pooling.pooled(hidden, rows["segment_ids"], pool)
    square = jnp.sum(jnp.square(whole), axis=-1, keepdims=True)
    # An empty row is zero: its gradient must not be infinity times zero.
    whole = whole * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
    return whole.reshape(*batch["input_ids"].shape[:2], -1)
