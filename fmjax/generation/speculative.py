"""Speculative decoding: a small model guesses some tokens, which the model reads at once (Leviathan
et al. 2023; Chen et al. 2023).

Of the guesses it keeps those up to the first that it would not have drawn, and draws the next
itself, so that texts are as probable as without, and the most probable one is the same. A step
reads the weights once for several tokens; what it takes besides is the small model's time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmjax import adapters
from fmjax.errors import ConfigError
from fmjax.generation import decoder, sampling
from fmjax.generation.decoder import DecodeSpec, Generator, Prompts
from fmjax.generation.sampling import Sampling
from fmjax.models import AnyModel
from fmjax.params import randomness


class DraftState(NamedTuple):
    """State of speculative decoding of one text; all arrays have the rows that a `Generator` needs,
    which are alike."""

    ids: Int[Array, "B L"]
    step: Int[Array, ""]  # tokens that are written, of which the last was read by neither
    done: Any
    broken: Any  # as of `decoding.Texts`
    rounds: Int[Array, ""]
    caches: tuple[Any, Any]  # of the model, of the one that guesses


class SpeculativeGenerator:
    """A `Generator` that is told `ahead` tokens by another, of a smaller model; texts one by one.

    `rounds` counts how often the model read since it was made, `written` the tokens of that.
    """

    def __init__(self, writer: Generator, drafter: Generator, ahead: int = 4):
        if ahead < 1:
            raise ConfigError(f"config.ahead={ahead}: give a whole number from 1.")
        self.writer, self.drafter, self.ahead = writer, drafter, ahead
        self.spec, self.model = writer.spec, writer.model
        self.rounds = self.written = 0

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        length: int,
        how: Sampling,
        seed: int = 0,
        first: int = 0,
        ends_early: Callable[[np.ndarray], Sequence[bool]] | None = None,
        every: int = 16,
    ) -> list[list[int]]:
        """As a `Generator`, but that `told` is given the one text that is being written."""
        if how.remembers:
            raise ConfigError(
                "config.repetition_penalty does not go with config.draft, whose guesses are judged "
                "together: set it to 1, or config.draft to ''."
            )
        return [
            self._one(ids, length, how, seed, first + i, ends_early, every)
            for i, ids in enumerate(prompts)
        ]

    def _one(self, ids, length, how, seed, number, ends_early, every):
        both = self.writer, self.drafter
        small = self.drafter.model
        most = small.cfg.max_len - adapters.positions(small)
        if max(len(ids), length) > most or (not small.decodes and len(ids) + length > most):
            raise ConfigError(
                f"config.draft reads {most} tokens, and prompt and text have {len(ids)} and "
                f"{length}: make config.length smaller, or give no draft."
            )
        prompt_batch = self.writer.prompt_batch([ids], length, seed, number)
        size = decoder.room(length + self.ahead + 1)
        rows = max(one.least for one in both)
        # The guesser's own first token is not used: the model's is.
        texts = [
            decoder.first_token(one.model, one.params, prompt_batch, one.spec, how, size, rows)
            for one in both
        ]
        now = DraftState(
            ids=texts[0].ids,
            step=texts[0].step,
            done=texts[0].done,
            broken=texts[0].broken | texts[1].broken,
            rounds=jnp.int32(1),
            caches=tuple(one.cache for one in texts),
        )
        prompt_batch = jax.tree.map(lambda x: decoder.repeated(x, rows), prompt_batch)
        models, params = (tuple(getattr(one, x) for one in both) for x in ("model", "params"))
        spec = self.writer.spec
        while True:
            until = length if ends_early is None else min(int(now.step) + every, length)
            now = _go_on(models, params, prompt_batch, now, until, spec, how, self.ahead)
            decoder.check(now.broken[:1], number)
            over = bool(now.done[0]) or int(now.step) >= length
            written = np.asarray(now.ids[:1, :length])
            if over or (ends_early is not None and ends_early(written)[0]):
                break
        found = [int(i) for i in written[0] if i >= 0]
        self.rounds, self.written = self.rounds + int(now.rounds), self.written + len(found)
        return found


def verified(
    p: Float[Array, "M V"],
    q: Float[Array, "K V"],
    draft_tokens: Int[Array, "K"],
    uniform: Float[Array, "K"],
    seeds: randomness.Seeds,
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """(how many of the guesses stand, the token after them) of the model's probabilities `p` of
    each token and of the one after all, and those, `q`, that the guesses were drawn by.

    A guess g stands with the probability min(1, p(g) / q(g)); after those that do comes one drawn
    by what p has over q, or by p after all (Leviathan et al. 2023, algorithm 1).
    """
    each = jnp.arange(len(draft_tokens))
    stands = uniform * q[each, draft_tokens] < p[each, draft_tokens]
    count = jnp.sum(jnp.cumprod(stands.astype(jnp.int32)))
    left = jnp.concatenate([jnp.maximum(p[:-1] - q, 0), p[-1:]])[count]
    left = jnp.where(jnp.any(left > 0), left, p[count])  # equal but for rounding
    return count, sampling.drawn(_logits(left[None]), seeds)[0]


def probabilities(logits: Float[Array, "B V"], how: Sampling) -> Float[Array, "B V"]:
    """The distribution that a token is drawn from: the most probable alone if `how` takes it."""
    if how.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    left = sampling.left(logits, how)
    return jnp.where(left == sampling.NONE, 0, jax.nn.softmax(left, axis=-1))


def _logits(p: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits that `sampling.drawn` draws by p with."""
    return jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1)), sampling.NONE)


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7), donate_argnums=(3,))
def _go_on(
    models: tuple[AnyModel, AnyModel],
    params: tuple[Any, Any],
    prompt_batch: Prompts,
    now: DraftState,
    until: Int[Array, ""],
    spec: DecodeSpec,
    how: Sampling,
    ahead: int,
) -> DraftState:
    """The text with tokens up to step `until`, or some more, or to its end."""
    rows = len(now.ids)
    seeds = lambda step, name: randomness.named(randomness.fold(prompt_batch.seeds[:1], step), name)

    def read(which, cache, ids, step):
        model, own = models[which], params[which]
        hidden, cache = decoder.extend(model, own, prompt_batch, cache, ids, step)
        return decoder.logits(model, own, hidden[0], spec), cache

    def guess(i, cache, last, step):
        """(whether there is one, probabilities, cache, the next guess after the token `last`)."""
        logits, cache = read(1, cache, jnp.full((rows, 1), last), step + i)
        q = probabilities(logits, how)
        return (
            decoder.usable(logits)[0],
            q[0],
            cache,
            sampling.drawn(_logits(q), seeds(step + i, "guess"))[0],
        )

    def round(now):
        last = jax.lax.dynamic_slice(now.ids, (0, now.step - 1), (1, 1))[0, 0]
        tokens, q, (cache, draft_tokens), usable = [last], [], now.caches, []
        for i in range(ahead):
            fine, found, draft_tokens, token = guess(i, draft_tokens, tokens[-1], now.step)
            tokens.append(token), q.append(found), usable.append(fine)
        # The last guess is read as well, so that both have read the same.
        _, draft_tokens = read(1, draft_tokens, jnp.full((rows, 1), tokens[-1]), now.step + ahead)
        ids = jnp.stack(tokens)
        logits, cache = read(0, cache, jnp.broadcast_to(ids[None], (rows, ahead + 1)), now.step)
        broken = ~(jnp.stack(usable).all() & decoder.usable(logits).all())
        p = probabilities(logits, how)
        uniform = randomness.uniform(seeds(now.step, "stands"), (ahead,))[0]
        count, token = verified(p, jnp.stack(q), ids[1:], uniform, seeds(now.step, "text"))
        place = jnp.arange(ahead + 1)
        new = jnp.where(place < count, jnp.roll(ids, -1), jnp.where(place == count, token, -1))
        ends = decoder.ends(new, spec) & (place <= count)
        length = jnp.where(jnp.any(ends), jnp.argmax(ends), count) + 1
        new = jnp.broadcast_to(jnp.where(place < length, new, -1)[None], (rows, ahead + 1))
        return DraftState(
            ids=jax.lax.dynamic_update_slice(now.ids, new, (0, now.step)),
            step=now.step + length,
            done=now.done | jnp.any(ends) | broken,
            broken=now.broken | broken,
            rounds=now.rounds + 1,
            caches=tuple(decoder.rolled_back(x, ahead + 1 - length) for x in (cache, draft_tokens)),
        )

    return jax.lax.while_loop(lambda now: (now.step < until) & ~jnp.all(now.done), round, now)
