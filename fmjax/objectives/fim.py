"""Fill in the middle: documents cut in three and put in another order (Bavarian et al. 2022, §3).

Of the documents a share of `rate` is cut at two places between its tokens, each equally likely, and
becomes (PSM)

    <prefix> what is before <suffix> what is after <middle> what is between

or, a share of `spm` of these, with what is before in front of what is between (SPM, in the form
that is trained beside PSM, appendix D):

    <prefix> <suffix> what is after <middle> what is before, what is between

The three marks are the tokenizer's. What begins and ends a document stays there, so that the end of
the middle is learnt too. A document grows by three tokens, for which its row has room after it
(`config.data.room`), and loses none; other documents of the row stay as they are. The loss is that
of `clm`, on all of it. What is cut and where is a pure function of (seed, step, example).

The cuts are between tokens, not between characters as in the paper: a model that has learnt from
them continues best from where a token ends.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmjax.errors import ConfigError
from fmjax.objectives import clm
from fmjax.params import randomness

VOCABULARY = CAUSAL = FIM = True
ROOM = 3  # tokens that a document grows by


def prepare(
    batch: Mapping[str, jax.Array],
    seeds: randomness.Seeds,
    *,
    vocab: Any,
    rate: float = 0.5,
    spm: float = 0.5,
) -> dict[str, jax.Array]:
    """Cuts documents and puts their parts in another order: `input_ids`, `segment_ids`, `positions`
    (B, T)."""
    if "loss_mask" in batch:
        raise ConfigError(
            "config.objectives.fim cuts documents, but config.data.format has conversations: set "
            "it to packed or padded, or config.objectives to clm."
        )
    ids, segments, place = batch["input_ids"], batch["segment_ids"], batch["positions"]
    time = ids.shape[1]
    each = jnp.broadcast_to(jnp.arange(time)[None], ids.shape)
    at = lambda array, index: jnp.take_along_axis(array, jnp.clip(index, 0, time - 1), axis=1)
    begins = (segments > 0) & (place == 0)
    start = jax.lax.cummax(jnp.where(begins, each, 0), axis=1)  # of the document here or before
    ends = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    last = at(jax.lax.cummin(jnp.where(ends, each, time), axis=1, reverse=True), start)
    following = jax.lax.cummin(jnp.where(begins, each, time), axis=1, reverse=True)
    following = jnp.where(start + 1 < time, at(following, start + 1), time)  # document's start
    owner = at(segments, start)

    special = jnp.asarray(vocab.special)[ids]
    first = at(special, start).astype(jnp.int32)
    size = last - start + 1
    text = size - first - (at(special, last) & (last > start)).astype(jnp.int32)
    drawn = lambda name: at(randomness.uniform(randomness.named(seeds, name), (time,)), owner - 1)
    cuts = [jnp.floor(drawn(name) * (text + 1)).astype(jnp.int32) for name in ("one", "two")]
    chosen = (drawn("rate") < rate) & (owner > 0) & (text > 0) & (following - start >= size + ROOM)
    between, behind = jnp.minimum(*cuts), jnp.maximum(*cuts)
    # SPM is PSM with nothing before, and what was before at the beginning of the middle.
    between = jnp.where(drawn("spm") < spm, 0, between)

    here = each - start - first  # the place in the new text: a mark, before, a mark, after, …
    suffix, middle = between + 1, between + 2 + text - behind  # places of the marks
    inside = (here >= 0) & (here < text + ROOM)
    source = jnp.where(here < suffix, here - 1, here - middle - 1 + between)
    source = jnp.where((here > suffix) & (here < middle), here - suffix - 1 + behind, source)
    source = jnp.where(
        inside, source + first, jnp.where(here < 0, here + first, here - ROOM + first)
    )
    new = at(ids, start + source)
    for mark, where in zip(vocab.fim, (0, middle, suffix), strict=True):
        new = jnp.where(inside & (here == where), jnp.asarray(mark, ids.dtype), new)
    grown = chosen & (each - start < size + ROOM)
    return {
        **batch,
        "input_ids": jnp.where(grown, new, ids),
        "segment_ids": jnp.where(grown, owner, segments),
        "positions": jnp.where(grown, each - start, place),
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
    """The loss of `clm`, of all tokens in their new order, the marks among them."""
    return clm.loss_fn(apply, params, batch, vocab=vocab, z_loss=z_loss, smoothing=smoothing)
