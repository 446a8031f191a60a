"""Extractive question answering: the span of a context that answers (Devlin et al. 2019, §4.2-4.3).

The examples are `config.data.format = "spans"`. Every token is given a score to be the first and
one to be the last of the answer; [CLS] stands for "not in this window". Scores are of whole
questions: the best span of all windows of a context, as text. Where some questions of a split have
no answer (SQuAD v2), none is given where [CLS] scores higher than every span.
"""

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.objectives import losses

TARGET = "spans"
SCORES = ("exact_match", "f1")


class Guess(NamedTuple):
    """The answer to one question, and the sums of logits of its span and of having no answer."""

    text: str
    score: float
    none: float


def heads(labels: Sequence[str]) -> dict[str, int]:
    """The linear heads that the objective needs: {name: outputs}."""
    return {"span": 2}


def loss_fn(
    apply: Callable, params: Any, batch: Mapping[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The mean cross-entropy in nats of first and last token, `labels` (B, 2), over the real tokens
    of the row; and how often both are right. Empty rows weigh nothing."""
    logits, labels = _logits(apply, params, batch), batch["labels"]
    weights = losses.real_rows(batch)
    nats = jnp.mean(losses.cross_entropy(logits, labels), axis=-1)
    right = jnp.all(jnp.argmax(logits, axis=-1) == labels, axis=-1).astype(jnp.float32)
    weight = jnp.sum(weights)
    return {
        "loss": (jnp.sum(nats * weights), weight),
        "accuracy": (jnp.sum(right * weights), weight),
    }


def outputs(apply: Callable, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`start` and `end` (B, T): the logits of each token."""
    logits = _logits(apply, params, batch)
    return {"start": logits[:, 0], "end": logits[:, 1]}


def score(
    found: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    *,
    split: Any,
    rows: np.ndarray,
    n_best: int = 20,
    max_answer: int = 30,
) -> dict[str, float]:
    """The share of questions answered word for word, and the mean F1 of the words, each with the
    most favourable of the right answers (Rajpurkar et al. 2016, §6.1). Windows that are not among
    the `rows` are not looked at."""
    guesses, questions = _guesses(found, split.questions, rows, n_best, max_answer)
    compared = [
        [(guess.text, answer) for answer in questions[number].answers or [""]]
        for number, guess in guesses.items()
    ]
    mean = lambda measure: float(np.mean([max(measure(*x) for x in pairs) for pairs in compared]))
    return {"exact_match": mean(exact_match), "f1": mean(f1)}


def describe(
    found: Mapping[str, np.ndarray],
    *,
    split: Any,
    rows: np.ndarray,
    n_best: int = 20,
    max_answer: int = 30,
) -> list[dict[str, Any]]:
    """For each question, not each row: its `example` number and answer, and the logits for it."""
    guesses, _ = _guesses(found, split.questions, rows, n_best, max_answer)
    return [
        {"example": number, "answer": guess.text, "score": guess.score, "no_answer": guess.none}
        for number, guess in guesses.items()
    ]


def exact_match(guess: str, answer: str) -> float:
    """1.0 where both are the same words, in their order."""
    return float(_words(guess) == _words(answer))


def f1(guess: str, answer: str) -> float:
    """The harmonic mean of precision and recall of the words; of no words, whether both have
    none."""
    ours, right = _words(guess), _words(answer)
    if not ours or not right:
        return float(ours == right)
    common = (collections.Counter(ours) & collections.Counter(right)).total()
    return 2 * common / (len(ours) + len(right))


def _words(text: str) -> list[str]:
    """As SQuAD compares: lower case, without ASCII punctuation and articles."""
    letters = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def _guesses(
    found: Mapping[str, np.ndarray], asked: Any, rows: np.ndarray, n_best: int, max_answer: int
) -> tuple[dict[int, Guess], dict[int, Any]]:
    """({number: guess}, {number: question}) of the questions with windows among `rows`."""
    rows = rows.tolist()
    questions = asked.read(dict.fromkeys(asked.of(row) for row in rows))
    may_lack = any(not question.answers for question in questions.values())
    may_lack &= any(question.answers for question in questions.values())  # else: none are known
    guesses: dict[int, Guess] = {}
    for start, end, row in zip(found["start"], found["end"], rows, strict=True):
        number, none = asked.of(row), float(start[0] + end[0])
        best = guesses.get(number, Guess("", -np.inf, np.inf))
        span, value = _best_span(start, end, asked.offsets(row), n_best, max_answer)
        if value > best.score:
            best = best._replace(text=questions[number].context[slice(*span)], score=value)
        # What is in no window is in none of them: the most doubtful of them decides.
        guesses[number] = best._replace(none=min(best.none, none))
    if may_lack:
        empty = lambda guess: guess._replace(text="") if guess.none > guess.score else guess
        guesses = {number: empty(guess) for number, guess in guesses.items()}
    return guesses, questions


def _best_span(
    start: np.ndarray, end: np.ndarray, offsets: np.ndarray, n_best: int, max_answer: int
) -> tuple[tuple[int, int], float]:
    """((first character, the one after the last), sum of logits) of the best span of a window,
    among the `n_best` tokens to start with and as many to end with."""
    context = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(context):
        return (0, 0), -np.inf
    top = lambda logits: context[np.argsort(-logits[context], kind="stable")[:n_best]]
    first, last = top(start), top(end)
    length = last[None] - first[:, None] + 1
    sums = start[first][:, None] + end[last][None]
    sums = np.where((length > 0) & (length <= max_answer), sums, -np.inf)
    i, j = np.unravel_index(sums.argmax(), sums.shape)
    return (int(offsets[first[i], 0]), int(offsets[last[j], 1])), float(sums[i, j])


def _logits(apply: Callable, params: Any, batch: Mapping[str, jax.Array]) -> Float[Array, "B 2 T"]:
    """Logits of first and last; those of padding are as good as minus infinity."""
    hidden = apply(params, batch, method="encode")
    # Without dropout before the head, which BERT has on all heads but this one.
    logits = apply(params, hidden, "span", None, method="project").swapaxes(1, 2)
    return jnp.where(batch["segment_ids"][:, None] > 0, logits, jnp.float32(-1e30))
