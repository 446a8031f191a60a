"""Span corruption: a text without some spans, and the spans as what is to be said of it.

(T5, Raffel et al. 2020, §3.1.4; several ways at once are UL2, Tay et al. 2022, §3.1.) Of
"<s> a b c d e f g" the source can be "a <0> d e <1>" and the target "<0> b c <1> f g": sentinels,
tokens of their own, stand for what is gone. The examples are rows of `config.data.format="packed"`
or "padded"; each document in a row has its own sentinels, from the first on, and its own target.
What is cut out is a pure function of (seed, step, example): see `fmjax.params.randomness`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fmjax.errors import ConfigError
from fmjax.objectives import documents, seq2seq
from fmjax.params import randomness

VOCABULARY = DECODES = True
SHORTEST = 8  # tokens of a document that is cut at one place


def loss_fn(
    apply: Callable,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    vocab: Any,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """As that of `seq2seq`."""
    how = dict(vocab=vocab, z_loss=z_loss, smoothing=smoothing)
    return seq2seq.loss_fn(apply, params, batch, **how)


def prepare(
    batch: Mapping[str, jax.Array],
    seeds: randomness.Seeds,
    *,
    vocab: Any,
    denoisers: Sequence[tuple[float, float]] = ((3.0, 0.15),),
) -> dict[str, jax.Array]:
    """Takes spans out of `input_ids` and makes `target_ids`, `target_segment_ids` and
    `target_positions` (B, S) of them.

    Args:
        batch: `input_ids`, `segment_ids`, `positions` (B, T).
        seeds: one per example.
        vocab: `fmjax.data.Vocab`: size, sentinels, first, last and pad_id.
        denoisers: (mean length of a span, share of the tokens that goes), of which each row draws
            one. Of length 0 goes the end of each document, twice the share at most and as much as
            that on average. S is what the largest of them can need.

    Raises ConfigError for a tokenizer with too few sentinels.
    """
    ids, segments = batch["input_ids"], batch["segment_ids"]
    time = ids.shape[1]
    room = [_room(time, float(mean), float(rate)) for mean, rate in denoisers]
    spans, width = (max(each) for each in zip(*room, strict=True))
    if spans > len(vocab.sentinels):
        raise ConfigError(
            f"config.objectives.span_corruption.denoisers={tuple(denoisers)} take up to {spans} "
            f"spans of a row of {time} tokens, but the tokenizer has {len(vocab.sentinels)} "
            "sentinels: use a shorter config.data.seq_len, longer spans, or a tokenizer with more "
            "(config.tokenizer.special='t5' trains one with 100)."
        )
    if wrong := [name for name in ("target_ids", "loss_mask") if name in batch]:
        form = "pairs of source and target" if wrong == ["target_ids"] else "conversations"
        raise ConfigError(
            f"config.objectives.span_corruption takes documents apart, but config.data.format has "
            f"{form}: set it to packed or padded, or config.objectives to "
            f"{'seq2seq' if wrong == ['target_ids'] else 'clm'}."
        )
    # All of a text can go; what begins and ends it stays.
    kept = np.isin(np.arange(vocab.size), [*vocab.first, *vocab.last, *vocab.sentinels])
    eligible = (segments > 0) & ~jnp.asarray(kept)[ids]
    drawn = randomness.uniform(randomness.named(seeds, "denoiser"), (1,))[:, 0]
    drawn = (drawn * len(denoisers)).astype(jnp.int32)
    mean, rate = (jnp.asarray(x, jnp.float32)[drawn] for x in zip(*denoisers, strict=True))
    kinds = {mean > 0 for mean, _ in denoisers}
    gone = jnp.zeros(ids.shape, bool)
    if True in kinds:
        cut = _spans(eligible, segments, seeds, spans, jnp.maximum(mean, 1.0), rate)
        gone = jnp.where((mean > 0)[:, None], cut, gone)
    if False in kinds:
        cut = _ends(eligible, segments, seeds, rate)
        gone = jnp.where((mean > 0)[:, None], gone, cut)
    return dict(batch) | _taken_out(ids, segments, gone, width, vocab)


def _room(time: int, mean: float, rate: float) -> tuple[int, int]:
    """(spans, length of the targets) that a row of `time` tokens can need."""
    if not mean:
        each = time // SHORTEST  # documents, of which one token goes at least
        return 1, min(math.ceil(2 * rate * time) + each, time) + 2 * each
    tokens = round(time * rate) + 1
    spans = max(round(tokens / mean), 1) + 1
    return spans, tokens + 2 * spans


def _spans(
    eligible: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
    seeds: randomness.Seeds,
    most: int,
    mean: Float[Array, "B"],
    rate: Float[Array, "B"],
) -> Bool[Array, "B T"]:
    """The tokens inside spans: as many as the share and their mean length ask for, of random
    lengths, with tokens that stay before each. A span ends where its document does."""
    time = eligible.shape[1]
    tokens = jnp.sum(eligible, axis=1)
    noise = jnp.clip(jnp.round(tokens * rate), 1, jnp.maximum(tokens - 1, 0)).astype(jnp.int32)
    number = jnp.clip(jnp.round(noise / mean), 1, noise).astype(jnp.int32)
    number = jnp.minimum(number, tokens - noise)  # as many parts stay
    parts = [
        _composed(total, number, most, randomness.named(seeds, name), time)
        for name, total in (("stays", tokens - noise), ("goes", noise))
    ]
    ends = jnp.cumsum(jnp.stack(parts, axis=2).reshape(len(tokens), -1), axis=1)  # (B, 2 K)
    place = jnp.cumsum(eligible, axis=1) - 1
    passed = jnp.sum(place[:, :, None] >= ends[:, None], axis=2)
    gone = eligible & (passed % 2 == 1) & (noise > 0)[:, None]
    begun = jnp.take_along_axis(ends, jnp.maximum(passed - 1, 0), axis=1)
    first = jax.lax.cummax(jnp.where(gone & (place == begun), jnp.arange(time)[None], 0), axis=1)
    return gone & (jnp.take_along_axis(segments, first, axis=1) == segments)


def _composed(
    total: Int[Array, "B"], number: Int[Array, "B"], most: int, seeds: randomness.Seeds, time: int
) -> Int[Array, "B K"]:
    """`total` as a sum of `number` terms of at least 1, each such sum as probable; others are 0."""
    place = jnp.arange(time - 1)[None]
    draws = randomness.bits(seeds, (time - 1,)) >> 1
    draws = jnp.where(place < (total - 1)[:, None], draws, jnp.uint32(2**32 - 1))
    rank = jnp.argsort(jnp.argsort(draws, axis=1), axis=1)
    border = (rank < (number - 1)[:, None]) & (place < (total - 1)[:, None])
    part = jnp.pad(jnp.cumsum(border, axis=1), ((0, 0), (1, 0)))  # of each of the `total`
    inside = jnp.arange(time)[None] < total[:, None]
    each = (part[:, :, None] == jnp.arange(most)[None, None]) & inside[:, :, None]
    return jnp.sum(each, axis=1)


def _ends(
    eligible: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
    seeds: randomness.Seeds,
    rate: Float[Array, "B"],
) -> Bool[Array, "B T"]:
    """The tokens after a random place in each document of `SHORTEST` tokens or more."""
    behind = documents.behind(eligible, segments)
    begin = documents.begin(segments)
    of_document = lambda x: jnp.take_along_axis(x, begin, axis=1)
    length = of_document(behind + eligible)
    draw = of_document(randomness.uniform(randomness.named(seeds, "ends"), segments.shape[1:]))
    goes = jnp.maximum(jnp.floor(2 * rate[:, None] * draw * length), 1)
    return eligible & (behind < goes) & (length >= SHORTEST)


def _taken_out(
    ids: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    gone: Bool[Array, "B T"],
    width: int,
    vocab: Any,
) -> dict[str, jax.Array]:
    """The arrays of a batch without what is `gone`, and of targets of `width` tokens with it."""
    before = jnp.pad(gone[:, :-1], ((0, 0), (1, 0)))
    column = jnp.arange(ids.shape[1])[None]
    first = gone & (~before | (documents.begin(segments) == column))
    count = jnp.cumsum(first, axis=1)
    span = count - jnp.take_along_axis(count - first, documents.begin(segments), axis=1) - 1
    sentinel = jnp.asarray(vocab.sentinels, ids.dtype)[jnp.maximum(span, 0)]

    stays = (segments > 0) & (~gone | first)
    source = [(stays, jnp.cumsum(stays, axis=1) - 1, jnp.where(first, sentinel, ids))]
    # Of each span its sentinel and its tokens; after the last of a document what ends a text.
    end = vocab.last[:1]
    last = gone & (documents.behind(gone, segments) == 0)
    slots = gone.astype(jnp.int32) + first + last * len(end)
    at = jnp.cumsum(slots, axis=1) - slots + first
    target = [(first, at - 1, sentinel), (gone, at, ids)]
    target += [(last, at + 1, jnp.full_like(ids, token)) for token in end]

    rows = jnp.arange(len(ids))[:, None]

    def arrays(pieces, length):
        """(ids, segments, positions) of rows with the values where they are wanted."""
        made = jnp.full((len(ids), length), vocab.pad_id, ids.dtype)
        owner = jnp.zeros((len(ids), length), segments.dtype)
        for wanted, place, values in pieces:
            place = jnp.where(wanted, place, length)
            made = made.at[rows, place].set(values, mode="drop")
            owner = owner.at[rows, place].set(segments, mode="drop")
        places = jnp.arange(length)[None] - documents.begin(owner)
        return made, owner, jnp.where(owner > 0, places, 0).astype(segments.dtype)

    names = ("ids", "segment_ids", "positions")
    targets = zip(names, arrays(target, width), strict=True)
    made = dict(zip(("input_ids", *names[1:]), arrays(source, ids.shape[1]), strict=True))
    return made | {f"target_{name}": array for name, array in targets}
