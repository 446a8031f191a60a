"""Logits of every token of a text."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import build
from fmjax.checkpoints import pretrained
from fmjax.data import vocabulary
from fmjax.errors import ConfigError
from fmjax.evaluation.fill_in import room

MULTIPLE = 64  # of the tokens in a row, so that programs are few


def of_texts(opened: pretrained.Opened, tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """float32 [T, V] for each text, of T tokens with those around it: of a decoder for the token
    after each, of an encoder for each.

    Raises ConfigError for a model without a trained output, for an encoder–decoder, and for a text
    of more tokens than the model takes or with one that it has not.
    """
    opened.require_output()
    model, apply = opened.model, build.apply(opened.model)
    if model.decodes:
        raise ConfigError(
            f"{opened.source!r} is an encoder–decoder, whose logits are of a source and a target: "
            "generate its texts instead."
        )
    first, last = vocabulary.around(tokenizer)
    bare = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    rows = [[*first, *ids, *(() if model.causal else last)] for ids in bare]

    @jax.jit
    def logits(params, input_ids, segment_ids):
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        arrays = input_ids, segment_ids, positions, jnp.zeros_like(input_ids)
        hidden = apply(params, *arrays, method="encode")
        return apply(params, hidden, method="logits")

    found = []
    for text, ids in zip(texts, rows, strict=True):
        if problem := vocabulary.beyond(ids, model.cfg.vocab_size):
            raise ConfigError(f"the text cannot be read: {problem}.")
        if not 0 < len(ids) <= room(model):
            raise ConfigError(
                f"a text has {len(ids):,} tokens, the model takes 1 to {room(model):,}: "
                f"{text[:60] + '…'!r}"
            )
        width = min(-(-len(ids) // MULTIPLE) * MULTIPLE, room(model))
        padded = np.zeros((2, jax.device_count(), width), np.int32)
        padded[0, :, : len(ids)], padded[1, :, : len(ids)] = ids, 1
        out = logits(opened.params, *padded)
        found.append(np.asarray(out[0, : len(ids)], np.float32))
    return found
