"""Sequence to sequence: a target, each token from those before it and from the whole source.

(Sutskever et al. 2014; with encoder–decoders as T5's, Raffel et al. 2020.) The examples are
`config.data.format = "seq2seq"`. What stands before the first token of a target is the
token that the model begins with (`decoder_start_token_id`), else the padding, as T5 has it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fmjax.objectives.clm import judged

TARGET = "seq2seq"
VOCABULARY = DECODES = True


def loss_fn(
    apply: Callable,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    vocab: Any,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """As that of `clm`, a target being each token of `target_ids` (B, S) that is no padding."""
    source = apply(params, batch, method="encode")
    ids, segments = batch["target_ids"], batch["target_segment_ids"]
    start = vocab.pad_id if vocab.start_id is None else vocab.start_id
    states = apply(
        params,
        shifted(ids, batch["target_positions"], start),
        segments,
        batch["target_positions"],
        source,
        batch["segment_ids"],
        batch["seeds"],
        method="decode",
    )
    weights = (segments > 0).astype(jnp.float32)
    return judged(
        apply, params, states, ids, weights, vocab=vocab, z_loss=z_loss, smoothing=smoothing
    )


def shifted(ids: Int[Array, "B S"], positions: Int[Array, "B S"], before: int) -> Int[Array, "B S"]:
    """The token before each in its segment; `before` where there is none."""
    return jnp.where(positions > 0, jnp.pad(ids[:, :-1], ((0, 0), (1, 0))), before)
