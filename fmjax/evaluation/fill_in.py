"""Fill-in of masked tokens: the most probable ones, and their probabilities."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import adapters, build
from fmjax.checkpoints import pretrained
from fmjax.data import vocabulary
from fmjax.errors import ConfigError
from fmjax.evaluation import eval_loop
from fmjax.models import AnyModel


class Guess(NamedTuple):
    """One candidate for a masked token."""

    id: int
    token: str  # as a person reads it
    probability: float


def encode(sentences: list[str], tokenizer: Any, max_len: int) -> list[dict[str, list[int]]]:
    """Token ids and types of each sentence.

    Raises ConfigError for a sentence that has no mask token or more than `max_len` tokens.
    """
    mask = tokenizer.mask_token
    if mask is None:
        raise ConfigError(
            "The folder's tokenizer has no mask token: it is of another kind of model."
        )
    if not sentences:
        raise ConfigError(
            f'config.text is empty. Give a sentence: --config.text="The {mask} of a function."'
        )
    rows = []
    for sentence in sentences:
        row = tokenizer(sentence, return_token_type_ids=True, verbose=False)
        ids = row["input_ids"]
        if tokenizer.mask_token_id not in ids:
            raise ConfigError(
                f"config.text={sentence!r} has no mask: write {mask} where a word is to be guessed."
            )
        if len(ids) > max_len:
            raise ConfigError(
                f"config.text has a sentence of {len(ids):,} tokens, the model takes {max_len:,}: "
                f"shorten {sentence[:60] + '…'!r}"
            )
        rows.append({"input_ids": ids, "token_types": row["token_type_ids"]})
    return rows


def guesses(
    opened: pretrained.Opened, tokenizer: Any, rows: list[dict[str, list[int]]], top_k: int
) -> list[list[list[Guess]]]:
    """The best `top_k` guesses, best first, for each mask of each row."""
    apply, cfg = build.apply(opened.model), opened.model.cfg
    # Round sizes: the next sentence finds its program compiled. One row at least a device.
    batch = _round_up(len(rows), jax.device_count())
    time = min(_round_up(max(len(row["input_ids"]) for row in rows), 64), room(opened.model))
    arrays = {name: np.zeros((batch, time), np.int32) for name in ("input_ids", "token_types")}
    segment_ids = np.zeros((batch, time), np.int32)
    for i, row in enumerate(rows):
        segment_ids[i, : len(row["input_ids"])] = 1
        for name, array in arrays.items():
            array[i, : len(row[name])] = row[name]
    if problem := vocabulary.beyond(arrays["input_ids"], cfg.vocab_size):
        raise ConfigError(f"config.text cannot be read: {problem}.")
    build.check_types(opened.model, int(arrays["token_types"].max()) + 1)
    positions = np.broadcast_to(np.arange(time, dtype=np.int32), (batch, time))
    masked = np.argwhere((arrays["input_ids"] == tokenizer.mask_token_id) & (segment_ids > 0))
    where = np.zeros((_round_up(len(masked), 8), 2), np.int32)
    where[: len(masked)] = masked

    @jax.jit
    def best(params, input_ids, segment_ids, positions, token_types, where):
        hidden = apply(
            params, input_ids, segment_ids, positions, token_types, method="encode"
        )  # (B, T, D)
        logits = apply(params, hidden[where[:, 0], where[:, 1]], method="logits")  # (M, V)
        return jax.lax.top_k(jax.nn.softmax(logits), min(top_k, cfg.vocab_size))

    probabilities, ids = jax.device_get(
        best(
            opened.params,
            arrays["input_ids"],
            segment_ids,
            positions,
            jnp.asarray(arrays["token_types"]),
            where,
        )
    )
    eval_loop.check_finite(
        probabilities[: len(masked)],
        opened.source,
        lambda i: f"mask {i + 1} of config.text, in sentence {masked[i, 0] + 1}",
    )
    found: list[list[list[Guess]]] = [[] for _ in rows]
    for (row, _), chances, chosen in zip(masked, probabilities, ids, strict=False):
        found[row].append(
            [
                Guess(int(i), _readable(tokenizer, int(i)), float(chance))
                for i, chance in zip(chosen, chances, strict=True)
            ]
        )
    return found


def table(masks: list[list[Guess]], mask: str) -> str:
    """One line a guess, those of the first mask first."""
    width = max(len(guess.token) for guesses in masks for guess in guesses)
    lines = []
    for number, guesses in enumerate(masks, 1):
        label = mask if len(masks) == 1 else f"{mask} {number}"
        for guess in guesses:
            lines.append(f"  {label}  {guess.token:<{width}}  {guess.probability:>7.2%}")
            label = " " * len(label)
    return "\n".join(lines)


def _readable(tokenizer: Any, token: int) -> str:
    """The text of a token; where that is invisible, the name it has in the vocabulary."""
    text = tokenizer.decode([token]).strip()
    if text and text.isprintable():
        return text
    return ascii(tokenizer.convert_ids_to_tokens(token))


def room(model: AnyModel) -> int:
    """Positions that are left for tokens."""
    return model.cfg.max_len - adapters.positions(model)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
