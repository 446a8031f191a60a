"""Log-likelihoods of texts: of decoders, of encoder–decoders, and of encoders
(pseudo-log-likelihood).

    score = Scorer(model, params, first=words_first, …)
    found = score([(context ids, continuation ids), …])

A decoder gives each token of a continuation by those before it. A context that is too long loses
its beginning; a continuation that is too long is read in windows, each of which sees what fits
before it, so that every token is counted once. An encoder gives each token by all others, itself
masked, one row a token: the pseudo-log-likelihood (Salazar et al. 2020, §2), which is no
probability of a text, but orders texts as one does. By `word` the tokens after it in its word are
masked too, else a rare word of several is given away by its parts (Kauf and Ivanova 2023, §3).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fmjax import adapters
from fmjax.data import vocabulary
from fmjax.errors import ConfigError, NumericsError, quoted
from fmjax.generation.decoder import room
from fmjax.models import AnyModel

LOGITS_BYTES = 2**26  # of what exists at once
SHARED = 32  # targets of one row at most
WAYS = ("token", "word")  # what of a text an encoder has masked

Ids = Sequence[int]


class Likely(NamedTuple):
    """A model's judgement of one continuation."""

    nats: float  # minus the logarithm of its probability
    greedy: bool  # whether each of its tokens is the most probable
    tokens: int


class Piece(NamedTuple):
    """A row: which states say something of which tokens."""

    request: int
    ids: list[int]  # of the row
    at: list[int]  # columns of the states
    targets: list[int]
    given: list[int]  # of the decoder of an encoder–decoder, one for each target; else nothing


class Scorer:
    """A model that judges texts.

    Args:
        first, last: tokens around a text, as its tokenizer has them.
        mask_id: what hides a token, of an encoder; `word_start` (bool [V]) and `way` say what more.
        trained: longest rows of training; None: nobody knows.
        start: what begins the target of an encoder–decoder.
        decode: the text of tokens, for an error.
    """

    def __init__(
        self,
        model: AnyModel,
        params: Any,
        *,
        first: Ids = (),
        last: Ids = (),
        mask_id: int | None = None,
        word_start: np.ndarray | None = None,
        way: str = "token",
        start: int = 0,
        trained: int | None = None,
        batch_size: int = 32,
        prefix: bool = False,
        decode: Callable[[Ids], str] = repr,
    ):
        if not model.causal and not model.decodes and mask_id is None:
            raise ConfigError("the tokenizer has no mask, by which an encoder judges texts.")
        if not model.causal and not model.cfg.lm_head:
            raise ConfigError("the model has no vocabulary head: it says nothing of tokens.")
        self.model, self.params = model, params
        self.first, self.last, self.start = list(first), list(last), start
        self.mask_id, self.word_start, self.way = mask_id, word_start, way
        self.batch_size, self.prefix, self.decode = batch_size, prefix, decode
        self.width = model.cfg.max_len - adapters.positions(model)
        if trained is not None and not adapters.base(model).endless:
            self.width = min(self.width, trained)

    def __call__(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Likely]:
        """The model's judgement of each (context, continuation); without a context, of the whole
        text after the tokens that begin one. Raises NumericsError if it is not a number: the least
        of several NaN is the first, which would often be the right choice."""
        if empty := [i for i, (_, said) in enumerate(pairs) if not len(said)]:
            raise ConfigError(f"text {empty[0]} has no tokens of which to ask how likely they are.")
        pieces = [
            piece
            for i, (context, said) in enumerate(pairs)
            for piece in self.pieces(i, list(context), list(said))
        ]
        for i, (context, said) in enumerate(pairs):
            if problem := vocabulary.beyond([*context, *said], self.model.cfg.vocab_size):
                raise ConfigError(f"text {i} cannot be judged: {problem}.")
        nats, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        for batch, (found, likeliest) in self._batches(list(_shared(pieces))):
            for row, values, hits in zip(batch, found, likeliest, strict=False):
                start = 0
                for piece in row:
                    stop = start + len(piece.at)
                    nats[piece.request] -= values[start:stop].sum(dtype=np.float64)
                    greedy[piece.request] &= bool(hits[start:stop].all())
                    start = stop
        if (broken := np.flatnonzero(~np.isfinite(nats))).size:
            context, said = pairs[broken[0]]
            raise NumericsError(
                f"the log probability of {quoted(self.decode(said))} behind "
                f"{quoted(self.decode(context))} is {-nats[broken[0]]}, and of {broken.size:,} of "
                f"{len(pairs):,} texts it is not finite: the model's weights are damaged, or it "
                "needs config.precision=float32."
            )
        return [
            Likely(float(n), bool(g), len(said))
            for n, g, (_, said) in zip(nats, greedy, pairs, strict=True)
        ]

    def pieces(self, request: int, context: list[int], said: list[int]) -> Iterator[Piece]:
        """The rows that it takes to judge a continuation. Raises ConfigError for one of a decoder
        that nothing is before."""
        if self.model.decodes:
            source = [*self.first, *context, *self.last][-self.width :]
            given = [self.start, *said[:-1]]
            for i in range(0, len(said), self.width):
                at = list(range(len(said[i : i + self.width])))
                yield Piece(
                    request, source, at, said[i : i + self.width], given[i : i + self.width]
                )
        elif self.model.causal:
            yield from self._windows(request, [*self.first, *context], said)
        else:
            yield from self._masked(request, context, said)

    def _windows(self, request, before, said):
        if not before:
            raise ConfigError(
                "a text without a context cannot be judged: the tokenizer has no token that begins "
                "one. Give a context."
            )
        text, done = before + said, len(before)
        while done < len(text):
            stop = min(len(text), done + self.width)
            begin = max(0, stop - 1 - self.width)
            row = text[begin : stop - 1]
            at = list(range(done - 1 - begin, stop - 1 - begin))
            yield Piece(request, row, at, text[done:stop], [])
            done = stop

    def _masked(self, request, context, said):
        around = len(self.first) + len(self.last)
        text = context + said
        space = self.width - around
        for i in range(len(context), len(text)):
            hidden = [i]
            if self.way == "word":
                while hidden[-1] + 1 < len(text) and not self.word_start[text[hidden[-1] + 1]]:
                    hidden.append(hidden[-1] + 1)
            begin = min(max(0, i - space // 2), max(0, len(text) - space))
            seen = range(begin, min(len(text), begin + space))
            row = [self.mask_id if j in hidden else text[j] for j in seen]
            row = [*self.first, *row, *self.last]
            yield Piece(request, row, [len(self.first) + i - begin], [text[i]], [])

    def _batches(self, rows: list[list[Piece]]):
        """(rows, what is said of their targets) of those of about the same length."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0].ids))
        for i in range(0, len(order), self.batch_size):
            batch = [rows[j] for j in order[i : i + self.batch_size]]
            full = batch + batch[:1] * (self.batch_size - len(batch))
            ids = [row[0].ids for row in full]
            at, targets, given = (
                [[value for piece in row for value in getattr(piece, name)] for row in full]
                for name in ("at", "targets", "given")
            )
            most = max(map(len, at))
            if self.model.causal or self.model.decodes or most > 1:
                most = room(most)
            found = _judged(
                self.model,
                self.params,
                _padded(ids, min(room(len(ids[0])), max(self.width, len(ids[0])))),
                jnp.asarray(list(map(len, ids)), jnp.int32),
                _padded(at, most),
                _padded(targets, most),
                _padded(given, most) if self.model.decodes else None,
                self.prefix,
            )
            yield batch, tuple(map(np.asarray, found))


def _shared(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Those with the same row together, such as choices of one token after a context, with
    `SHARED` targets at most; each by itself where a decoder is given what the row is not."""
    rows: dict[Any, list[Piece]] = {}
    for i, piece in enumerate(pieces):
        key = i if piece.given else (tuple(piece.ids), tuple(piece.at))
        rows.setdefault(key, []).append(piece)
    for same in rows.values():
        most = max(1, SHARED // len(same[0].at))
        yield from (same[i : i + most] for i in range(0, len(same), most))


def _padded(rows: list[list[int]], width: int) -> Int[Array, "B W"]:
    out = np.zeros((len(rows), width), np.int32)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return jnp.asarray(out)


@functools.partial(jax.jit, static_argnums=(0, 7))
def _judged(
    model: AnyModel,
    params: Any,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    at: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    given: Int[Array, "B S"] | None,
    prefix: bool,
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """(log probabilities of the targets, whether each is the most probable)."""
    place = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    real = (place < lengths[:, None]).astype(jnp.int32)
    types = jnp.zeros_like(ids)
    if prefix:  # what is before the first target is read in both directions
        types = (place <= at[:, :1]).astype(jnp.int32)
    variables = {"params": params}
    hidden = model.apply(variables, ids, real, place * real, types, method="encode")
    if model.decodes:
        places = jnp.broadcast_to(jnp.arange(given.shape[1])[None], given.shape)
        target = given, jnp.ones_like(given), places
        hidden = model.apply(variables, *target, hidden, real, method="decode")
    states = jnp.take_along_axis(hidden, at[:, :, None], axis=1)

    def one(row):
        state, target = row
        logits = model.apply(variables, state, method="logits")
        return jax.nn.log_softmax(logits)[target], jnp.argmax(logits) == target

    flat = states.reshape(-1, states.shape[-1]), targets.reshape(-1)
    pieces = max(1, LOGITS_BYTES // (4 * model.cfg.vocab_size))
    found, likeliest = jax.lax.map(one, flat, batch_size=min(pieces, flat[1].shape[0]))
    return found.reshape(targets.shape), likeliest.reshape(targets.shape)
