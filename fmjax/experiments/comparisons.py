"""Comparison of the trials of a sweep: means over seeds, and differences with errors.

Results that differ in nothing but the seed are a group, or those that set the same "group". Each is
compared with the first one that is set like it in all but the first key of the sweep, or with the
very first, pair by pair: with the same seed both have the same order of examples and the same head
at first, so that much of what a seed does to one it does to the other
(`fmjax.experiments.statistics`). Where runs say what each example adds, examples are paired as
well, and conclusions are meant for others of their kind.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax.errors import CheckpointError, ConfigError
from fmjax.experiments import statistics
from fmjax.io import metrics_log
from fmjax.io.progress import SHARES, count, duration, spread

Value = np.ndarray | float  # what each example of an evaluation adds, or their mean


class Group(NamedTuple):
    """Results that differ in the seed alone."""

    name: str  # what it sets, apart from what all groups set alike
    settings: dict[str, Any]  # all that it sets, but the seed
    results: dict[int | None, Mapping[str, Any]]  # by seed, None of what has none
    failed: int = 0  # how many did not come to their end: the others alone would flatter it

    def values(self, metric: str, by_example: bool = True) -> dict[int | None, Value]:
        """For each seed that has the metric: [examples] if the result knows them, else a number.

        Raises CheckpointError where examples are not those of the number.
        """
        found = {}
        for seed, result in self.results.items():
            if metric not in result["metrics"]:
                continue
            found[seed] = np.float64(result["metrics"][metric])
            each = result.get("examples", {}).get(metric.removeprefix("validation/"))
            if each is not None and by_example:
                mean = each.mean(dtype=np.float64)
                if not np.isclose(mean, found[seed], rtol=1e-4, atol=1e-6, equal_nan=True):
                    raise CheckpointError(
                        f"{result['folder']}: examples.npz has the mean {mean} of {metric}, "
                        f"summary.json {found[seed]}: they are not of the same evaluation. Do "
                        "the trial again, with --sweep=<its number> --fresh."
                    )
                found[seed] = np.asarray(each, np.float64)
        return found


def groups(records: Iterable[Mapping[str, Any]]) -> list[Group]:
    """The groups in the order of their first trials; arms are results like others. Raises
    ConfigError where two results of a group have the same seed."""
    settings: dict[str, dict[str, Any]] = {}
    results: dict[str, dict[int | None, Any]] = {}
    failed: dict[str, int] = {}
    for record in records:
        lost = [{"arm": {}, "failed": record.get("reason")}] if not record["results"] else []
        for result in (*record["results"], *lost):
            own = {**record["settings"], **result["arm"]}
            own.pop("seed", None)
            if "group" in own:
                own = {"group": own["group"]}
            key = repr(sorted(own.items()))
            settings.setdefault(key, own)
            results.setdefault(key, {})
            if result.get("failed"):
                failed[key] = failed.get(key, 0) + 1
            elif result["seed"] in results[key]:
                raise ConfigError(
                    f"get_sweep: two results of {own} have the seed {result['seed']}: trials that "
                    "differ in more need another group."
                )
            else:
                results[key][result["seed"]] = result
    names = _names(list(settings.values()))
    return [
        Group(
            str(settings[key].get("group", name)), settings[key], results[key], failed.get(key, 0)
        )
        for name, key in zip(names, settings, strict=True)
    ]


def at_equal(found: Sequence[Group], metric: str, budget: str) -> tuple[float, list[Group]] | None:
    """(budget, groups) with the metric as it was when all had used the same: the most that every
    run has come to in `budget`, which is "step", "tokens", "flops" or "time" (seconds of a run,
    start, compilation and evaluation included).

    None where all ended there, or where one of them was not evaluated before.
    """
    curves = [
        [_used(Path(result["folder"]), metric, budget) for result in group.results.values()]
        for group in found
    ]
    each = [curve for own in curves for curve in own]
    if not each or not all(each):
        return None
    ends = [curve[-1][0] for curve in each]
    most = min(ends)
    if max(ends) <= most * (1 + 1e-9) or any(curve[0][0] > most for curve in each):
        return None
    groups = []
    for group, own in zip(found, curves, strict=True):
        last = [[y for x, y in curve if x <= most * (1 + 1e-9)][-1] for curve in own]
        pairs = zip(group.results.items(), last, strict=True)
        then = {seed: {**_label(r), "metrics": {metric: y}} for (seed, r), y in pairs}
        groups.append(group._replace(results=then))
    return most, groups


def _label(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result without what its examples added in the end: only the labels still hold."""
    own = result.get("examples", {})
    return {**result, "examples": {key: x for key, x in own.items() if key == "label"}}


def steps_until(group: Group, metric: str, level: float, falls: bool) -> list[int | None]:
    """For each run, the step of the first evaluation that reaches `level`, None if none does."""
    found = []
    for result in group.results.values():
        rows, _ = metrics_log.read(Path(result["folder"]))
        reached = lambda value: value <= level if falls else value >= level
        steps = [row["step"] for row in rows if metric in row and reached(float(row[metric]))]
        found.append(min(steps, default=None))
    return found


def _used(folder: Path, metric: str, budget: str) -> list[tuple[float, float]]:
    """(what was used of the budget, metric) at each evaluation of a run."""
    rows, _ = metrics_log.read(folder)
    known = [(0, 0.0), *((row["step"], row[budget]) for row in rows if budget in row)]
    steps, used = np.array(known, np.float64).T
    return [
        (float(np.interp(row["step"], steps, used)), float(row[metric]))
        for row in rows
        if metric in row
    ]


def told_apart(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings, without the words of `get_config`'s argument that all have."""
    arguments = [str(own.get("arg", "")).split(",") for own in settings]
    alike = set.intersection(*map(set, arguments)) if len(settings) > 1 else set()
    of = lambda words: ",".join(word for word in words if word not in alike)
    both = zip(settings, arguments, strict=True)
    return [{**own, "arg": of(words)} if "arg" in own else dict(own) for own, words in both]


def _names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each group, made of the keys that differ; of a single key the value is enough."""
    shown = told_apart(settings)
    keys = dict.fromkeys(key for own in shown for key in own)
    differ = [key for key in keys if len({repr(own.get(key)) for own in shown}) > 1]
    if len(differ) == 1:
        return [str(own.get(differ[0], "")) or f"no {differ[0]}" for own in shown]
    word = lambda key, value: str(value) if key == "arg" else f"{key}={value}"
    told = [", ".join(word(key, own[key]) for key in differ if key in own) for own in shown]
    return [text or "the config" for text in told]


class Row(NamedTuple):
    """A group beside the first; where a run failed, or without two seeds in common, no more."""

    group: Group
    mean: float
    interval: statistics.Estimate | None
    more: statistics.Estimate | None = None  # what it has more than the first
    p: float = float("nan")  # of no difference, after Holm's correction
    p_signs: float = float("nan")  # of the same by exchanging pairs of seeds, without correction
    verdict: str = ""
    reference: Group | None = None  # the group that it is compared with
    detectable: float = float("nan")  # the difference that such runs would show four times of five

    @property
    def beside(self) -> str:
        """The name of the reference without what both set alike."""
        own = self.group.name.split(", ")
        apart = [part for part in self.reference.name.split(", ") if part not in own]
        return ", ".join(apart) or self.reference.name


def compare(found: Sequence[Group], metric: str, level: float = 0.95) -> list[Row]:
    """Each group, and what it has more than its reference; the corrected family is all of these.

    Examples are paired where all results have the same ones in the same order, by their labels.
    """
    each = [result.get("examples", {}) for group in found for result in group.results.values()]
    same = len({one["label"].tobytes() for one in each if "label" in one}) == 1
    whole = [group.values(metric, by_example=same) for group in found]
    rows, beside = [], references(found)
    for number, (group, values) in enumerate(zip(found, whole, strict=True)):
        own = _stacked(list(values.values()))
        known = len(own) > 1 and np.isfinite(own).all()
        interval = _possible(statistics.estimate(own, level), metric) if known else None
        row = Row(group, float(own.mean()) if len(own) else float("nan"), interval)
        reference = beside[number]
        one, other = _pairs(values, whole[reference])
        lost = group.failed or found[reference].failed or not alike(group, found[reference])
        if number != reference and not lost and len(one) > 1 and np.isfinite(one - other).all():
            difference = one - other
            by_seed = difference.mean(1) if difference.ndim == 2 else difference
            more, signs = statistics.estimate(difference, level), statistics.signs(by_seed)
            row = row._replace(more=more, p=statistics.p_value(more), p_signs=signs)
            row = row._replace(reference=found[reference])
        rows.append(row)
    family = [number for number, row in enumerate(rows) if row.more]
    raised = statistics.holm([rows[number].p for number in family])
    first = 1 - (1 - level) / max(len(family), 1)  # the level of Holm's first step
    for number, p in zip(family, raised, strict=True):
        more = rows[number].more
        told = dict(p=p, verdict=statistics.verdict(more, p, level))
        rows[number] = rows[number]._replace(detectable=statistics.detectable(more, first), **told)
    return rows


def _possible(found: statistics.Estimate, metric: str) -> statistics.Estimate:
    """The part of the interval of a mean that is possible: a share is from 0 to 1."""
    if not metric.endswith(SHARES):
        return found
    low, high = (min(max(end, 0.0), 1.0) for end in (found.low, found.high))
    return found._replace(low=low, high=high)


def alike(one: Group, other: Group) -> bool:
    """True if all their results are on the same examples: by the labels if both know them, else by
    the digests of the data and of their rows if both know these."""
    both = [*one.results.values(), *other.results.values()]
    labels = [r["examples"]["label"].tobytes() for r in both if "label" in r.get("examples", {})]
    if len(labels) == len(both):
        return len(set(labels)) == 1
    digests = ("data_digest", "rows_digest")
    return all(len({r[name] for r in both if name in r}) < 2 for name in digests)


def references(found: Sequence[Group]) -> list[int]:
    """For each group, the number of the one that it is compared with, which may be its own."""
    keys = dict.fromkeys(key for group in found for key in group.settings)
    first = next(iter(keys), "")
    others = [{k: v for k, v in group.settings.items() if k != first} for group in found]
    return [others.index(own) if others.count(own) > 1 else 0 for own in others]


def _pairs(one: Mapping[Any, Value], other: Mapping[Any, Value]) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of seeds that both have; a result without a seed (None) pairs with each."""
    seeds = one.keys() & other.keys()
    if None in one.keys() | other.keys():
        seeds = (one.keys() | other.keys()) - {None}
    of = lambda values: [values.get(seed, values.get(None)) for seed in sorted(seeds)]
    both = _stacked([*of(one), *of(other)])
    return both[: len(seeds)], both[len(seeds) :]


def _stacked(values: Sequence[Value]) -> np.ndarray:
    """[seeds, examples], or [seeds] of means where not all have the same examples."""
    shapes = {np.shape(value) for value in values}
    return np.array([np.mean(value) for value in values] if len(shapes) > 1 else values)


def shown(rows: Sequence[Row], metric: str, level: float = 0.95) -> list[list[str]]:
    """The rows as a person reads them, below their heads."""
    percent = f"{100 * level:.0f} %"
    beside = dict.fromkeys(row.beside for row in rows if row.reference)
    one = len(beside) < 2
    heads = [
        metric.removeprefix("validation/"),
        "seeds",
        "mean",
        percent,
        f"less {next(iter(beside), rows[0].group.name)}" if one else "less",
        percent,
        "p (Holm)",
        "",
        "detectable",
    ]
    lines = [heads]
    for row in rows:
        number = str(len(row.group.values(metric, by_example=False)))
        number += f", {row.group.failed} failed" if row.group.failed else ""
        own = [row.group.name, number, f"{row.mean:.4f}", _range(row.interval)]
        if row.more is None:
            other = row.reference is None and len(rows) > 1 and not alike(row.group, rows[0].group)
            lines.append([*own, "", "", "", "other examples" if other else "", ""])
            continue
        less = f"{row.more.mean:+.4f}" if one else f"{row.beside}: {row.more.mean:+.4f}"
        told = [less, _range(row.more, "+"), f"{row.p:.2g}", row.verdict]
        lines.append([*own, *told, f"{row.detectable:.4f}"])
    return lines


# What a result took, and what else is known of it: {title: (of a result, how it is shown)}.
COSTS = {
    "trains": (lambda one: one["trainable_parameters"], lambda x: count(np.mean(x))),
    "kept": (lambda one: one["kept_bytes"], lambda x: f"{np.mean(x) / 2**20:,.2f} MiB"),
    "FLOP": (lambda one: one["metrics"]["flops"], lambda x: count(np.mean(x))),
    "time": (lambda one: one["step_seconds"], lambda x: duration(np.mean(x))),
    "peak": (
        lambda one: one["ledger"]["memory"]["peak_bytes"],
        lambda x: f"{np.mean(x) / 2**20:,.0f} MiB",
    ),
    "forgets": (lambda one: forgotten(one["ledger"]["forgetting"]), spread),
    "gap": (lambda one: one["gap"], spread),
    "ece": (lambda one: _score(one["metrics"], "ece"), spread),
    "brier": (lambda one: _score(one["metrics"], "brier"), spread),
}


def forgotten(told: Mapping[str, float]) -> float:
    """Increase of the loss of the base's own training."""
    return float(told["after"]) - float(told["before"])


def _score(metrics: Mapping[str, float], name: str) -> float:
    found = [x for key, x in metrics.items() if re.fullmatch(rf"validation/\w+/{name}", key)]
    if len(found) != 1:
        raise KeyError(name)
    return found[0]


def cost(group: Group, name: str) -> list[float]:
    """The cost of each result of the group that knows it."""
    read, found = COSTS[name][0], []
    for result in group.results.values():
        with contextlib.suppress(KeyError):
            found.append(read(result))
    return found


def costs(groups: Sequence[Group]) -> list[list[str]]:
    """Rows of a table of what each group takes, with a column for what any of them knows."""
    each = {name: [cost(group, name) for group in groups] for name in COSTS}
    told = {name: values for name, values in each.items() if any(values)}
    rows = [["", *told]] if told else []
    for number, group in enumerate(groups if told else ()):
        shown = [COSTS[name][1](told[name][number]) if told[name][number] else "" for name in told]
        rows.append([group.name, *shown])
    return rows


def _range(found: statistics.Estimate | None, sign: str = "") -> str:
    return f"{found.low:{sign}.4f} … {found.high:{sign}.4f}" if found else ""
