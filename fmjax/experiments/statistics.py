"""Statistics of training runs: differences, their errors, and what the runs at hand could show at
all.

A way of training is measured with several seeds, each on the same examples: values [seeds] or
[seeds, examples], such as 1 for a right answer and 0 for a wrong one. Two ways are compared pair by
pair, with the same seeds and the same examples. What is concluded is meant for other seeds and
other examples than those at hand, so that the variance of both counts.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EXACT = 12  # pairs up to which all 2^n signs are tried


class Estimate(NamedTuple):
    """A mean with its interval."""

    mean: float
    low: float
    high: float
    # (variance of the mean, its degrees of freedom): by the seeds, and by the examples
    parts: tuple[tuple[float, int], ...]

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return float(np.sqrt(sum(variance for variance, _ in self.parts)))


def estimate(values: np.ndarray, level: float = 0.95) -> Estimate:
    """The mean of [seeds] or [seeds, examples], for other seeds and other examples.

    Of seeds alone this is Student's interval. Of both its half is the root of two squares: what
    Student's would be of the means of seeds, and of the means of examples. The noise that both
    contain is counted twice, so that in simulations of 2 to 10 seeds it covers as often as it says,
    or more (see the tests). Satterthwaite's degrees of freedom of the two-way model, and a
    bootstrap of seeds and examples (Owen 2007), cover too little with 2 or 3 seeds.

    Raises ValueError for fewer than two seeds.
    """
    values = np.asarray(values, np.float64)
    if values.ndim == 1:
        values = values[:, None]
    seeds, examples = values.shape
    if seeds < 2:
        raise ValueError("an interval needs two seeds at least")
    parts = [(float(values.mean(1).var(ddof=1)) / seeds, seeds - 1)]
    if examples > 1:
        parts.append((float(values.mean(0).var(ddof=1)) / examples, examples - 1))
    mean, reach = float(values.mean()), _reach(parts, 1 - level)
    return Estimate(mean, mean - reach, mean + reach, tuple(parts))


def p_value(found: Estimate) -> float:
    """Two-sided, of a mean of zero: one less the level of the interval that just reaches it. NaN
    where nothing varies, as with two seeds that agree to the last digit: that is no certainty."""
    if found.error <= 1e-9 * max(1.0, abs(found.mean)):
        return 1.0 if found.mean == 0 else float("nan")
    from scipy import optimize  # inside, as its second is not for everybody who lists a sweep

    beyond = lambda log: _reach(found.parts, np.exp(log)) - abs(found.mean)
    least = np.log(1e-60)
    return float(np.exp(optimize.brentq(beyond, least, 0))) if beyond(least) > 0 else 0.0


def _reach(parts: Sequence[tuple[float, int]], miss: float) -> float:
    """Half of the interval that misses the mean in the share `miss` of all cases."""
    from scipy import stats

    squares = [variance * stats.t.isf(miss / 2, freedom) ** 2 for variance, freedom in parts]
    return float(np.sqrt(sum(squares)))


def signs(differences: np.ndarray, draws: int = 10_000, seed: int = 0) -> float:
    """p of the paired permutation test: how often the mean is as far from zero when each pair is
    exchanged at random (Good 2005, ch. 3); all signs are tried where there are few. With n pairs it
    is 2^(1-n) at least."""
    x = np.asarray(differences, np.float64)
    if len(x) <= EXACT:
        flips = np.array(list(itertools.product((1, -1), repeat=len(x))))
        at_least = 0
    else:
        flips = np.random.default_rng(seed).choice((1, -1), (draws, len(x)))
        at_least = 1  # the data themselves
    means = np.abs(flips @ x)
    hits = np.count_nonzero(means >= abs(x.sum()) * (1 - 1e-12))
    return float((hits + at_least) / (len(flips) + at_least))


def holm(p: Sequence[float] | np.ndarray) -> list[float]:
    """The p values of a family of tests, raised so that no more than 5 % of families have a wrong
    one below 5 % (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate([p[i] * (len(p) - rank) for rank, i in enumerate(order)])
    found = np.empty(len(p))
    found[order] = np.minimum(raised, 1)
    return found.tolist()


def detectable(found: Estimate, level: float = 0.95, power: float = 0.8) -> float:
    """The true difference that an interval of this level would keep apart from zero in `power` of
    all cases, if errors are what they were found to be."""
    from scipy import optimize, stats

    if not found.error:
        return 0.0
    # Over what the variances may be estimated as; of each as many as of the other, in no order.
    shares = (np.arange(4000) + 0.5) / 4000
    squares = np.zeros(len(shares))
    for number, (variance, freedom) in enumerate(found.parts):
        drawn = np.random.default_rng(number).permutation(stats.chi2.ppf(shares, freedom) / freedom)
        squares += drawn * variance * stats.t.isf((1 - level) / 2, freedom) ** 2
    bounds = np.sqrt(squares) / found.error

    def lacking(shift):
        return np.mean(stats.norm.sf(bounds - shift) + stats.norm.cdf(-bounds - shift)) - power

    most = 1.0
    while lacking(most) < 0:
        most *= 2
    return float(optimize.brentq(lacking, 0, most) * found.error)


def verdict(found: Estimate, p: float, level: float = 0.95) -> str:
    """higher, lower or inconclusive, by a p value that is corrected already."""
    if not p <= 1 - level:
        return "inconclusive"
    return "higher" if found.mean > 0 else "lower"
