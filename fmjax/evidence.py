"""Contracts: what a config is said to come to, and the runs that show it.

A config file may say what is expected of it:

    def get_expected(arg=None):
        return [dict(metric="validation/loss", value=4.41, tolerance=0.1, seeds=(0, 1, 2),
                     budget=20, source="three seeds on two cores, 2026-11-22")]

`python run.py --config=configs/mlm.py --verify` runs it with those seeds, as the arms of one
program, or all its trials if it has a sweep, of which `group` names what the number is of. It goes
on with what is there already, and writes evidence/mlm.json, a row of evidence: values by seed with
mean and interval, what was run on what, and a verdict for each expectation,

    kept      the mean lies within `tolerance` of `value`
    late      it does, but took more than `budget` minutes, all seeds and trials together
    broken    it does not, or a run failed

A row is stale when the config or what is expected of it has changed since. What stands in README.md
between `<!-- evidence … -->` and `<!-- -->` is made from rows. Nothing here imports jax.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax import comparisons, statistics, trials, workdir
from fmjax import config as configs
from fmjax.errors import ConfigError, FmjaxError, did_you_mean, quoted
from fmjax.logs import command, plain
from fmjax.progress import duration, table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "evidence"
MARKED = re.compile(r"(<!-- evidence (?P<what>[^>]*?) -->)(?P<text>.*?)(<!-- -->)", re.DOTALL)


class Broken(FmjaxError):
    """A config did not come to what it is said to."""


class Expectation(NamedTuple):
    """One number that a config is expected to come to."""

    metric: str
    value: float
    tolerance: float  # of the mean, to both sides
    seeds: tuple[int, ...]
    budget: float  # minutes, of all seeds and trials
    source: str  # where the value is from
    group: str = ""  # of a sweep: what its table calls the results


def expectations(spec: str) -> list[Expectation]:
    """What the config file says is expected. Raises ConfigError where that is no expectation."""
    found, rows = configs.expected(spec), []
    if not isinstance(found, Sequence) or not found:
        raise ConfigError(f"--config={spec}: get_expected gave {quoted(found)}, expected a list")
    for one in found:
        try:
            row = Expectation(**one)
            numbers = (row.value, row.tolerance, row.budget)
            well = all(math.isfinite(number) for number in numbers) and row.tolerance > 0
            well &= bool(row.seeds) and all(isinstance(seed, int) for seed in row.seeds)
            if not (well and row.source and isinstance(row.metric, str)):
                raise TypeError("numbers are finite, tolerance > 0, seeds and source not empty")
        except TypeError as error:
            raise ConfigError(
                f"--config={spec}: get_expected gave {quoted(one)}, expected a dict with "
                f"{', '.join(Expectation._fields)}: {error}"
            ) from error
        rows.append(row._replace(seeds=tuple(row.seeds)))
    if len({row.seeds for row in rows}) > 1:
        raise ConfigError(f"--config={spec}: get_expected: all of it needs the same seeds")
    return rows


def verify(spec: str, overrides: Sequence[str], folder: str | os.PathLike) -> None:
    """Runs the config, or its sweep, in `folder`, and writes its row.

    Raises Broken where an expectation is not kept, ConfigError where there is none.
    """
    expected, folder = expectations(spec), Path(folder)
    found = trials.walk(spec, overrides, folder, _sweep(spec, expected))
    told = trials.run(found, spec, folder, "all")
    row = measured(spec, overrides, expected, told, folder)
    FOLDER.mkdir(exist_ok=True)
    file = file_of(spec)
    workdir.write_atomic(file, json.dumps(plain(row), indent=2, ensure_ascii=False) + "\n")
    show(row)
    print(f"written to {file}")
    if wrong := [one for one in row["expected"] if one["verdict"] == "broken"]:
        raise Broken(
            f"{spec}: {wrong[0]['metric']} is {wrong[0]['mean']}, expected {wrong[0]['value']} "
            f"within {wrong[0]['tolerance']}{': ' + row['failed'] if row['failed'] else ''}"
        )


def _sweep(spec: str, expected: Sequence[Expectation]) -> list[dict[str, Any]] | None:
    """The trials of a config that has no sweep: its seeds."""
    if configs.defines(spec, "get_sweep"):
        return None
    seeds = expected[0].seeds
    return [{"arms": (("seed", seeds),)} if len(seeds) > 1 else {"seed": seeds[0]}]


def measured(
    spec: str,
    overrides: Sequence[str],
    expected: Sequence[Expectation],
    told: Sequence[tuple[trials.Trial, trials.Record | None]],
    folder: Path,
) -> dict[str, Any]:
    """The row of evidence of finished trials."""
    records = [record for _, record in told if record]
    failed = [record["reason"] for record in records if record["state"] == "failed"]
    if missing := len(told) - len(records):
        failed.append(f"{missing} trials have not ended")
    results = [result for record in records for result in record["results"]]
    minutes = sum(record["seconds"] for record in records) / 60
    ended = [(trial.name, record) for trial, record in told if record]
    groups = {group.name: group for group in trials.groups_of(ended, folder)}
    environments = [one["environment"] for one in results if "environment" in one]
    environment = dict(environments[0]) if environments else {}
    code = sorted({one.get("fmjax", "").partition(" ")[2] for one in environments})
    data = sorted({one["data_digest"] for one in results if "data_digest" in one})
    words = [_short(word) for word in overrides]
    return {
        "config": _relative(spec),
        "command": command(["run.py", f"--config={_relative(spec)}", *words, "--verify"]),
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round(minutes, 1),
        "failed": failed[0] if failed else "",
        "digests": {
            "config": digest(spec),
            "code": code,  # several where trials were run by several
            "data": data,
            "environment": _digest({k: v for k, v in environment.items() if k != "fmjax"}),
        },
        "environment": environment,
        "expected": [_judged(one, groups, minutes, bool(failed)) for one in expected],
        "groups": {name: _told(group) for name, group in groups.items()},
    }


def _judged(
    one: Expectation, groups: Mapping[str, comparisons.Group], minutes: float, failed: bool
) -> dict[str, Any]:
    if one.group and one.group not in groups:
        raise ConfigError(
            f"get_expected: the sweep has no group {one.group!r}." + did_you_mean(one.group, groups)
        )
    group = groups[one.group] if one.group else next(iter(groups.values()), None)
    values = group.values(one.metric, by_example=False) if group else {}
    numbers = [float(value) for value in values.values()]
    interval = statistics.estimate(np.array(numbers)) if len(numbers) > 1 else None
    seeds = set(values) in ({None}, set(one.seeds))  # a method without a seed is the same with each
    near = bool(numbers) and abs(np.mean(numbers) - one.value) <= one.tolerance
    kept = near and seeds and not failed
    return {
        **one._asdict(),
        "values": numbers,
        "mean": float(np.mean(numbers)) if numbers else None,
        "interval": [interval.low, interval.high] if interval else None,
        "verdict": ("kept" if minutes <= one.budget else "late") if kept else "broken",
    }


def _told(group: comparisons.Group) -> dict[str, Any]:
    """What is kept of a group: validation metrics and costs, a number a seed."""
    names = dict.fromkeys(
        name
        for result in group.results.values()
        for name in result["metrics"]
        if name.startswith("validation/")
    )
    found = {
        name: [float(value) for value in group.values(name, by_example=False).values()]
        for name in names
    }
    costs = {name: comparisons.cost(group, name) for name in comparisons.COSTS}
    return found | {name: values for name, values in costs.items() if values}


def digest(spec: str) -> str:
    """Of what the config, or each trial of its sweep, computes, and of what is expected of it."""
    expected = expectations(spec)
    found = trials.walk(spec, (), Path("unused"), _sweep(spec, expected))
    return _digest([[trial.name for trial in found], [list(one) for one in expected]])


def file_of(spec: str) -> Path:
    """Where the row of a config stands: evidence/depth-tiny.json of …/depth.py:tiny."""
    path, _, arg = spec.partition(":")
    name = re.sub(r"\W+", "-", arg)
    return FOLDER / f"{Path(path).stem}{'-' if name else ''}{name}.json"


def stale(spec: str) -> str:
    """Why the row of a config shows nothing of it, "" where it does."""
    file = file_of(spec)
    if not file.exists():
        return f"{file.name} is missing"
    row = json.loads(file.read_text(encoding="utf-8"))
    if row["digests"]["config"] != digest(spec):
        return f"{file.name} is of another config, or of other expectations"
    broken = [one["metric"] for one in row["expected"] if one["verdict"] == "broken"]
    return f"{file.name}: {broken[0]} was not what is expected" if broken else ""


def render(text: str) -> str:
    """`text` with what stands between its marks made anew from the rows.

    A mark is `<!-- evidence <file> <metric> <format>[ <group>] -->`: the mean and, of several
    seeds, the deviation, as `.2f` or, in percent, `.1%`; of a cost ("peak", …) as tables have it.
    """

    def again(match: re.Match) -> str:
        name, metric, form, *group = match["what"].split(maxsplit=3)
        row = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        groups = row["groups"]
        told = groups[group[0]] if group else next(iter(groups.values()))
        return f"{match[1]}{_shown(metric, told[metric], form)}{match[4]}"

    return MARKED.sub(again, text)


def _shown(metric: str, values: Sequence[float], form: str) -> str:
    if metric in comparisons.COSTS and form == "cost":
        return comparisons.COSTS[metric][1](values)
    factor, unit = (100, " %") if form.endswith("%") else (1, "")
    digits = form.removesuffix("%") + ("f" if unit else "")
    deviation = f" ± {factor * np.std(values, ddof=1):{digits}}" if len(values) > 1 else ""
    return f"{factor * np.mean(values):{digits}}{deviation}{unit}"


def show(row: Mapping[str, Any]) -> None:
    """The verdicts as a table."""
    rows = [["", "expected", "found", "95 %", "verdict"]]
    for one in row["expected"]:
        low, high = one["interval"] or (math.nan, math.nan)
        name = " ".join(filter(None, (one["group"], one["metric"].removeprefix("validation/"))))
        mean = "" if one["mean"] is None else f"{one['mean']:.4f}"
        interval = f"{low:.4f} … {high:.4f}" if one["interval"] else ""
        value = f"{one['value']:g} ± {one['tolerance']:g}"
        rows.append([name, value, mean, interval, one["verdict"]])
    print()
    print(table(rows))
    print(f"{row['config']} in {duration(60 * row['minutes'])}")


def _relative(spec: str) -> str:
    path = Path(spec)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else spec


def _short(word: str) -> str:
    """A word of the command line without the folders that only one machine has."""
    return re.sub(r"(?:/[^/\s'\",=]+)+/([^/\s'\",=]+/[^/\s'\",=]+)", r"…/\1", word)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
