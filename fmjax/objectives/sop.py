"""Sentence order prediction (ALBERT, Lan et al. 2020, §3.1): are two consecutive segments in order
or swapped?

Differs from `nsp` only in how the pairs are made (`config.data.pair = "sop"`) and in its head.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from fmjax.objectives import nsp


def loss_fn(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array], *, pair: str, head: str = "sop"
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What `nsp.loss_fn` gives, of the order of two segments."""
    nsp.check_pairs("sop", pair)
    return nsp.pair_loss(apply, params, batch, head)
