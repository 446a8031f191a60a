"""Multiple choice: which of several texts continues best (SWAG in Devlin et al. 2019, §4.4).

The examples are `config.data.format = "choices"`: each choice is a row of its own, beside what is
asked, and one linear head gives each a score. All examples have the same number of choices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.objectives import losses
from fmjax.objectives.classify import pooled_logits
from fmjax.params import randomness

TARGET = "choices"
INPUTS = ("input_ids", "segment_ids", "positions", "token_types")


def heads(labels: Sequence[str]) -> dict[str, int]:
    """The linear heads that the objective needs: {name: outputs}."""
    return {"choose": 1}


def loss_fn(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], *, pool: str = ""
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Cross-entropy in nats of the right choice, `labels` (B,), among K, and accuracy; empty rows
    weigh nothing."""
    return losses.classification(_logits(apply, params, batch, pool), batch)


def outputs(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], *, pool: str = ""
) -> dict[str, jax.Array]:
    """`probabilities` (B, K) of the choices."""
    return {"probabilities": jax.nn.softmax(_logits(apply, params, batch, pool), axis=-1)}


def each(found: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """True where the most probable one is right."""
    return {"accuracy": found["probabilities"].argmax(axis=1) == labels}


def describe(found: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """For each example the number of the choice, from 0, and the probability of each."""
    return [
        {"choice": int(row.argmax()), "probabilities": [float(p) for p in row]}
        for row in found["probabilities"]
    ]


def flat(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A batch of (B, K, T) as one of (B · K, T), each with a stream of dropout of its own."""
    many = batch["segment_ids"].shape[1]
    rows = {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in INPUTS}
    if batch["seeds"] is None:
        return rows | {"seeds": None}
    seeds = [randomness.fold(batch["seeds"], choice) for choice in range(many)]
    return rows | {"seeds": jnp.stack(seeds, axis=1).reshape(-1, 2)}  # (B · K, 2)


def _logits(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], pool: str
) -> Float[Array, "B K"]:
    rows = flat(batch)
    values = pooled_logits(apply, params, rows, "choose", pool, rows["seeds"])
    return values.reshape(batch["input_ids"].shape[:2])
