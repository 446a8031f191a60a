"""Causal language modelling: each token from those before it in its own document.

(GPT-2, Radford et al. 2019, §2.) The first token of each piece is no target, as nothing is before
it: with `config.data.frame="document"` that is the one that begins a document, or the one that the
piece before has ended with. Of conversations (`config.data.format="chat"`) only what the assistant
says is a target: where a batch has a `loss_mask`, the tokens that it marks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmjax.objectives import chunked_cross_entropy

VOCABULARY = CAUSAL = True


def loss_fn(
    apply: Callable,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    vocab: Any,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Cross-entropy in nats a target, accuracy, and where the tokenizer's tokens are the text
    itself bits a byte.

    `z_loss` and `smoothing` as in `fmjax.objectives.chunked_cross_entropy`; with them, and with a
    model of experts, "nats" is the cross-entropy, and the loss has what they add. Of a model of
    experts also what its routers say (`models.experts.report`).
    """
    hidden, routing = apply(params, batch, method="encode_routed")
    how = dict(vocab=vocab, z_loss=z_loss, smoothing=smoothing, routing=routing)
    return judged(apply, params, hidden, *targets(batch), **how)


def judged(
    apply: Callable,
    params: Any,
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    vocab: Any,
    z_loss: float,
    smoothing: float,
    routing: Any = None,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The metrics of what the vocabulary makes of `hidden`, against the labels of weight 1."""
    how = dict(z_loss=z_loss, smoothing=smoothing)
    sums = chunked_cross_entropy.of(apply, params, hidden, labels, weights, **how)
    weight = jnp.sum(weights)
    found = {"loss": (sums.loss, weight), "accuracy": (sums.right, weight)}
    if routing:
        found["loss"] = sums.loss + weight * routing.loss, weight
        found |= routing.metrics
    if z_loss or smoothing or routing:
        found["nats"] = sums.nats, weight
    if vocab.bytes is not None:
        sizes = jnp.asarray(vocab.bytes)[labels].astype(jnp.float32)
        found["bits_per_byte"] = sums.nats / np.float32(np.log(2)), jnp.sum(sizes * weights)
    return found


def targets(
    batch: Mapping[str, jax.Array],
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """(the token after each, 1.0 where that is of the same document, and one to learn)."""
    ahead = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
    segments = batch["segment_ids"]
    same = (ahead(segments) == segments) & (segments > 0)
    if "loss_mask" in batch:
        same &= ahead(batch["loss_mask"]) > 0
    return ahead(batch["input_ids"]), same.astype(jnp.float32)
