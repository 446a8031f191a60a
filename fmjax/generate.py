"""Text that a model goes on with."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmjax import adapters, build, evaluate, pretrained, processes
from fmjax.data import tokenizer as tokenizers
from fmjax.data import vocabulary
from fmjax.errors import ConfigError


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: prints `config.count` continuations of `config.prompt`, each drawn by itself.

    The folder is a run's, one in Hugging Face format, or a hub id.
    """
    with processes.start(config) as mesh:
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        if dry_run:
            words = tokenizers.load(opened.tokenizer)
            prompt_ids(opened.model, words, config.to_dict(), _trained(opened))
            return
        found = texts(opened, config.to_dict(), config.seed)
    if jax.process_index() == 0:
        print(f"\n{opened}\n")
        print(shown(config.prompt, found))


def texts(opened: pretrained.Opened, how: Mapping[str, Any], seed: int) -> list[str]:
    """`how["count"]` continuations of `how["prompt"]`, each up to its end or of `how["length"]`
    tokens."""
    words = tokenizers.load(opened.tokenizer)
    ids = prompt_ids(opened.model, words, how, _trained(opened))
    row = np.zeros(len(ids) + how["length"], np.int32)
    row[: len(ids)] = ids
    rows = np.tile(row, (how["count"], 1))
    model = opened.model
    prefix = opened.config is not None and "prefix_lm" in opened.config.objectives
    drawn = len(ids), how["temperature"], how["top_k"], min(len(words), model.cfg.vocab_size)
    out = evaluate.on_host(
        _written(build.apply(model), opened.params, rows, jax.random.key(seed), *drawn, prefix)
    )
    _, last = vocabulary.around(words)
    found = []
    for new in out[:, len(ids) :].tolist():
        end = new.index(last[0]) if last and last[0] in new else len(new)
        # Together with the prompt: alone, a first token may lose the space before it.
        before, whole = words.decode(ids), words.decode([*ids, *new[:end]])
        found.append(whole.removeprefix(before))
    return found


def shown(prompt: str, texts: Sequence[str]) -> str:
    """The continuations behind their prompt, a line between them."""
    return "\n---\n".join(prompt + text for text in texts)


def prompt_ids(
    model: Any, words: Any, how: Mapping[str, Any], trained: int | None, of: str = "config"
) -> list[int]:
    """The tokens of `how["prompt"]`, behind those that begin a document.

    `trained` is how long the rows of training were, None where nobody knows; `of` what the keys of
    `how` are keys of.

    Raises ConfigError for a model that does not write, a prompt of nothing that no token begins,
    and one that leaves no room for `how["length"]` more.
    """
    if model.decodes:
        raise ConfigError(
            "the model is an encoder–decoder, which this task does not write with: give the run to "
            "configs/export.py, and its folder to transformers, which does."
        )
    if not model.causal:
        raise ConfigError(
            "the model is an encoder, which fills gaps (configs/fill_mask.py) but does not go on "
            "with a text: give config.folder of a decoder, as configs/clm.py trains one."
        )
    if len(words) > model.cfg.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(words):,} tokens, the model {model.cfg.vocab_size:,}: they do "
            "not belong together."
        )
    first, _ = vocabulary.around(words)
    ids = [*first, *words(how["prompt"], add_special_tokens=False)["input_ids"]]
    if not ids:
        raise ConfigError(
            f"{of}.prompt is empty, and the tokenizer has no token that begins a text: give one."
        )
    room = model.cfg.max_len - adapters.positions(model)
    if trained is not None and not adapters.base(model).endless:
        room = min(room, trained)
    if len(ids) + how["length"] > room:
        raise ConfigError(
            f"{of}.prompt has {len(ids)} tokens and {of}.length={how['length']}, but the model has "
            f"{room} positions that were trained: make one of them shorter."
        )
    return ids


def _trained(opened: pretrained.Opened) -> int | None:
    """How long the rows were that the model was trained on."""
    return opened.config.data.seq_len if opened.config else None


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7, 8))
def _written(
    apply: Any,
    params: Any,
    rows: Int[Array, "B T"],
    key: jax.Array,
    known: int,
    temperature: float,
    top_k: int | None,
    tokens: int,
    prefix: bool = False,
) -> Int[Array, "B T"]:
    """The rows with all behind the first `known` tokens drawn, one after the other, of the first
    `tokens` of the vocabulary: a model may have rows that no token stands for. With `prefix` what
    is known is read in both directions."""
    ones = jnp.ones_like(rows)
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1])[None], rows.shape)
    types = (positions < known if prefix else positions < 0).astype(rows.dtype)

    def one(t, rows):
        # What is behind is not seen, whatever stands there.
        hidden = apply(params, rows, ones, positions, types, method="encode")
        logits = apply(params, hidden[:, t - 1], method="logits")[:, :tokens]
        return rows.at[:, t].set(_drawn(logits, jax.random.fold_in(key, t), temperature, top_k))

    return jax.lax.fori_loop(known, rows.shape[1], one, rows)


def _drawn(
    logits: Float[Array, "B V"], key: jax.Array, temperature: float, top_k: int | None
) -> Int[Array, "B"]:
    """A token of each row: at temperature 0 the likeliest, else one of the `top_k` (None: all)."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    # A stream a row: what a row says does not depend on how many there are.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits)))
    return jax.vmap(jax.random.categorical)(keys, logits / temperature).astype(jnp.int32)
