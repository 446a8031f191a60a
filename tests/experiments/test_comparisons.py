"""Groups of results, and what one has more than the first."""

import json

import numpy as np
import pytest
from scipy import stats

from fmjax.errors import CheckpointError, ConfigError
from fmjax.experiments import comparisons, statistics
from fmjax.io import progress

METRIC = "validation/classify/accuracy"


def test_groups_at_equal_budgets(tmp_path):
    """Two runs of 40 and 20 steps, evaluated each 10; a step of the first takes half the FLOPs."""
    found = []
    for name, steps, flops in (("a", 40, 5.0), ("b", 20, 10.0)):
        results = {}
        for seed in (0, 1):
            folder = tmp_path / f"{name}{seed}"
            folder.mkdir()
            lines = [{"step": s, "time": s, "flops": flops * s} for s in range(5, steps + 1, 5)]
            lines += [
                {"step": s, "time": s, METRIC: s / 100 + seed} for s in range(10, steps + 1, 10)
            ]
            lines.sort(key=lambda line: line["step"])
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text)
            results[seed] = {"folder": str(folder), "metrics": {METRIC: 9.0}, "examples": {}}
        found.append(comparisons.Group(name, {}, results))
    of = lambda groups: [[g.values(METRIC)[seed] for seed in (0, 1)] for g in groups]
    most, groups = comparisons.at_equal(found, METRIC, "step")
    assert most == 20 and of(groups) == [[0.2, 1.2], [0.2, 1.2]]
    # Both come to 200 FLOPs, the first after 40 steps: nothing that the ends do not say.
    assert comparisons.at_equal(found, METRIC, "flops") is None
    assert comparisons.at_equal(found, METRIC, "tokens") is None  # of which the logs say nothing
    assert comparisons.at_equal(found, "validation/other", "step") is None


def record(settings, *values, arms=False, seed=0):
    """Of a trial with an arm for each seed, or of one seed."""
    results = [
        {"seed": seed + i, "arm": {"seed": seed + i} if arms else {}, "metrics": {METRIC: value}}
        for i, value in enumerate(values)
    ]
    return {"settings": settings, "results": results}


def test_results_that_differ_in_the_seed_are_a_group():
    records = [
        record({"arg": "lora", "seed": 0, "total": 5}, 0.8),
        record({"arg": "lora", "seed": 1, "total": 5}, 0.9, seed=1),
        record({"arg": "head", "total": 5}, 0.5, 0.6, arms=True),
        record({"total": 5}, 0.4, seed=7),
    ]
    found = comparisons.groups(records)
    assert [group.name for group in found] == ["lora", "head", "no arg"]
    values = [group.values(METRIC) for group in found]
    assert values == [{0: 0.8, 1: 0.9}, {0: 0.5, 1: 0.6}, {7: 0.4}]
    assert found[0].values("other") == {}
    both = comparisons.groups(
        [record({"arg": "lora", "optim.lr": lr}, 0.8) for lr in (1e-3, 1e-4)]
        + [record({"arg": "head"}, 0.8)]
    )
    assert [group.name for group in both] == [
        "lora, optim.lr=0.001", "lora, optim.lr=0.0001", "head"
    ]  # fmt: skip
    words = [record({"arg": f"{method},depth=6"}, 0.8) for method in ("head", "full")]
    assert [group.name for group in comparisons.groups(words)] == ["head", "full"]
    assert [group.name for group in comparisons.groups(words[:1])] == ["the config"]
    with pytest.raises(ConfigError, match="have the seed 0"):
        comparisons.groups([records[0], records[0]])


def test_groups_are_compared_seed_by_seed():
    rng = np.random.default_rng(0)
    seeds = rng.standard_normal(6)  # what a seed does to all of them
    first, other, far = (
        0.7 + 0.1 * seeds + 0.003 * rng.standard_normal(6) + up for up in (0, 0.02, 0)
    )
    records = [
        record({"arg": "head"}, *first),
        record({"arg": "lora"}, *other[::-1], arms=True),
        record({"arg": "full"}, *far[:1]),
        record({"arg": "nan"}, 0.5, "NaN"),
    ]
    for i, result in enumerate(records[1]["results"]):
        result["seed"] = 5 - i  # in another order
    rows = comparisons.compare(comparisons.groups(records), METRIC)
    assert [row.verdict for row in rows] == ["", "higher", "", ""]
    wanted = statistics.estimate(other - first)
    np.testing.assert_allclose(rows[1].more[:3], wanted[:3])
    np.testing.assert_allclose(rows[1].interval[:3], statistics.estimate(other)[:3])
    assert rows[1].p == pytest.approx(statistics.p_value(wanted))
    assert rows[1].p_signs == statistics.signs(other - first)
    assert rows[1].detectable == pytest.approx(statistics.detectable(wanted))
    assert wanted.high - wanted.low < 0.02  # though seeds are far apart
    assert rows[2].interval is None and rows[2].mean == far[0] and np.isnan(rows[3].mean)
    told = progress.table(comparisons.shown(rows, METRIC)).splitlines()
    assert len(told) == 5 and "higher" in told[2] and told[2].startswith("lora")


def test_a_group_of_which_one_failed_is_not_judged_by_the_others():
    rng = np.random.default_rng(2)
    records = [record({"arg": "head"}, *rng.normal(0.5, 0.01, 5), arms=True)]
    for seed in range(4):
        records.append(record({"arg": "lora", "seed": seed}, 0.9 + 0.01 * seed, seed=seed))
    whole = comparisons.compare(comparisons.groups(records), METRIC)
    assert whole[1].verdict == "higher"
    records.append({"settings": {"arg": "lora", "seed": 4}, "results": [], "reason": "NaN"})
    rows = comparisons.compare(comparisons.groups(records), METRIC)
    assert rows[1].verdict == "" and rows[1].more is None and rows[1].group.failed == 1
    assert "4, 1 failed" in progress.table(comparisons.shown(rows, METRIC))
    # An arm beside others, too; its last numbers are not taken.
    records[0]["results"][2]["failed"] = "NaN"
    assert 2 not in comparisons.groups(records)[0].values(METRIC)


def test_what_has_no_seed_is_the_same_with_each():
    rng = np.random.default_rng(3)
    values = rng.normal(0.8, 0.01, 4)
    constant = record({"arg": "words"}, 0.7)
    constant["results"][0]["seed"] = None
    trained = record({"arg": "full"}, *values, arms=True)
    for records, sign in (([constant, trained], 1), ([trained, constant], -1)):
        _, row = comparisons.compare(comparisons.groups(records), METRIC)
        reference = stats.ttest_1samp(values, 0.7)
        assert row.p == pytest.approx(reference.pvalue)
        assert row.more.mean == pytest.approx(sign * (values.mean() - 0.7))
        assert row.verdict == ("higher" if sign > 0 else "lower")


def test_examples_are_paired_too():
    rng = np.random.default_rng(4)
    gains = {"a": 0, "b": rng.uniform(-0.4, 0.6, 500)}  # of one way by some examples
    right = {name: rng.uniform(size=(3, 500)) < 0.5 + gain for name, gain in gains.items()}
    records = [record({"arg": name}, *values.mean(1), arms=True) for name, values in right.items()]
    means = comparisons.compare(comparisons.groups(records), METRIC)
    for one, values in zip(records, right.values(), strict=True):
        for result, row in zip(one["results"], values, strict=True):
            examples = {"classify/accuracy": row, "label": np.arange(500) % 3}
            result |= {"examples": examples, "folder": "."}
    rows = comparisons.compare(comparisons.groups(records), METRIC)
    wanted = statistics.estimate(right["b"] * 1.0 - right["a"])
    np.testing.assert_allclose(rows[1].more[:3], wanted[:3])
    assert rows[1].mean == pytest.approx(means[1].mean)
    assert rows[1].more.error > 1.01 * means[1].more.error
    # Other examples are no matter of difference; one that does not know them has its mean.
    records[0]["results"][2]["examples"]["label"] = np.arange(500) % 2
    some = comparisons.compare(comparisons.groups(records), METRIC)
    assert some[1].more is None
    records[0]["results"][2]["examples"]["label"] = np.arange(500) % 3
    del records[1]["results"][0]["examples"]
    some = comparisons.compare(comparisons.groups(records), METRIC)
    np.testing.assert_allclose(some[1].more[:3], means[1].more[:3])
    records[0]["results"][0]["metrics"] = {METRIC: 0.1}
    with pytest.raises(CheckpointError, match="not of the same evaluation"):
        comparisons.compare(comparisons.groups(records), METRIC)


def test_the_family_is_corrected():
    rng = np.random.default_rng(1)
    records = [record({"arg": str(i)}, *rng.standard_normal(5)) for i in range(6)]
    rows = comparisons.compare(comparisons.groups(records), METRIC)
    alone = [statistics.p_value(row.more) for row in rows[1:]]
    assert [row.p for row in rows[1:]] == statistics.holm(alone) != alone
    level = 1 - 0.05 / 5  # of the first step: what the verdict asks for
    for row in rows[1:]:
        assert row.detectable == statistics.detectable(row.more, level)


def test_each_is_compared_with_what_is_set_like_it_in_all_but_the_first_key():
    of = lambda *settings: [comparisons.Group("", own, {}) for own in settings]
    product = of(*({"arg": base, "n": n} for base in "ab" for n in (1, 2)))
    assert comparisons.references(product) == [0, 1, 0, 1]
    product = of(*({"arg": base, "n": n} for n in (1, 2) for base in "abc"))
    assert comparisons.references(product) == [0, 0, 0, 3, 3, 3]
    assert comparisons.references(of({"a": 1}, {"a": 2}, {"a": 3})) == [0, 0, 0]
    chained = of({"arg": "head"}, {"arg": "lora", "rank": 4}, {"arg": "lora", "rank": 8})
    assert comparisons.references(chained) == [0, 0, 0]
    assert comparisons.references(of({})) == [0]


@pytest.mark.parametrize(
    "order, head, less", [("ab", "less a", "+1.0000"), ("ba", "less", "b: -1.0000")]
)
def test_references_are_named_by_what_sets_them_apart(order, head, less):
    records = [
        record({"arg": base, "n": n}, *(n + (base == "b") + noise for noise in (0.0, 0.1, 0.3)))
        for n, bases in ((1, "ab"), (2, order))
        for base in bases
    ]
    for one in records:
        for seed, result in enumerate(one["results"]):
            result["seed"] = seed
    rows = comparisons.compare(comparisons.groups(records), METRIC)
    assert [row.reference and row.reference.name for row in rows][::2] == [None, None]
    heads, *lines = comparisons.shown(rows, METRIC)
    assert heads[4] == head and lines[3][4] == less


def test_steps_until_a_level(tmp_path):
    lines = [{"step": s, "time": s, METRIC: s / 100} for s in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    group = comparisons.Group("a", {}, {0: {"folder": str(tmp_path)}})
    until = lambda level, falls=False: comparisons.steps_until(group, METRIC, level, falls)
    assert (until(0.2), until(0.21), until(0.4)) == ([20], [30], [None])
    assert until(0.15, falls=True) == [10]


def test_results_on_other_examples_are_not_subtracted():
    """By the labels where they are known, else by the data."""
    ours = [record({"arg": name}, 0.1, 0.2, 0.4, arms=True) for name in "abc"]
    for one, digest in zip(ours, ("x", "x", "y"), strict=True):
        for result in one["results"]:
            result["data_digest"] = digest
    first, same, other = comparisons.compare(comparisons.groups(ours), METRIC)
    assert same.more and other.more is None and other.mean == pytest.approx(0.7 / 3)
    shown = comparisons.shown([first, same, other], METRIC)
    assert shown[-1][-2] == "other examples"
    for one in ours:
        for result in one["results"]:
            result["examples"] = {"label": np.array([0, 1])}
    assert all(row.more for row in comparisons.compare(comparisons.groups(ours), METRIC)[1:])
