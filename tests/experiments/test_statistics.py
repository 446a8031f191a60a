"""Statistics against scipy, against numbers made by hand, and by how often they are right."""

import numpy as np
import pytest
from scipy import stats

from fmjax.experiments import statistics


def draws(seed, seeds, examples, deviations):
    """[seeds, examples] around zero: what a seed adds, what an example adds, and noise."""
    rng = np.random.default_rng(seed)
    by_seed, by_example, noise = deviations
    return (
        by_seed * rng.standard_normal((seeds, 1))
        + by_example * rng.standard_normal((1, examples))
        + noise * rng.standard_normal((seeds, examples))
    )


@pytest.mark.parametrize("count", [2, 3, 20])
def test_of_seeds_alone_the_interval_is_students(count):
    values = np.random.default_rng(count).standard_normal(count)
    found = statistics.estimate(values, 0.9)
    reference = stats.ttest_1samp(values, 0)
    np.testing.assert_allclose(found[1:3], reference.confidence_interval(0.9), rtol=1e-12)
    assert statistics.p_value(found) == pytest.approx(reference.pvalue)
    far = statistics.p_value(statistics.estimate(values + 1e4))
    assert far == pytest.approx(stats.ttest_1samp(values + 1e4, 0).pvalue)


def test_seeds_and_examples_by_hand():
    # Means of seeds 2 and 4, of examples 1.5, 2.5 and 5.
    found = statistics.estimate(np.array([[1, 2, 3], [2, 3, 7]]))
    seeds, examples = 2 / 2, (1.5**2 + 0.5**2 + 2**2) / 2 / 3
    assert found.mean == 3
    assert found.parts == (pytest.approx((seeds, 1)), pytest.approx((examples, 2)))
    assert found.error**2 == pytest.approx(seeds + examples)
    reach = np.hypot(12.7062 * seeds**0.5, 4.3027 * examples**0.5)  # Student's t, from a table
    assert (found.low, found.high) == pytest.approx((3 - reach, 3 + reach), rel=1e-5)
    p = statistics.p_value(found)
    assert statistics.estimate(np.array([[1, 2, 3], [2, 3, 7]]), 1 - p).low == pytest.approx(0)


DEVIATIONS = [
    (0.01, 0.3, 0.3), (0.02, 0.3, 0.3), (0.04, 0.3, 0.3), (0.15, 0.3, 0.3), (0.2, 0, 0.1),
    (0.03, 0.4, 0), (0, 0.3, 0.4), (0, 0, 1)
]  # fmt: skip


@pytest.mark.parametrize("seeds", [2, pytest.param(3, marks=pytest.mark.slow), 10])
@pytest.mark.parametrize("deviations", DEVIATIONS)
def test_intervals_cover_as_often_as_they_say(seeds, deviations):
    """And the first step of Holm's correction of 12 tests errs as seldom as it says."""
    tries = 600
    found = [statistics.estimate(draws(i, seeds, 100, deviations)) for i in range(tries)]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.93 < covered  # a standard error is 0.009
    if deviations[1] == 0 and deviations[2] < 0.2:  # of two sources it is on the safe side
        assert covered < 0.98
    wrong = np.mean([statistics.p_value(one) <= 0.05 / 12 for one in found])
    assert wrong <= 0.013  # 0.0042, and three standard errors


def test_a_bootstrap_of_three_seeds_covers_too_little():
    """Why Student's interval is taken."""
    rng, covered, tries = np.random.default_rng(0), 0, 400
    for _ in range(tries):
        values = rng.standard_normal(3)
        means = values[rng.integers(3, size=(500, 3))].mean(1)
        low, high = np.percentile(means, [2.5, 97.5])
        covered += low <= 0 <= high
    assert covered / tries < 0.85


@pytest.mark.parametrize("count", [3, 6, 12, 40])
def test_exchanged_pairs_are_those_of_scipy(count):
    values = np.random.default_rng(count).standard_normal(count) + 0.4
    reference = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=20_000, rng=1
    )
    tolerance = 1e-12 if count <= statistics.EXACT else 0.01
    assert statistics.signs(values) == pytest.approx(reference.pvalue, abs=tolerance)


def test_few_pairs_cannot_be_significant():
    for pairs in (3, 5, 6):
        assert statistics.signs(np.arange(1.0, pairs + 1)) == 2.0 ** (1 - pairs)


def test_holm_by_hand():
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1, 1] and statistics.holm([0.02]) == [0.02]
    assert statistics.holm([]) == []


def test_holm_keeps_the_errors_of_a_family():
    p = np.random.default_rng(0).uniform(size=(2000, 8))
    wrong = np.mean([min(statistics.holm(row)) <= 0.05 for row in p])
    assert 0.03 < wrong < 0.065
    assert np.mean(p.min(1) <= 0.05) > 0.3  # without it


@pytest.mark.parametrize("level", [0.95, 1 - 0.05 / 12])
@pytest.mark.parametrize("seeds", [3, 6])
def test_the_detectable_difference_is_found_as_often_as_it_says(seeds, level):
    by_seed, by_example, examples = 0.02, 0.3, 80
    parts = (by_seed**2 / seeds, seeds - 1), (by_example**2 / examples, examples - 1)
    true = statistics.detectable(statistics.Estimate(0.0, 0.0, 0.0, parts), level)
    tries = 600
    found = [
        statistics.estimate(true + draws(i, seeds, examples, (by_seed, by_example, 0)), level)
        for i in range(tries)
    ]
    assert np.mean([one.low > 0 for one in found]) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("freedom", [2, 7, 300])
def test_the_detectable_difference_of_seeds_alone_is_that_of_the_noncentral_t(freedom):
    found = statistics.Estimate(0.0, 0.0, 0.0, ((4.0, freedom),))
    shift, critical = statistics.detectable(found, power=0.9) / 2, stats.t.ppf(0.975, freedom)
    power = stats.nct.sf(critical, freedom, shift) + stats.nct.cdf(-critical, freedom, shift)
    assert power == pytest.approx(0.9, abs=1e-3)


def test_two_runs_that_agree_to_the_last_digit_are_no_certainty():
    same = statistics.estimate(np.array([0.82, 0.84]) - np.array([0.80, 0.82]))
    assert np.isnan(statistics.p_value(same))
    assert statistics.verdict(same, statistics.p_value(same)) == "inconclusive"
    nothing = statistics.estimate(np.zeros(3))
    assert statistics.p_value(nothing) == 1 and statistics.detectable(nothing) == 0


def test_a_verdict_is_of_the_corrected_p():
    more, less = (statistics.estimate(np.array([a, 2 * a, 3 * a])) for a in (1.0, -1.0))
    assert statistics.verdict(more, 0.04) == "higher" and statistics.verdict(less, 0.04) == "lower"
    assert statistics.verdict(more, 0.06) == "inconclusive"
    assert statistics.verdict(more, 0.04, level=0.99) == "inconclusive"


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="two seeds"):
        statistics.estimate(np.zeros((1, 50)))
