"""Scores of classification, by hand."""

import numpy as np
import pytest

from fmjax.objectives import classify


def test_calibration_by_hand():
    """Four texts told with 0.95, 0.95, 0.6 and 0.6; the first two right, one of the others."""
    told = np.array([[0.95, 0.05], [0.05, 0.95], [0.6, 0.4], [0.6, 0.4]])
    found = classify.score({"probabilities": told}, np.array([0, 1, 0, 1]))
    # Bins: 2 texts of confidence 0.95 and accuracy 1, 2 of 0.6 and 0.5.
    assert found["ece"] == pytest.approx(0.5 * 0.05 + 0.5 * 0.1)
    squares = 2 * 0.05**2, 2 * 0.05**2, 2 * 0.4**2, 2 * 0.6**2
    assert found["brier"] == pytest.approx(np.mean(squares))


def test_a_model_that_tells_nothing_is_not_calibrated():
    found = classify.score({"probabilities": np.full((4, 2), np.nan)}, np.array([0, 1, 0, 1]))
    assert np.isnan(found["ece"]) and np.isnan(found["brier"])


def test_calibration_at_its_ends():
    sure = np.eye(3)
    right = classify.score({"probabilities": sure}, np.arange(3))
    wrong = classify.score({"probabilities": sure}, (np.arange(3) + 1) % 3)
    assert (right["ece"], right["brier"]) == (0.0, 0.0)
    assert (wrong["ece"], wrong["brier"]) == (1.0, 2.0)
