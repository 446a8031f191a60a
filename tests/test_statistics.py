"""Statistics against scipy, against numbers made by hand, and by how often they are right."""

import numpy as np
import pytest
from scipy import stats

from fmjax import statistics


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
    compared = statistics.compare(values + 5, np.full(count, 5.0), 0.9)
    assert compared.p == pytest.approx(reference.pvalue)


def test_seeds_and_examples_by_hand():
    # Means of seeds 2 and 4, of examples 1.5, 2.5 and 5; noise ±0.5, ±0.5 and 1.
    found = statistics.estimate(np.array([[1, 2, 3], [2, 3, 7]]))
    seeds, examples = 2 / 2, (1.5**2 + 0.5**2 + 2**2) / 2 / 3
    noise = (4 * 0.5**2 + 2 * 1**2) / 2 / 6
    assert found.mean == 3
    assert found.error**2 == pytest.approx(seeds + examples - noise)
    freedom = (seeds + examples - noise) ** 2 / (seeds**2 + examples**2 / 2 + noise**2 / 2)
    assert found.freedom == pytest.approx(freedom)
    reach = stats.t.ppf(0.975, freedom) * found.error
    assert (found.low, found.high) == pytest.approx((3 - reach, 3 + reach))


@pytest.mark.parametrize("seeds", [3, 10])
@pytest.mark.parametrize(
    "deviations", [(0.01, 0.3, 0.3), (0.2, 0, 0.1), (0.03, 0.4, 0), (0, 0.3, 0.4), (0, 0, 1)]
)
def test_intervals_cover_as_often_as_they_say(seeds, deviations):
    tries = 500
    found = [statistics.estimate(draws(i, seeds, 100, deviations)) for i in range(tries)]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.92 < covered  # a standard error is 0.01
    if deviations[2] < 0.2:  # noise alone is counted twice: too wide is the safe side
        assert covered < 0.98


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


def test_the_detectable_difference_is_found_as_often_as_it_says():
    rng = np.random.default_rng(0)
    true = statistics.detectable(statistics.estimate(np.array([-1, 0, 1, 0.0]) * 1.0), power=0.8)
    error = np.sqrt(2 / 3 / 4)
    values = error * 2 * rng.standard_normal((4000, 4)) + true
    found = np.mean(stats.ttest_1samp(values, 0, axis=1).pvalue <= 0.05)
    assert found == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("freedom", [2, 7.3, 300])
def test_the_detectable_difference_is_that_of_the_noncentral_t(freedom):
    found = statistics.Estimate(0.0, 0.0, 0.0, error=2.0, freedom=freedom)
    shift, critical = statistics.detectable(found, power=0.9) / 2, stats.t.ppf(0.975, freedom)
    power = stats.nct.sf(critical, freedom, shift) + stats.nct.cdf(-critical, freedom, shift)
    assert power == pytest.approx(0.9, abs=1e-3)


def test_verdicts_of_a_family():
    rng = np.random.default_rng(0)
    base = rng.uniform(size=(3, 400)) < 0.7
    better = base | (rng.uniform(size=(3, 400)) < 0.5)
    same = base ^ (rng.uniform(size=(3, 400)) < 0.02)
    found = {
        "better": statistics.compare(better, base),
        "worse": statistics.compare(base, better),
        "same": statistics.compare(same, base),
        "itself": statistics.compare(base, base),
    }
    told = statistics.verdicts(found)
    assert told == {
        "better": "higher", "worse": "lower", "same": "inconclusive", "itself": "inconclusive"
    }  # fmt: skip
    assert found["itself"].p == 1 and found["itself"].detectable == 0


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="two seeds"):
        statistics.estimate(np.zeros((1, 50)))
