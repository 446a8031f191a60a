"""Prefix language modelling: a document's beginning is read in both directions, the rest predicted.

(Raffel et al. 2020, §3.2.1; as one of several masks in UniLM, Dong et al. 2019.) Each document of a
row is cut at a place of its own, which any of those between its tokens is equally likely to be. The
tokens before it are seen by all of their document, in front of them or after; the loss is on those
after it. Where the cut falls is a pure function of (seed, step, example): see
`fmjax.params.randomness`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmjax.objectives import clm, documents
from fmjax.params import randomness

VOCABULARY = CAUSAL = PREFIX = True


def prepare(
    batch: Mapping[str, jax.Array], seeds: randomness.Seeds, *, rate: float = 1.0
) -> dict[str, jax.Array]:
    """Chooses the prefixes: `token_types` (B, T) 1 in them, and `loss_mask` (B, T) 0 there, else as
    it was. Of the rows a share of `rate` has prefixes; in the others all is predicted."""
    segments, time = batch["segment_ids"], batch["segment_ids"].shape[1]
    draws = randomness.uniform(randomness.named(seeds, "cut"), (time,))
    chosen = randomness.bernoulli(randomness.named(seeds, "rate"), rate, (1,))
    length = documents.last(segments) - documents.begin(segments) + 1  # of the token's document
    draw = jnp.take_along_axis(draws, jnp.maximum(segments - 1, 0), axis=1)
    cut = 1 + jnp.floor(draw * (length - 1)).astype(jnp.int32)  # 1 … length - 1
    prefix = (segments > 0) & (batch["positions"] < cut) & chosen
    asked = batch.get("loss_mask", jnp.ones_like(segments))
    return {
        **batch,
        "token_types": prefix.astype(batch["token_types"].dtype),
        "loss_mask": jnp.where(prefix, 0, asked),
    }


def loss_fn(
    apply: Callable,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    vocab: Any,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The loss of `clm`, of the tokens after the prefixes."""
    return clm.loss_fn(apply, params, batch, vocab=vocab, z_loss=z_loss, smoothing=smoothing)
