"""Beam search: the text that is most probable as a whole, or nearly (Graves 2012; Sutskever et al.
2014, §3.2).

Each step extends the most probable `beams` of all one token longer texts. A text that ends is set
aside with its log probability over length to the power `length_penalty` (Wu et al. 2016, §7, is
another of the kind); the search is over where none that continues could be better than all that are
set aside, were it to end now. What it finds is what transformers finds, with its defaults.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fmjax.errors import ConfigError
from fmjax.generation import decoder
from fmjax.generation.decoder import DecodeSpec, Generator, Prompts
from fmjax.models import AnyModel

NEVER = -1e9  # score of what is not there


@dataclasses.dataclass(frozen=True)
class Beams:
    """Beam search settings: the number of beams, and the length penalty."""

    count: int
    length_penalty: float = 1.0  # above 0 for longer texts

    def __post_init__(self):
        if self.count < 1:
            raise ConfigError(f"config.beams={self.count}: give a whole number from 1.")


class Kept(NamedTuple):
    """Texts of each prompt and their scores."""

    ids: Int[Array, "B K L"]
    scores: Float[Array, "B K"]


class Search(NamedTuple):
    step: Int[Array, ""]  # tokens that the running texts have
    running: Kept  # with the sums of log probabilities
    over: Kept  # with scores; NEVER where there is none yet
    open: Bool[Array, "B"]  # where something better can be found
    broken: Bool[Array, "B"]  # as of `decoding.Texts`
    hidden: Float[Array, "R D"]  # of the last token of each running text
    cache: Any


def search(
    writer: Generator, prompts: Sequence[Sequence[int]], length: int, how: Beams
) -> list[tuple[list[int], float]]:
    """(the best text after each prompt, of at most `length` tokens, its score). Raises
    NumericsError as a `Generator` does."""
    prompt_batch, room = writer.prompt_batch(prompts, length, 0), decoder.room(length)
    over, broken = _searched(
        writer.model, writer.params, prompt_batch, writer.spec, how, room, length
    )
    decoder.check(broken)
    best, scores = np.asarray(over.ids[:, 0]), np.asarray(over.scores[:, 0])
    rows = zip(best.tolist(), scores.tolist(), strict=True)
    return [([i for i in row if i >= 0], score) for row, score in rows]


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _searched(
    model: AnyModel,
    params: Any,
    prompt_batch: Prompts,
    spec: DecodeSpec,
    how: Beams,
    room: int,
    length: Int[Array, ""],
) -> tuple[Kept, Bool[Array, "B"]]:
    rows, beams = len(prompt_batch.ids), how.count
    hidden, cache = decoder.prefill(model, params, prompt_batch, spec, room)
    repeated = lambda x: jnp.repeat(x, beams, axis=0) if x.ndim else x
    hidden, cache, several = jax.tree.map(repeated, (hidden, cache, prompt_batch))
    ids = jnp.full((rows, beams, room), -1, jnp.int32)
    one = jnp.full((rows, beams), NEVER).at[:, 0].set(0)  # the others are the same text
    none = jnp.full((rows, beams), NEVER)
    opened = jnp.ones(rows, bool)
    texts = Kept(ids, one), Kept(ids, none)
    first = Search(jnp.int32(0), *texts, opened, ~opened, hidden, cache)

    def unfinished(now):
        return (now.step < length) & jnp.any(now.open)

    def longer(now):
        now, parents = _stepped(model, params, spec, how, length, now)
        chosen = (jnp.arange(rows)[:, None] * beams + parents).reshape(-1)
        cache = jax.tree.map(lambda x: x[chosen] if x.ndim else x, now.cache)
        last = jnp.take(now.running.ids, now.step - 1, axis=2).reshape(-1, 1)
        hidden, cache = decoder.extend(model, params, several, cache, last, now.step)
        return now._replace(hidden=hidden[:, 0], cache=cache)

    last = jax.lax.while_loop(unfinished, longer, first)
    return last.over, last.broken


def _stepped(model, params, spec, how, length, now) -> tuple[Search, Int[Array, "B K"]]:
    """(the search one token on, of which running text each of the new ones is longer)."""
    (rows, beams), tokens = now.running.scores.shape, spec.tokens
    logits = decoder.logits(model, params, now.hidden, spec)
    broken = now.broken | (now.open & ~decoder.usable(logits).reshape(rows, beams).all(axis=1))
    found = jax.nn.log_softmax(logits)
    sums = now.running.scores[:, :, None] + found.reshape(rows, beams, tokens)
    # So many that enough continue where all the most probable end.
    width = min((1 + max(1, len(spec.stop))) * beams, beams * tokens)
    sums, place = jax.lax.top_k(sums.reshape(rows, -1), width)
    parents, new = place // tokens, place % tokens
    ids = jnp.take_along_axis(now.running.ids, parents[:, :, None], axis=1)
    ids = jax.lax.dynamic_update_slice_in_dim(ids, new[:, :, None], now.step, axis=2)
    step = now.step + 1
    end = decoder.ends(new, spec) | (step == length)

    counted = end & (jnp.arange(width) < beams)[None] & now.open[:, None]
    scores = jnp.where(counted, sums / step.astype(jnp.float32) ** how.length_penalty, NEVER)
    both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), now.over, Kept(ids, scores))
    over, _ = _best(both, beams)
    running, which = _best(Kept(ids, jnp.where(end, sums + NEVER, sums)), beams)
    hope = running.scores[:, 0] / step.astype(jnp.float32) ** how.length_penalty
    opened = now.open & ~broken & (hope > over.scores[:, -1])
    now = now._replace(step=step, running=running, over=over, open=opened, broken=broken)
    return now, jnp.take_along_axis(parents, which, axis=1)


def _best(texts: Kept, count: int) -> tuple[Kept, Int[Array, "B K"]]:
    """(the `count` with the highest scores, their places)."""
    scores, place = jax.lax.top_k(texts.scores, count)
    return Kept(jnp.take_along_axis(texts.ids, place[:, :, None], axis=1), scores), place
