"""Sentence order prediction (ALBERT, Lan et al. 2020, §3.1): are two consecutive segments in order
or swapped?

Differs from `nsp` only in how the pairs are made (`config.data.pair = "sop"`) and in its head.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fmjax.objectives import losses
from fmjax.objectives.classify import pooled_logits

TARGET = "sop"


def heads(labels: Sequence[str]) -> dict[str, int]:
    """The linear heads that the objective needs: {name: outputs}."""
    return {"sop": 2}


def loss_fn(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The loss of `nsp.loss_fn`, for the order of two segments."""
    return losses.classification(pooled_logits(apply, params, batch, "sop"), batch)
