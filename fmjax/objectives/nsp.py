"""Next sentence prediction (Devlin et al. 2019, §3.1): does B follow A, or come from another
document?

The pairs themselves are made by `fmjax.data` (`config.data.format = "pairs"`, `config.data.pair =
"nsp"`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmjax import losses
from fmjax.errors import ConfigError


def loss_fn(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], *, pair: str, head: str = "nsp"
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Two-class cross-entropy in nats of `pair_label` (B,), and accuracy; empty rows weigh
    nothing.

    Raises ConfigError where the data are not pairs of this kind: `pair` is how they were made, ""
    for no pairs.
    """
    check_pairs("nsp", pair)
    return pair_loss(apply, params, batch, head)


def check_pairs(objective: str, pair: str) -> None:
    """Refuses labels that mean something else than the objective says."""
    if pair != objective:
        made = f"pairs made for {pair!r}" if pair else "no pairs"
        raise ConfigError(
            f"The objective {objective!r} cannot use these data, which are {made}: set "
            f"config.data.format=pairs and config.data.pair={objective}."
        )


def pair_loss(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], head: str
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The metrics of a two-class `head` against `pair_label`."""
    hidden = apply(
        params,
        batch["input_ids"],
        batch["segment_ids"],
        batch["positions"],
        batch["token_types"],
        batch["seeds"],
        method="encode",
    )
    logits = apply(params, hidden, head, method="classify")  # (B, 2)
    labels = batch["pair_label"]
    weights = jnp.any(batch["segment_ids"] > 0, axis=1).astype(jnp.float32)
    nats = losses.cross_entropy(logits, labels)
    right = (jnp.argmax(logits, axis=1) == labels).astype(jnp.float32)
    weight = jnp.sum(weights)
    return {
        "loss": (jnp.sum(nats * weights), weight),
        "accuracy": (jnp.sum(right * weights), weight),
    }
