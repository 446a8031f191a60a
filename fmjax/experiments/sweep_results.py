"""Results of a sweep: records of trials, comparable metrics, tables and the page.

A record is what trials.py keeps of a trial that has ended, with the results of each of its arms.
Nothing here imports jax.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
from ml_collections import ConfigDict

from fmjax.config import load as configs
from fmjax.errors import CheckpointError
from fmjax.experiments import comparisons, sweep_report, trial_records
from fmjax.experiments.trial_records import Record
from fmjax.io import lock, sealed, storage, workdir
from fmjax.io import summary as summaries
from fmjax.io.metrics_log import command
from fmjax.io.progress import SCORES, duration, spread, table

SWEEP = "sweep.json"
# Of a run's summary.json.
KEPT = (
    "metrics",
    "seconds",
    "goodput",
    "parameters",
    "trainable_parameters",
    "kept_bytes",
    "data_digest",
    "rows_digest",
    "environment",
)


def found(folder: Path, config: ConfigDict) -> list[dict[str, Any]]:
    """The result of each arm of a run, or of the run itself; `failed` says why one did not end
    well."""
    results = []
    for single, own in zip(configs.arms(config), workdir.of_arms(folder, config), strict=True):
        summary, status = summaries.read(own), storage.read_object(own / "status.json")
        if not summary:
            continue
        values = configs.flatten(single)
        result = {
            "seed": values.get("seed"),
            "arm": {key: values[key] for key, _ in config.get("arms", ())},
            "folder": str(own.relative_to(folder)),
            "failed": status.get("reason", "") if status.get("state") == "failed" else "",
        }
        result |= {key: summary[key] for key in KEPT if key in summary}
        if "goodput" in summary:
            result["step_seconds"] = summary["goodput"]["step"] / len(configs.arms(config))
        goals, metrics = single.get("objectives") or {}, summary.get("metrics", {})
        both = metrics.keys() >= {"train/loss", "validation/loss"}
        if both and not any("validation" in goal for goal in goals.values()):
            result["gap"] = float(metrics["validation/loss"]) - float(metrics["train/loss"])
        if kept := storage.read_object(own / workdir.LEDGER):
            result["ledger"] = kept
        results.append(result)
    return results


def show(told: Sequence[tuple[Any, Record | None]], folder: Path) -> None:
    """A line a trial: what it sets, how far it is, and its main number."""
    keys = list(dict.fromkeys(key for trial, _ in told for key in trial.settings))
    records = [record for _, record in told if record]
    metric = main_metric(records)
    rows = [["", *keys, "state", *([metric] if metric else []), "time"]]
    apart = comparisons.told_apart([trial.settings for trial, _ in told])
    for (trial, record), own in zip(told, apart, strict=True):
        settings = [_short(own.get(key, "")) for key in keys]
        state = record["state"] if record else _state(folder, trial)
        results = record["results"] if record else []
        number = [_number_of(results, metric)] if metric else []
        rows.append(
            [
                str(trial.number),
                *settings,
                state,
                *number,
                duration(record["seconds"]) if record else "",
            ]
        )
    print()
    print(table(rows))
    ended = [(trial.name, record) for trial, record in told if record]
    for metric, groups in families(ended, folder):
        if len(groups) > 1 and any(len(group.values(metric)) > 1 for group in groups):
            print()
            print(table(comparisons.shown(comparisons.compare(groups, metric), metric)))
        if costs := comparisons.costs(groups):
            print()
            print(table(costs))
    print(f"{len(records)} of {len(told)} trials have ended; {folder} has a record of each")


def keep(
    told: Sequence[tuple[Any, Record | None]],
    spec: str,
    overrides: Sequence[str],
    folder: Path,
) -> None:
    """Writes sweep.json, which trials belong together, and the report of those that have ended."""
    sweep = {
        "command": command(
            ["run.py", f"--config={spec}", *overrides, "--sweep", f"--workdir={folder}"]
        ),
        "trials": [
            {"name": trial.name, "number": trial.number, "settings": trial.settings}
            for trial, _ in told
        ],
    }
    with storage.writing(folder), contextlib.ExitStack() as stack:
        (folder / "locks").mkdir(exist_ok=True)
        # Several commands may end at once.
        stack.enter_context(filelock.FileLock(folder / "locks" / "report.lock"))
        sealed.write(folder / SWEEP, sweep)
        print(f"report: {report(folder)}")


def report(folder: Path) -> Path:
    """The page of the sweep that was run in `folder` last. Raises CheckpointError where sweep.json
    is damaged, or the page cannot be written."""
    sweep = _sweep(folder / SWEEP)
    ended = []
    for trial in sweep["trials"]:
        if record := trial_records.read(folder / f"{trial['name']}.json"):
            now = {key: trial[key] for key in ("number", "settings")}
            ended.append((trial["name"], record | now))
    records = [record for _, record in ended]
    of_all = dict(command=sweep["command"], total=len(sweep["trials"]))
    with storage.writing(folder):
        return sweep_report.write(folder, records, families(ended, folder), **of_all)


def _sweep(file: Path) -> dict[str, Any]:
    try:
        sweep = sealed.read(file)
        rows = [(row["name"], row["number"], row["settings"]) for row in sweep["trials"]]
        kinds = {tuple(map(type, row)) for row in rows} | {(type(sweep["command"]),)}
        if kinds != {(str, int, dict), (str,)}:
            raise ValueError("not what fmjax writes")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error!r}): the same command with --sweep writes it again"
        ) from error
    return sweep


def families(
    told: Sequence[tuple[str, Record]], folder: Path
) -> list[tuple[str, list[comparisons.Group]]]:
    """(metric, groups) of what can be compared: trials that choose their best by one metric, and
    those that say nothing of it but have it."""
    own = [main_metric([record]) for _, record in told]
    has = [{name for r in record["results"] for name in r["metrics"]} for _, record in told]
    chosen = [record["config"].get("best") or "" for _, record in told]
    metrics = list(
        dict.fromkeys(best for best, names in zip(chosen, has, strict=True) if best in names)
    )
    metrics = metrics or list(dict.fromkeys(filter(None, own)))[:1]
    found = []
    for metric in metrics:
        rows = zip(told, chosen, has, strict=True)
        fits = [one for one, best, names in rows if _fits(metric, best, names, metrics)]
        found.append((metric, groups_of(fits, folder)))
    return _with_failures(found)


def _with_failures(
    found: list[tuple[str, list[comparisons.Group]]],
) -> list[tuple[str, list[comparisons.Group]]]:
    """A group that lost runs in one stage has lost them in those that follow, too."""
    lost: dict[str, int] = {}
    for _, groups in found:
        for group in groups:
            if name := group.settings.get("group"):
                lost[name] = lost.get(name, 0) + group.failed
    failed = lambda group: lost.get(group.settings.get("group"), group.failed)
    return [
        (metric, [group._replace(failed=failed(group)) for group in groups])
        for metric, groups in found
    ]


def _fits(metric: str, best: str, names: set[str], metrics: Sequence[str]) -> bool:
    """True if a trial is compared in `metric`, one of the `metrics` in which any is; one that
    failed before it had any is reported with the others."""
    return best == metric or best not in metrics and (metric in names or not names)


def groups_of(told: Sequence[tuple[str, Record]], folder: Path) -> list[comparisons.Group]:
    """The results of trials with these names, grouped over seeds, with what is known of each
    example."""
    return comparisons.groups([_with_examples(record, folder / name) for name, record in told])


def main_metric(records: Sequence[Record]) -> str:
    """The metric by which the runs choose their best, else one of the validation split that people
    ask for; "" if there is none."""
    names = {name for one in records for result in one["results"] for name in result["metrics"]}
    chosen = [one["config"].get("best") for one in records]
    last = {name.rpartition("/")[2]: name for name in sorted(names) if "validation/" in name}
    known = [name for name in chosen if name in names] + [
        last[n] for n in (*SCORES, "loss") if n in last
    ]
    return known[0] if known else ""


def _with_examples(record: Record, folder: Path) -> Record:
    """The record, with what each example adds to the means of each result that knows it."""
    results = []
    for result in record["results"]:
        where = folder / result["folder"]
        own = {"folder": str(where), "examples": workdir.read_examples(where)}
        results.append(result | own)
    return record | {"results": results}


def _number_of(results: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The mean over seeds; of arms that differ in more than the seed from the least to the most."""
    well = [one for one in results if not one["failed"] and metric in one["metrics"]]
    values = [float(one["metrics"][metric]) for one in well]
    if values and any(one["arm"].keys() - {"seed"} for one in well):
        return f"{min(values):.4f} … {max(values):.4f}"
    failed = sum(bool(one["failed"]) for one in results)
    lost = f", {failed} failed" if failed else ""
    return f"{spread(values)}{lost}" if values else lost.removeprefix(", ")


def _state(folder: Path, trial: Any) -> str:
    """The progress of a trial that has no record."""
    held = [folder / "locks" / f"{trial.name}.json", folder / trial.name / "lock.json"]
    runs = any(map(lock.is_locked, held))
    own = workdir.of_arms(folder / trial.name, trial.config)
    steps = [
        status["step"]
        for path in own
        if "step" in (status := storage.read_object(path / "status.json"))
    ]
    at = f" at step {min(steps)}" if steps else ""
    return f"running{at}" if runs else f"stopped{at}" if at else ""


def _short(value: Any, most: int = 32) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
