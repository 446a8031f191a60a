"""The n-gram baseline, by hand."""

import sys

import numpy as np
import pytest
from common import ROOT

sys.path.insert(0, f"{ROOT}/benchmarks")
import ngram  # noqa: E402


def test_a_bigram_by_hand():
    """a b a b a c: behind a are b, b and c; b is behind one token, a behind one, c behind one."""
    model = ngram.Model(np.array([0, 1, 0, 1, 0, 2]), 2, 4, [])
    single = 1 / 3 - 0.75 / 3 + 0.75 * 3 / 3 / 4  # three kinds of pairs' ends, and a fourth token
    assert model.probabilities(np.array([0, 1]), 1)[0] == pytest.approx(
        (2 - 0.75) / 3 + 0.75 * 2 / 3 * single
    )
    assert model.probabilities(np.array([0, 3]), 1)[0] == pytest.approx(
        0.75 * 2 / 3 * 0.75 * 3 / 3 / 4
    )
    assert model.probabilities(np.array([3, 1]), 1)[0] == pytest.approx(single)


@pytest.mark.parametrize("order", [1, 3, 4])
def test_probabilities_sum_to_one_behind_any_text(order):
    tokens = np.random.default_rng(0).integers(0, 6, 400)
    model = ngram.Model(tokens, order, 7, [])
    for before in ([], [3], [1, 2, 3, 4], [6, 6, 0, 1]):
        each = [model.probabilities(np.array([*before, i]), len(before))[0] for i in range(7)]
        assert sum(each) == pytest.approx(1)


def test_long_texts_are_judged_like_short_ones():
    model = ngram.Model(np.arange(50) % 7, 3, 8, [0])
    one, other = model([([1, 2], [3]), ([], [1])])
    assert one.nats == pytest.approx(-np.log(model.probabilities(np.array([0, 1, 2, 3]), 3)[0]))
    assert other.tokens == 1 and one.nats < 1
