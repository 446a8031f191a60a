"""Masked language modelling (Devlin et al. 2019, §3.1), with whole-word and span masking.

A fixed share of each row's real tokens is chosen; of those 80 % become [MASK], 10 % a random token,
10 % stay. Only the chosen positions, a static number of them, go through the vocabulary projection.
What is chosen is a pure function of (seed, step, example): see `fmjax.params.randomness`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fmjax.config import rules
from fmjax.errors import ConfigError, did_you_mean
from fmjax.objectives import losses
from fmjax.params import randomness

MASKS = VOCABULARY = True
CAUSAL = False
DURATIONS = ("over",)


def prepare(
    batch: Mapping[str, jax.Array],
    seeds: randomness.Seeds,
    *,
    vocab: Any,
    rate: float | tuple[float, float] = 0.15,
    over: tuple[int, int] | tuple[()] = (),
    prefix: bool = False,
    step: jax.Array | int | None = None,
    mask: str = "token",
    replace: tuple[float, float] = (0.8, 0.1),
    span_stop: float = 0.2,
    span_max: int = 10,
) -> dict[str, jax.Array]:
    """Chooses targets and corrupts `input_ids`.

    Args:
        batch: `input_ids`, `segment_ids` (B, T).
        seeds: one per example.
        vocab: `fmjax.data.Vocab`: size, mask_id, special and word_start tables (V,).
        rate: share of a row's real tokens to choose, rounded, at least one; or the first and the
            last of such shares (Ankner et al. 2024), of which evaluation has the last.
        over: steps between which the share goes from one to the other in a line; (): none.
        prefix: of a decoder, that it reads all of a document in both directions.
        step: of the run; None: after it.
        mask: choose single tokens, whole words, or spans of whole words.
        replace: shares of the chosen that become [MASK] and a random token.
        span_stop, span_max: spans have geometric lengths in words, stopping with probability
            `span_stop` after each and at the latest after `span_max` (SpanBERT, Joshi et al. 2020,
            §3.1: 0.2 and 10).

    Returns:
        The batch with corrupted `input_ids` and `mlm_positions`, `mlm_labels`, `mlm_weights` (B,
        K), K = ⌈rate · T⌉ of the larger rate. Words and spans are never cut, so a row may end up
        with fewer targets than its share: "mask_rate" tells.
    """
    if mask not in rules.MASKS:
        raise ConfigError(
            f"config.objectives.mlm.mask={mask!r} is not known." + did_you_mean(mask, rules.MASKS)
        )
    ids = batch["input_ids"]
    time = ids.shape[1]
    most = math.ceil((max(rate) if isinstance(rate, tuple) else rate) * time)
    rate = _now(rate, over, step)
    eligible = (batch["segment_ids"] > 0) & ~jnp.asarray(vocab.special)[ids]
    count = jnp.round(rate * jnp.sum(eligible, axis=1)).astype(jnp.int32)
    count = jnp.clip(count, jnp.minimum(1, jnp.sum(eligible, axis=1)), most)

    word, unit = _units(ids, eligible, seeds, vocab, mask, span_stop, span_max)
    draws = randomness.bits(randomness.named(seeds, "choose"), (time,))
    score = jnp.take_along_axis(draws >> 1, unit, axis=1)
    score = jnp.where(eligible, score, jnp.uint32(2**32 - 1))
    # Stable, so the tokens of a unit (equal scores) stay together and in order.
    order = jnp.argsort(score, axis=1, stable=True)
    positions = order[:, :most]
    chosen = jnp.arange(most)[None] < count[:, None]
    if mask != "token":
        ordered = [jnp.take_along_axis(group, order, axis=1) for group in (word, unit)]
        chosen &= _whole(*ordered, count)[:, :most]

    labels = jnp.take_along_axis(ids, positions, axis=1)
    fate = randomness.uniform(randomness.named(seeds, "fate"), (most,))
    other = randomness.uniform(randomness.named(seeds, "other"), (most,)) * vocab.size
    new = jnp.where(fate < replace[0] + replace[1], other.astype(ids.dtype), labels)
    new = jnp.where(fate < replace[0], jnp.asarray(vocab.mask_id, ids.dtype), new)
    rows = jnp.arange(ids.shape[0])[:, None]
    if prefix:
        batch = {**batch, "token_types": (batch["segment_ids"] > 0).astype(ids.dtype)}
    return {
        **batch,
        "input_ids": ids.at[rows, positions].set(jnp.where(chosen, new, labels)),
        "mlm_positions": positions,
        "mlm_labels": labels,
        "mlm_weights": chosen.astype(jnp.float32),
    }


def loss_fn(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Cross-entropy in nats at the chosen positions only; also accuracy and the realised mask
    rate."""
    logits = _logits(apply, params, batch)
    labels, weights = batch["mlm_labels"], batch["mlm_weights"]
    nats = losses.cross_entropy(logits, labels)
    right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    weight = jnp.sum(weights)
    tokens = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
    return {
        "loss": (jnp.sum(nats * weights), weight),
        "accuracy": (jnp.sum(right * weights), weight),
        "mask_rate": (weight, tokens),
    }


def guesses(apply: Callable, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """(B, K) of each row: `positions`, `labels` and `weights` of the targets, and `guesses`, the
    most probable token of each."""
    found = {name: batch[f"mlm_{name}"] for name in ("positions", "labels", "weights")}
    return found | {"guesses": jnp.argmax(_logits(apply, params, batch), axis=-1)}


def _logits(apply: Callable, params: Any, batch: Mapping[str, jax.Array]) -> Float[Array, "B K V"]:
    """At the targets."""
    hidden = apply(params, batch, method="encode")
    hidden = jnp.take_along_axis(hidden, batch["mlm_positions"][..., None], axis=1)  # (B, K, D)
    return apply(params, hidden, method="logits")


def _now(
    rate: float | tuple[float, float],
    over: tuple[int, int] | tuple[()],
    step: jax.Array | int | None,
) -> float | jax.Array:
    """The share at a step of the run."""
    if not isinstance(rate, tuple):
        return rate
    if step is None:
        return rate[1]
    if not over or over[1] <= over[0]:
        raise ConfigError(
            f"config.objectives.mlm.rate={rate} goes from one share to the other: say between "
            "which steps, config.objectives.mlm.over=('0%', '100%')."
        )
    done = jnp.clip((step - over[0]) / (over[1] - over[0]), 0, 1)
    return rate[0] + (rate[1] - rate[0]) * done


def _units(
    ids: Int[Array, "B T"],
    eligible: Bool[Array, "B T"],
    seeds: randomness.Seeds,
    vocab: Any,
    mask: str,
    span_stop: float,
    span_max: int,
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Numbers (< T) of each token's word, and of the unit it is chosen with: itself, its word or
    its span."""
    if mask == "token":
        each = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        return each, each
    # A word also starts after anything that cannot be chosen: [CLS], [SEP], padding.
    after_gap = jnp.pad(~eligible[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jnp.asarray(vocab.word_start)[ids] | after_gap
    word = jnp.cumsum(starts, axis=1) - 1
    if mask == "span":
        # Gaps of a Bernoulli process are geometric: a span starts at a word with probability
        # `span_stop`.
        stop = randomness.bernoulli(randomness.named(seeds, "span"), span_stop, (ids.shape[1],))
        fresh = starts & (stop | after_gap)
        since = word - jax.lax.cummax(jnp.where(fresh, word, 0), axis=1)
        starts &= fresh | (since % span_max == 0)
    return word, jnp.cumsum(starts, axis=1) - 1


def _whole(
    word: Int[Array, "B T"], unit: Int[Array, "B T"], count: Int[Array, "B"]
) -> Bool[Array, "B T"]:
    """False for the unit that the budget `count` would cut, given tokens in the order of choice.

    A first unit larger than the whole budget is cut after a word, and a first word anywhere, so
    that no row loses its targets.
    """

    def cut(group):
        last = jnp.take_along_axis(group, jnp.maximum(count - 1, 0)[:, None], axis=1)
        beyond = jnp.minimum(count, group.shape[1] - 1)[:, None]
        goes_on = jnp.take_along_axis(group, beyond, axis=1) == last
        return (group == last) & goes_on & (count < group.shape[1])[:, None]

    first = lambda group: group == group[:, :1]
    return ~cut(unit) | (first(unit) & ~cut(word)) | first(word)
