"""Autoregressive generation, token by token: one program for the prompts, one for the rest.

    writer = Writer(model, params, stop=(eos,))
    texts = writer(prompts, length=64, how=Sampling(temperature=0.8), seed=0)

Prompts are rows, like texts in training, one a row, with padding after them up to one of a
few lengths, so that programs are few; what is written follows after that. Padding is seen by
nobody and a text's positions are its own, so that neither the padding nor the other rows change
it. Keys and values of what was seen are kept (`layers.CACHE`), and written in place.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fmjax import adapters
from fmjax.data import vocabulary
from fmjax.errors import ConfigError, NumericsError
from fmjax.generation import inference_weights
from fmjax.generation.sampling import Sampling, chosen
from fmjax.models import AnyModel, layers
from fmjax.params import paths, precision, randomness

LEAST = 32  # columns of prompts, and of what is written, at least


class Prompts(NamedTuple):
    """Prompts, one a row: `ids` with padding after, and their `lengths`."""

    ids: Int[Array, "B P"]
    lengths: Int[Array, "B"]
    seeds: randomness.Seeds


class DecodeState(NamedTuple):
    """Decoding state: `step` tokens of each row of `ids` are written."""

    ids: Int[Array, "B L"]
    step: Int[Array, ""]
    done: Bool[Array, "B"]  # rows whose last token ended them
    broken: Bool[Array, "B"]  # rows that had to continue by logits that are no numbers
    seen: Bool[Array, "B V"] | None  # tokens of the texts, where it matters
    cache: Any


class Generator:
    """A model that writes. `stop` are tokens that end a text; only the first `tokens` of the
    vocabulary are drawn, as a table may have rows that no token stands for.

    `weights` "int8" keeps matrices in eight bits, and multiplies in them: a quarter of the bytes,
    and nearly the same text. "" keeps them in the dtype that the model computes in, with the table
    that gives the logits; on a CPU that is a copy, whatever the dtype. `cache` "int8" keeps keys
    and values of what was seen in eight bits. Raises ConfigError for other words, and for models
    that have no int8.
    """

    def __init__(
        self,
        model: AnyModel,
        params: Any,
        *,
        stop: Sequence[int] = (),
        tokens: int | None = None,
        prefix: bool = False,
        first: int = 0,
        weights: str = "",
        cache: str = "",
    ):
        inference_weights.check(model, weights, cache)
        # Layers one by one: a scan would copy all that they keep, and their parameters, each step.
        self.model = model.clone(stacks=None)
        plain = adapters.base(model) is model  # else an adapter may need the whole precision
        half, cpu = model.cfg.dtype != "float32" or weights, jax.default_backend() == "cpu"
        dtype = model.cfg.dtype if plain and (half or cpu) else None
        self.params = inference_weights.ready(
            params, dtype, weights, getattr(model.cfg, "tied", True)
        )
        # XLA:CPU's kernels for less than 32 bits want two rows: of a single one products take up to
        # ten times as long, and the cache is copied.
        self.least = 2 if half and cpu and plain else 1
        self.spec = DecodeSpec(tuple(stop), tokens or model.cfg.vocab_size, prefix, first, cache)

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
        """The continuation of each prompt: `length` tokens, or fewer that end with one of `stop`.

        Row i is drawn by `seed` and the number `first` + i, however the prompts are split. `told`
        is called each `every` tokens with those written so far (padded with -1), and says of each
        row whether it is to end. Raises NumericsError for logits that are not finite, of which any
        token would be as good.
        """
        prompt_batch = self.prompt_batch(prompts, length, seed, first)
        rows = max(self.least, len(prompts))
        texts = first_token(
            self.model, self.params, prompt_batch, self.spec, how, room(length), rows
        )
        prompt_batch = jax.tree.map(lambda x: repeated(x, rows), prompt_batch)
        while True:
            until = length if ends_early is None else min(int(texts.step) + every, length)
            texts = decode(self.model, self.params, prompt_batch, texts, until, self.spec, how)
            check(texts.broken[: len(prompts)], first)
            written, over = np.asarray(texts.ids[:, :length]), np.array(texts.done)
            if ends_early is not None:
                over[: len(prompts)] |= ends_early(written[: len(prompts), :until])
                over[len(prompts) :] = True
                texts = texts._replace(done=jnp.asarray(over))
            if until == length or over.all():
                break
        return [[int(i) for i in row if i >= 0] for row in written[: len(prompts)]]

    def prompt_batch(
        self, prompts: Sequence[Sequence[int]], length: int, seed: int, first: int = 0
    ) -> Prompts:
        """The prompts in rows, which have room for all of them and `length` tokens."""
        for i, ids in enumerate(prompts):
            if problem := vocabulary.beyond(ids, self.model.cfg.vocab_size):
                raise ConfigError(f"prompt {i} cannot be read: {problem}.")
        lengths = [len(ids) for ids in prompts]
        width = max(max(lengths), min(room(max(lengths)), self.model.cfg.max_len - length))
        ids = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        numbers = jnp.arange(first, first + len(prompts))
        key = jax.random.fold_in(jax.random.key(seed), 0)  # whose words are as good as random
        seeds = randomness.named(randomness.seeds(key, numbers), "text")
        return Prompts(jnp.asarray(ids), jnp.asarray(lengths, jnp.int32), seeds)


def check(broken: Bool[Array, "B"], first: int = 0) -> None:
    """Raises NumericsError where one of the texts, whose numbers begin at `first`, is `broken`."""
    if (rows := np.flatnonzero(np.asarray(broken))).size:
        raise NumericsError(
            f"the model's logits for the next token of text {first + rows[0] + 1} are not finite: "
            "its weights are damaged, or it needs config.precision=float32."
        )


def usable(logits: Float[Array, "B V"]) -> Bool[Array, "B"]:
    """True where a token can be chosen: no logit is NaN, and the largest is finite."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


def room(length: int) -> int:
    """The next of the lengths that programs are made for: powers of two, and halfway."""
    size = LEAST
    while size < length:
        size *= 2
    return size * 3 // 4 if length <= size * 3 // 4 and size > LEAST else size


class DecodeSpec(NamedTuple):
    """Static facts that programs are compiled for."""

    stop: tuple[int, ...]
    tokens: int
    prefix: bool  # whether prompts are read in both directions
    first: int  # the token that begins the target of an encoder–decoder
    cache: str  # "int8": what is kept of the texts is in eight bits


def prefill(
    model: AnyModel, params: Any, prompt_batch: Prompts, spec: DecodeSpec, room: int
) -> tuple[Float[Array, "B D"], Any]:
    """(the states of the last token of each prompt, what is kept of it, with `room` for more)."""
    real = _real(prompt_batch)
    place = jnp.where(real > 0, jnp.arange(prompt_batch.ids.shape[1])[None], 0)
    types = real if spec.prefix else jnp.zeros_like(real)
    arrays = prompt_batch.ids, real, place, types
    if model.decodes:
        source = model.apply({"params": params}, *arrays, method="encode")
        start = jnp.full((len(prompt_batch.ids), 1), spec.first, jnp.int32)
        hidden, cache = _decoded(
            model, params, prompt_batch, {}, start, jnp.zeros_like(start), source
        )
    else:
        keeps = dict(method="encode", mutable=[layers.CACHE])
        hidden, cache = model.apply({"params": params}, *arrays, **keeps)
        hidden = jnp.take_along_axis(hidden, prompt_batch.lengths[:, None, None] - 1, axis=1)
    return hidden[:, 0], _longer(cache[layers.CACHE], room, spec.cache)


def extend(
    model: AnyModel,
    params: Any,
    prompt_batch: Prompts,
    cache: Any,
    ids: Int[Array, "B T"],
    step: Int[Array, ""],
) -> tuple[Float[Array, "B T D"], Any]:
    """(the states of more tokens of each text, of which the first is number `step` after the
    prompt, from 1 on; what is kept with them)."""
    step += jnp.arange(ids.shape[1])[None]
    if model.decodes:
        at = jnp.broadcast_to(step, ids.shape)
        hidden, cache = _decoded(model, params, prompt_batch, cache, ids, at)
    else:
        # Guesses may continue after the last place: what comes of them is thrown away.
        most = model.cfg.max_len - 1 - adapters.positions(model)
        at = jnp.minimum(prompt_batch.lengths[:, None] + step - 1, most)
        hidden, cache = model.apply(
            {"params": params, layers.CACHE: cache},
            *(ids, jnp.ones_like(ids), at, jnp.zeros_like(ids)),
            more=True,
            method="encode",
            mutable=[layers.CACHE],
        )
    return hidden, cache[layers.CACHE]


def logits(
    model: AnyModel, params: Any, hidden: Float[Array, "B D"], spec: DecodeSpec
) -> Float[Array, "B V"]:
    """Logits of the tokens that can be written."""
    return model.apply({"params": params}, hidden, method="logits")[:, : spec.tokens]


def rolled_back(cache: Any, by: Int[Array, ""]) -> Any:
    """The cache without its last `by` columns, which nobody sees any more and what is read next
    is in the place of."""
    flat = paths.flatten(cache)
    return paths.unflatten(
        {name: x - by if name.endswith("/used") else x for name, x in flat.items()}
    )


def ends(ids: Int[Array, "*B"], spec: DecodeSpec) -> Bool[Array, "*B"]:
    """True for the tokens that end a text."""
    return jnp.isin(ids, jnp.asarray(spec.stop, jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5, 6))
def first_token(
    model: AnyModel,
    params: Any,
    prompt_batch: Prompts,
    spec: DecodeSpec,
    how: Sampling,
    room: int,
    rows: int,
) -> DecodeState:
    """The first token of each text, of at most `room`; a single one is in all of the rows."""
    hidden, cache = prefill(model, params, prompt_batch, spec, room)
    hidden, cache, prompt_batch = jax.tree.map(
        lambda x: repeated(x, rows), (hidden, cache, prompt_batch)
    )
    seen = None
    if how.remembers:
        seen = jnp.zeros((rows, spec.tokens), bool)
        if not model.decodes:
            own = jnp.where(
                _real(prompt_batch) > 0, prompt_batch.ids, spec.tokens
            )  # beyond the table: dropped
            seen = seen.at[jnp.arange(rows)[:, None], own].set(True, mode="drop")
    texts = DecodeState(
        ids=jnp.full((rows, room), -1, jnp.int32),
        step=jnp.int32(0),
        done=jnp.zeros(rows, bool),
        broken=jnp.zeros(rows, bool),
        seen=seen,
        cache=cache,
    )
    return _added(model, params, prompt_batch, texts, hidden, spec, how)


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=(3,))
def decode(
    model: AnyModel,
    params: Any,
    prompt_batch: Prompts,
    texts: DecodeState,
    until: Int[Array, ""],
    spec: DecodeSpec,
    how: Sampling,
) -> DecodeState:
    """The texts with tokens up to step `until`, or to where all of them have ended."""

    def unfinished(texts):
        return (texts.step < until) & ~jnp.all(texts.done)

    def longer(texts):
        last = jax.lax.dynamic_slice_in_dim(texts.ids, texts.step - 1, 1, axis=1)
        last = jnp.maximum(last, 0)  # of texts that have ended, whatever it is
        hidden, cache = extend(model, params, prompt_batch, texts.cache, last, texts.step)
        return _added(
            model, params, prompt_batch, texts._replace(cache=cache), hidden[:, 0], spec, how
        )

    return jax.lax.while_loop(unfinished, longer, texts)


def repeated(x: jax.Array, rows: int) -> jax.Array:
    """A single row so often; others and single numbers as they are."""
    return jnp.repeat(x, rows, axis=0) if x.ndim and len(x) == 1 else x


def _real(prompt_batch: Prompts) -> Int[Array, "B P"]:
    """1 where a prompt is, 0 for padding."""
    place = jnp.arange(prompt_batch.ids.shape[1])[None]
    return (place < prompt_batch.lengths[:, None]).astype(jnp.int32)


def _decoded(model, params, prompt_batch, cache, ids, positions, source=None):
    """(states of the target's tokens, what is kept) of an encoder–decoder."""
    variables = {"params": params} | ({layers.CACHE: cache} if cache else {})
    arrays = ids, jnp.ones_like(ids), positions, source, _real(prompt_batch)
    return model.apply(variables, *arrays, method="decode", mutable=[layers.CACHE])


def _added(model, params, prompt_batch, texts, hidden, spec, how) -> DecodeState:
    """The texts with the token that comes after the states (B, D) of the last."""
    found = logits(model, params, hidden, spec)
    ids = chosen(found, how, randomness.fold(prompt_batch.seeds, texts.step), texts.seen)
    seen = texts.seen
    if how.remembers:
        seen = seen.at[jnp.arange(len(ids)), ids].set(True)
    broken = texts.broken | ~(texts.done | usable(found))
    column = jnp.where(texts.done, -1, ids)[:, None]
    return texts._replace(
        ids=jax.lax.dynamic_update_slice(texts.ids, column, (0, texts.step)),
        step=texts.step + 1,
        done=texts.done | broken | ends(ids, spec),
        broken=broken,
        seen=seen,
    )


def _longer(cache: Any, more: int, kept: str) -> Any:
    """The cache of the prompts with room for `more` columns, but where nothing is added; keys and
    values in eight bits where they are to be `kept` so."""
    flat = paths.flatten(cache)
    for name, rows in flat.items():
        if name.endswith("/rows") and f"{name.removesuffix('rows')}used" in flat:
            keys = rows[0].ndim > 2
            axis = 2 if keys else 1
            pad = lambda x, axis=axis: jnp.pad(x, [(0, more * (i == axis)) for i in range(x.ndim)])
            rows = tuple(map(pad, rows))
            flat[name] = tuple(map(precision.coded, rows)) if kept == "int8" and keys else rows
    return paths.unflatten(flat)
