"""Extractive questions: numbers worked out by hand, what must not change them, and parity."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch_heads

from fmjax import build
from fmjax.data.spans import Question
from fmjax.models import bert
from fmjax.objectives import span


def fake(logits):
    """An `apply` that gives these logits (B, T, 2), whatever it is asked."""
    return lambda params, *arrays, method: jnp.asarray(logits, jnp.float32)


def batch(labels, segment_ids):
    real = jnp.asarray(segment_ids, jnp.int32)
    names = ("input_ids", "segment_ids", "positions", "token_types")
    units = jnp.sum(real > 0, axis=1)
    return dict.fromkeys(names, real) | {
        "labels": jnp.asarray(labels),
        "seeds": None,
        "units": units,
    }


def split(questions, windows, offsets):
    """What `score` asks of a split, of these questions."""
    asked = SimpleNamespace(
        of=lambda row: windows[row],
        offsets=lambda row: np.array(offsets[row]),
        read=lambda numbers: {number: questions[number] for number in numbers},
    )
    return SimpleNamespace(questions=asked)


def told(start, end):
    return {"start": np.array(start, np.float32), "end": np.array(end, np.float32)}


CONTEXT = "the cat sat"
WORDS = [[-1, -1], [0, 3], [4, 7], [8, 11]]
CAT = Question(CONTEXT, ["cat", "the cat sat"], "")
NOTHING = Question(CONTEXT, [], "")


def test_loss_is_the_mean_of_both_ends_over_real_tokens():
    """Three real tokens: the first end is one of three equals, the last one certain."""
    logits = np.zeros((1, 4, 2))
    logits[0, 1, 1] = 100.0
    found = span.loss_fn(fake(logits), None, batch([[0, 1]], [[1, 1, 1, 0]]))
    np.testing.assert_allclose(found["loss"], (np.log(3) / 2, 1), rtol=1e-6)
    np.testing.assert_allclose(found["accuracy"], (1, 1))
    wrong = span.loss_fn(fake(logits), None, batch([[1, 1]], [[1, 1, 1, 0]]))
    np.testing.assert_allclose(wrong["accuracy"], (0, 1))


def test_empty_rows_weigh_nothing():
    found = span.loss_fn(fake(np.zeros((2, 2, 2))), None, batch([[0, 0], [0, 0]], [[1, 1], [0, 0]]))
    np.testing.assert_allclose(found["loss"], (np.log(2), 1), rtol=1e-6)


def test_padding_changes_no_number():
    sizes = tiny.SIZES | dict(depth=1, lm_head=False, attention="xla")
    model = bert.Model("tiny", **sizes, classes={"span": 2})
    whole = tiny.batch(4) | {"seeds": None, "labels": jnp.array([[0, 0], [1, 2], [2, 2], [1, 4]])}
    params = jax.jit(model.init)(jax.random.key(0), *model.example())["params"]
    longest = int(jnp.max(jnp.sum(whole["segment_ids"] > 0, axis=1)))
    cut = lambda k, x: x[:, :longest] if k not in ("index", "seeds", "labels", "units") else x
    loss = jax.jit(functools.partial(span.loss_fn, build.apply(model)))
    first, second = (loss(params, x) for x in (whole, {k: cut(k, x) for k, x in whole.items()}))
    assert longest < tiny.T
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-5)


def test_the_best_span_of_all_windows_answers():
    """Two windows of one question: "the" scores 5 in the first, "cat" 6 in the second."""
    both = split([CAT], [0, 0], [WORDS, WORDS])
    found = told([[0, 3, 0, 0], [0, 0, 3, 0]], [[0, 2, 0, 0], [0, 0, 3, 0]])
    rows = np.array([0, 1])
    assert span.score(found, None, split=both, rows=rows) == {"exact_match": 1.0, "f1": 1.0}
    (one,) = span.describe(found, split=both, rows=rows)
    assert one == {"example": 0, "answer": "cat", "score": 6.0, "no_answer": 0.0}
    alone = {key: x[:1] for key, x in found.items()}
    (one,) = span.describe(alone, split=both, rows=rows[:1])
    assert one["answer"] == "the"


def test_an_answer_ends_after_it_begins_within_its_length_and_the_context():
    one = split([CAT], [0], [WORDS])
    answer = lambda start, end, **args: span.describe(
        told([start], [end]), split=one, rows=np.array([0]), **args
    )[0]["answer"]
    assert answer([9, 1, 0, 3], [9, 4, 0, 3]) == "sat"  # 6; backwards it would be 7, [CLS] 18
    assert answer([0, 3, 0, 2], [0, 0, 0, 3]) == "the cat sat"  # 6
    assert answer([0, 3, 0, 2], [0, 0, 0, 3], max_answer=2) == "sat"  # 5
    assert answer([0, 3, 2, 0], [0, 2, 0, 3], n_best=1) == "the cat sat"
    assert answer([0, 0, 3, 0], [0, 3, 0, 0], n_best=1) == ""


def test_cls_wins_only_where_some_questions_have_no_answer():
    found = told([[9, 1, 2, 0], [9, 1, 2, 0]], [[9, 1, 2, 0], [9, 1, 2, 0]])
    rows = np.array([0, 1])
    answered = split([CAT, CAT], [0, 1], [WORDS, WORDS])
    assert span.score(found, None, split=answered, rows=rows)["exact_match"] == 1.0
    mixed = split([CAT, NOTHING], [0, 1], [WORDS, WORDS])
    assert span.score(found, None, split=mixed, rows=rows) == {"exact_match": 0.5, "f1": 0.5}
    # Of two windows the one that has it decides.
    both = [[9, 0, 0, 0], [0, 0, 2, 0], [9, 0, 2, 0]]
    windows = split([CAT, NOTHING], [0, 0, 1], [WORDS] * 3)
    found = span.score(told(both, both), None, split=windows, rows=np.arange(3))
    assert found["exact_match"] == 1.0


def test_words_are_compared_as_squad_does():
    assert span.exact_match("The  Cat's!", "cats") == 1.0
    assert span.exact_match("cat", "a dog") == 0.0
    # Two of two words, two of three: P 1, R 2/3.
    assert span.f1("the cat sat", "a cat sat down") == pytest.approx(0.8)
    assert span.f1("cat cat", "cat") == pytest.approx(2 / 3)  # each word once
    assert (span.f1("", ""), span.f1("", "cat"), span.f1("dog", "cat")) == (1.0, 0.0, 0.0)


def test_logits_and_loss_are_those_of_transformers(tmp_path):
    """On rows without padding, which transformers has compete for the answer."""
    reference = torch_heads.make(
        "BertForQuestionAnswering", "qa_outputs", "span", tmp_path, outputs=2
    )
    labels = np.array([[3, 5], [0, 0]])
    ours, theirs = torch_heads.batch((12, 12), labels)
    found = jax.jit(functools.partial(span.outputs, reference.apply))(reference.params, ours)
    expected = reference.torch(**theirs)
    for ours_, torchs in ((found["start"], expected[0]), (found["end"], expected[1])):
        np.testing.assert_allclose(ours_, torchs.detach().numpy(), atol=2e-5)
    positions = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    torch_heads.losses_agree(reference, ours, theirs, positions)
