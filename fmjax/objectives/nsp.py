"""Next sentence prediction (Devlin et al. 2019, §3.1): does B follow A, or come from another
document?

The pairs themselves are made by `fmjax.data` (`config.data.format = "pairs"`, `config.data.pair =
"nsp"`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fmjax.objectives import losses
from fmjax.objectives.classify import pooled_logits

TARGET = "nsp"


def heads(labels: Sequence[str]) -> dict[str, int]:
    """The linear heads that the objective needs: {name: outputs}."""
    return {"nsp": 2}


def loss_fn(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Two-class cross-entropy in nats of `labels` (B,), and accuracy; empty rows weigh nothing."""
    return losses.classification(pooled_logits(apply, params, batch, "nsp"), batch)
