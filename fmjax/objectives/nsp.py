"""Next sentence prediction (Devlin et al. 2019, §3.1): does B follow A, or come from another
document?

The pairs themselves are made by `fmjax.data` (`config.data.format = "pairs"`, `config.data.pair =
"nsp"`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmjax.errors import ConfigError


def loss_fn(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], *, head: str = "nsp"
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Two-class cross-entropy in nats of `pair_label` (B,), and accuracy; empty rows weigh
    nothing."""
    if "pair_label" not in batch:
        raise ConfigError(
            f"The objective {head!r} needs sentence pairs: set config.data.format=pairs."
        )
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
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    right = (jnp.argmax(logits, axis=1) == labels).astype(jnp.float32)
    weight = jnp.sum(weights)
    return {
        "loss": (jnp.sum(nats * weights), weight),
        "accuracy": (jnp.sum(right * weights), weight),
    }
