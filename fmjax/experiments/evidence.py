"""Contracts: what a config is said to come to, and the runs that show it.

A config file may say what is expected of it:

    def get_expected(arg=None):
        return [dict(metric="validation/loss", value=4.41, tolerance=0.1, seeds=(0, 1, 2),
                     budget=20, source="three seeds on two cores, 2026-11-22")]

`python run.py --config=configs/mlm.py --verify` runs it with those seeds, as the arms of one
program, or all its trials if it has a sweep, of which `group` names what the number is of. It goes
on with what is there already, and writes evidence/mlm.json, a row of evidence: values by seed with
mean and interval, what was run on what, and a verdict for each expectation,

    kept      the mean is within `tolerance` of `value`
    late      it does, but took more than `budget` minutes, all seeds and trials together
    broken    it does not, or a run failed

A row is stale when the config or what is expected of it has changed since. What is in a document
between `<!-- evidence … -->` and `<!-- -->` is made from rows. Nothing here imports jax.
"""

import ast
import hashlib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax.config import load as configs
from fmjax.errors import Broken, CheckpointError, ConfigError, did_you_mean, quoted
from fmjax.experiments import comparisons, statistics, sweep_results, trials
from fmjax.io import atomic, results, storage
from fmjax.io.metrics_log import command, plain
from fmjax.io.progress import duration, table

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "evidence"
COPY = "--config, such as a copy of it"
MARKED = re.compile(r"(<!-- evidence (?P<what>[^>]*?) -->)(?P<text>.*?)(<!-- -->)", re.DOTALL)


class Expectation(NamedTuple):
    """One number that a config is expected to come to.

    Where it is of data or of a base that the user has to name, `given` says which keys the command
    line sets, "init" or with a value "data.overlap=drop"; it may set no others that change numbers.
    """

    metric: str
    value: float
    tolerance: float  # of the mean, to both sides
    seeds: tuple[int, ...]
    budget: float  # minutes, of all seeds and trials
    source: str  # where the value is from
    group: str = ""  # of a sweep: what its table calls the results
    given: tuple[str, ...] = ()


def expectations(spec: str) -> list[Expectation]:
    """The expectations of a config file. Raises ConfigError for malformed ones."""
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
        rows.append(row._replace(seeds=tuple(row.seeds), given=tuple(row.given)))
    if len({(row.seeds, row.given) for row in rows}) > 1:
        raise ConfigError(
            f"--config={spec}: get_expected: all of it needs the same seeds and given"
        )
    if configs.defines(spec, "get_sweep") and not all(row.group for row in rows):
        raise ConfigError(f"--config={spec}: get_expected: of a sweep say of which group")
    return rows


def verify(
    spec: str, overrides: Sequence[str], folder: str | os.PathLike, *, fresh: bool = False
) -> None:
    """Runs the config, or its sweep, in `folder`, and writes its row; what is there from before is
    done again if `fresh`.

    Raises Broken where an expectation is not kept, ConfigError where there is none.
    """
    expected, folder = expectations(spec), Path(folder)
    _check_given(overrides, expected[0].given)
    file = file_of(spec)
    results.check_file(file, COPY)
    now = digest(spec)  # of the files as they are before anything runs
    found = trials.walk(spec, overrides, folder, _sweep(spec, expected))
    told = trials.run(found, spec, folder, "all", fresh=fresh)
    row = measured(spec, overrides, expected, told, folder)
    row["digests"]["config"] = now
    results.make_folder(file.parent, COPY)
    text = json.dumps(plain(row), indent=2, ensure_ascii=False)
    atomic.write_atomic(file, f"{text}\n", COPY)
    show(row)
    print(f"written to {file}")
    if wrong := [one for one in row["expected"] if one["verdict"] == "broken"]:
        if wrong[0]["group"] and not wrong[0]["values"]:
            raise ConfigError(
                f"get_expected: nothing has {wrong[0]['metric']} in the group "
                f"{wrong[0]['group']!r}." + did_you_mean(wrong[0]["group"], row["groups"])
            )
        raise Broken(
            f"{spec}: {wrong[0]['metric']} is {wrong[0]['mean']}, expected {wrong[0]['value']} "
            f"within {wrong[0]['tolerance']}{': ' + row['failed'] if row['failed'] else ''}"
        )


def _check_given(overrides: Sequence[str], given: Sequence[str]) -> None:
    """Raise ConfigError for command-line words that change the config."""
    for word in overrides:
        name, _, value = word.removeprefix("--config.").partition("=")
        if not (configs.may_change(name) or {name, f"{name}={value}"} & set(given)):
            possible = f"only {', '.join(given)}" if given else "nothing"
            raise ConfigError(
                f"--verify is of the config as it stands: {word} would change its numbers. The "
                f"command line may set {possible}, and what changes no number."
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
    families = [groups for _, groups in sweep_results.families(ended, folder)]
    groups = [group for own in families for group in own]
    environments = [one["environment"] for one in results if "environment" in one]
    environment = {
        key: ", ".join(sorted({one[key] for one in environments if key in one}))
        for key in dict.fromkeys(key for one in environments for key in one)
    }
    code = sorted({one.get("fmjax", "").partition(" ")[2] for one in environments})
    data = sorted({one["data_digest"] for one in results if "data_digest" in one})
    words = [_short(word) for word in overrides]
    return {
        "config": _relative(spec),
        "command": command(["run.py", f"--config={_relative(spec)}", *words, "--verify"]),
        "date": max((record["date"] for record in records), default=""),  # of the last run
        "minutes": round(minutes, 1),
        "failed": _short(failed[0]) if failed else "",
        "digests": {
            "code": code,  # several where trials were run by several
            "data": data,
            "environment": _digest({k: v for k, v in environment.items() if k != "fmjax"}),
        },
        "environment": environment,
        "expected": [_judged(one, groups, minutes, bool(failed)) for one in expected],
        "groups": _by_name(groups),
    }


def _by_name(groups: Sequence[comparisons.Group]) -> dict[str, dict[str, Any]]:
    """The kept numbers of each group; of one that several stages have, of all of them."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        found[group.name] = _told(group) | found.get(group.name, {})
    return found


def _judged(
    one: Expectation, groups: Sequence[comparisons.Group], minutes: float, failed: bool
) -> dict[str, Any]:
    named = [group for group in groups if one.group in ("", group.name)]
    found = (group.values(one.metric, by_example=False) for group in named)
    values = next(filter(None, found), {})
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
    """The kept numbers of a group: validation metrics and costs, one per seed."""
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
    """Digest of everything the config, or each trial of its sweep, computes, and of what is
    expected; for a sweep whose trials depend on results, of the file's code, which is all that can
    be known."""
    expected = expectations(spec)
    sweep = _sweep(spec, expected)
    names = [trial.name for trial in trials.walk(spec, (), Path("unused"), sweep)]
    if sweep is None and inspect.isgenerator(configs.sweep(spec)):
        names.append(_code(Path(spec.partition(":")[0])))
    return _digest([names, [list(one) for one in expected]])


def file_of(spec: str) -> Path:
    """The path of a config's evidence row: evidence/depth-tiny.json of …/depth.py:tiny; next to a
    config that is not of this project."""
    path, _, arg = spec.partition(":")
    name, path = re.sub(r"\W+", "-", arg), Path(path).resolve()
    folder = FOLDER if path.is_relative_to(ROOT) else path.parent / "evidence"
    return folder / f"{path.stem}{'-' if name else ''}{name}.json"


def stale(spec: str) -> str:
    """Why the row of a config shows nothing of it, "" where it does."""
    file = file_of(spec)
    if not file.exists():
        return f"{file.name} is missing"
    row = _read(file, digests=dict, expected=list)
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
        row = _read(FOLDER / f"{name}.json", groups=dict)
        groups = row["groups"]
        told = groups[group[0]] if group else next(iter(groups.values()))
        return f"{match[1]}{_shown(metric, told[metric], form)}{match[4]}"

    return MARKED.sub(again, text)


def _read(file: Path, **kinds: type) -> dict[str, Any]:
    """A row that has keys of these kinds."""
    row = storage.read_object(file)
    if not all(isinstance(row.get(key), kind) for key, kind in kinds.items()):
        raise CheckpointError(f"{file} is damaged: --verify of its config writes it again")
    return row


def _shown(metric: str, values: Sequence[float], form: str) -> str:
    if metric in comparisons.COSTS and form == "cost":
        return comparisons.COSTS[metric][1](values)
    factor, unit = (100, " %") if form.endswith("%") else (1, "")
    digits = form.removesuffix("%") + ("f" if unit else "")
    deviation = f" ± {factor * np.std(values, ddof=1):{digits}}" if len(values) > 1 else ""
    return f"{factor * np.mean(values):{digits}}{deviation}{unit}"


def _write(file: Path) -> None:
    """Makes the marked texts of a file anew."""
    file.write_text(render(file.read_text(encoding="utf-8")), encoding="utf-8")


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
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else _short(spec)


def _short(word: str) -> str:
    """A text without the folders that only one machine has."""
    return re.sub(r"(?<![\w.…-])/(?:[^/\s'\",:]+/)*([^/\s'\",:]+)", r"…/\1", word)


def _code(file: Path) -> str:
    """The code of a file without what changes no number: docstring, comments and imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    imports = ast.Import | ast.ImportFrom
    tree.body = [node for node in tree.body if not isinstance(node, imports)]
    return ast.unparse(tree)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        _write(Path(name))
