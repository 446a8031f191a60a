"""A run folder as one page a person can read: report.html, and its facts in summary.json.

The page is one file without scripts that needs nothing from elsewhere; it is written at the end of
every run, and again by `python run.py --config=configs/report.py --config.folder=runs/…`.
"""

import contextlib
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from fmjax.config.load import flatten
from fmjax.config.rules import UNITS
from fmjax.errors import CheckpointError
from fmjax.io import metrics_log, storage
from fmjax.io.progress import count, duration
from fmjax.io.workdir import LEDGER, PREDICTIONS
from fmjax.reports import html, report_facts, svg

# The curves in order, by the last part of the metric's name: title, unit factor, axis options.
# Metrics not named here follow under their own name.
PANELS = {
    "loss": ("Loss", 1, {"log": True}),
    "accuracy": ("Accuracy (%)", 100, {"zero": True}),
    "lr": ("Learning rate", 1, {"zero": True}),
    "perplexity": ("Perplexity", 1, {"log": True}),
    "grad_norm": ("Gradient norm", 1, {"log": True}),
    **{f"{x}_per_sec": (f"{x.capitalize()} per second", 1, {"zero": True}) for x in UNITS},
    "data_wait": ("Waiting for data (% of the time)", 100, {"zero": True}),
    "mfu": ("Model FLOPs utilisation (%)", 100, {"zero": True}),
    "step_sec": ("Seconds per step", 1, {"zero": True}),
    "peak_gib": ("Peak memory (GiB)", 1, {"zero": True}),
}
UNDRAWN = ("mask_rate",)  # noise around a constant of the config
SPLITS = ("train", "validation")  # each has one colour in all figures
LOG_FROM = 20  # A logarithmic axis where it is allowed and the values span so much.

GOODPUT = {
    "step": "training steps",
    "init": "start-up",
    "compile": "compilation",
    "restore": "restoring",
    "data_wait": "waiting for data",
    "evaluation": "evaluation",
    "saving": "saving",
    "lost": "lost to roll-back",
}


def summarize(workdir: str | os.PathLike, **facts: Any) -> dict[str, Any]:
    """Write summary.json: what the log says, and `facts` (JSON) that only the task knows.

    From the log: "step", "seconds", "metrics" (last value of each), "goodput" (seconds by kind),
    "resumes", "skipped_updates", "skipped_spikes", "command". Facts the page knows how to show:
    "total" (steps), "parameters", "trainable_parameters", "model" (its name and sizes), "data"
    (counts), "finished" (a date), "config_difference" ([key, default, value]…), "environment" (name
    -> text).
    """
    workdir = Path(workdir)
    summary = facts | _from_log(*metrics_log.read(workdir))
    _replace(workdir / "summary.json", json.dumps(metrics_log.plain(summary), indent=2) + "\n")
    return summary


def write(workdir: str | os.PathLike) -> Path:
    """Write report.html from config.json, summary.json, status.json and metrics.jsonl.

    Files not there, as in a run that was killed, leave out what they would have told.
    """
    workdir = Path(workdir)
    config, summary, status = (
        _load(workdir / name) for name in ("config.json", "summary.json", "status.json")
    )
    rows, events = metrics_log.read(workdir)
    summary |= _from_log(rows, events)
    name = workdir.resolve().name
    state = str(status.get("state", ""))
    verdict = f'<p class="verdict {escape(state)}">{escape(_verdict(status, summary))}</p>'
    sections = [
        f"<h1>{escape(name)}</h1>{verdict}",
        html.section("What was trained", html.table(report_facts.rows(config, summary))),
        html.section("Final numbers", _results(summary)),
        html.section("Curves", f'<div class="grid">{"".join(_curves(rows))}</div>'),
        html.section("Held-out examples", _predictions(workdir / PREDICTIONS)),
        html.section("Samples", _samples(config, storage.read_object(workdir / LEDGER))),
        html.section("Where the time went", _goodput(summary["goodput"])),
        html.section("Commands", _commands(workdir, config, summary)),
        html.section("Configuration", _config(config, summary.get("config_difference", []))),
        html.section("Environment", html.settings(summary.get("environment", {}), {})),
    ]
    _replace(workdir / "report.html", html.page(name, sections))
    return workdir / "report.html"


def _from_log(rows: list[dict], events: list[dict]) -> dict[str, Any]:
    metrics = {}
    for row in rows:
        metrics |= {name: value for name, value in row.items() if name not in metrics_log.RESERVED}
    goodput = metrics_log.goodput(rows, events)
    names = [event["event"] for event in events]
    commands = [event["command"] for event in events if "command" in event]
    return {
        "step": max((line.get("step", 0) for line in rows + events), default=0),
        "seconds": sum(goodput.values()),
        "metrics": metrics,
        "goodput": goodput,
        "resumes": names.count("resume"),
        "skipped_updates": names.count("skipped_update"),
        "skipped_spikes": names.count("skipped_spike"),
        "command": commands[-1] if commands else "",
    }


def _verdict(status: Mapping, summary: Mapping) -> str:
    """One line: how far it came, how long it took, how good it is, what went wrong."""
    state, step = status.get("state"), f"{summary['step']:,}"
    steps = f"{step} of {summary['total']:,} steps" if "total" in summary else f"{step} steps"
    text = {
        "done": f"Done: {steps}",
        "preempted": f"Stopped after {steps}; the same command goes on from there",
        "failed": f"Failed after {steps}",
        "running": f"Running, or killed: {steps} logged",
    }.get(state, f"{steps} logged")
    if state in ("failed", "preempted") and status.get("reason"):
        text += f" ({status['reason']})"
    text += f", in {duration(summary['seconds'])}."
    metrics = summary["metrics"]
    if "validation/loss" in metrics:
        text += f" Validation loss {metrics['validation/loss']:.3f}"
        for name, value in metrics.items():
            if re.fullmatch("validation/.*/accuracy", name):
                text += f", {name.split('/')[1]} accuracy {value:.1%}"
        text += "."
    if summary["resumes"]:
        text += f" Resumed {summary['resumes']}×."
    if summary["skipped_updates"]:
        text += f" Updates skipped as not finite: {summary['skipped_updates']}."
    if summary["skipped_spikes"]:
        text += f" Updates skipped as spikes: {summary['skipped_spikes']}."
    return text


def _results(summary: Mapping) -> str:
    """The last value of every metric, training beside validation; then the other facts."""
    metrics = summary["metrics"]
    splits = ("train/", "validation/")
    names = {n.partition("/")[2]: None for n in metrics if n.startswith(splits)}
    names = [name for name in names if not _repeats(name, metrics)]
    both = [
        (name, *(_shown(name, metrics.get(split + name)) for split in splits)) for name in names
    ]
    rest = {"steps": summary["step"], "parameters": summary.get("parameters")}
    rest |= {name: value for name, value in metrics.items() if not name.startswith(splits)}
    facts = [(name, _shown(name, value)) for name, value in rest.items() if value is not None]
    tables = html.table(both, ("", "train", "validation")) + html.table(facts, ("", "last"))
    return f'<div class="grid">{tables}</div>'


def _repeats(name: str, metrics: Mapping[str, Any]) -> bool:
    """True if a metric is that of the only objective, and so equal to the total."""
    last = _panel(name)
    both = [(metrics.get(f"{s}/{name}"), metrics.get(f"{s}/{last}")) for s in SPLITS]
    return name != last and any(x is not None for x, _ in both) and all(x == y for x, y in both)


def _curves(rows: list[dict]) -> list[str]:
    """One figure per last part of the metrics' names, one curve per what comes before it."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name in row.keys() - metrics_log.RESERVED:
            curves.setdefault(name, []).append((row["step"], row[name]))
    panels: dict[str, list[str]] = {panel: [] for panel in PANELS}
    for name in sorted(curves):
        # Counters and constants need no curve; the table has them.
        values = {value for _, value in curves[name]}
        panel = _panel(name)
        whole = f"{name.partition('/')[0]}/{panel}"
        if name != whole and curves[name] == curves.get(whole):
            continue  # the loss of the only objective is the loss
        if panel in UNDRAWN:
            continue
        if panel in PANELS or (len(values) > 1 and not all(isinstance(v, int) for v in values)):
            panels.setdefault(panel, []).append(name)

    colours: dict[str, int] = {}  # of labels whose split has another curve in the same figure
    figures = []
    for panel, names in panels.items():
        title, factor, options = PANELS.get(panel, (_words(panel), 1, {}))
        series = [
            svg.Series(
                _label(name),
                [(step, factor * value) for step, value in curves[name]],
                colour,
            )
            for name, colour in zip(names, _colours(names, colours), strict=True)
        ]
        values = [y for line in series for _, y in line.points if math.isfinite(y)]
        wide = bool(values) and max(values) > LOG_FROM * min(values)
        if series:
            figures.append(svg.plot(title, series, **options | {"log": "log" in options and wide}))
    return figures


def _colours(names: list[str], others: dict[str, int]) -> Iterator[int]:
    """For each curve of a figure its split's colour; a second one of the split has one in `others`,
    {label: colour}, which all figures share."""
    taken = set()
    for name in names:
        split = name.partition("/")[0]
        if split in taken or (split not in SPLITS and taken):
            yield others.setdefault(_label(name), len(SPLITS) + len(others))
        else:
            yield SPLITS.index(split) if split in SPLITS else 0
        taken.add(split)


def _goodput(seconds: Mapping[str, float]) -> str:
    return html.shares(
        [(text, duration(seconds[kind]), seconds[kind]) for kind, text in GOODPUT.items()]
    )


def _predictions(file: Path) -> str:
    """A table of a few held-out examples: the example, its label and the model's output."""
    try:
        read = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        rows = [tuple(str(one[key]) for key in ("text", "right", "said")) for one in read]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return ""  # worth less than the page
    return html.texts(rows, ("example", "right", "model"))


def _samples(config: Mapping, ledger: Mapping) -> str:
    """Generated samples, each after its prompt."""
    prompt = config.get("samples", {}).get("prompt", "")
    return "".join(f"<pre>{escape(prompt + text)}</pre>" for text in ledger.get("samples", ()))


def _commands(workdir: Path, config: Mapping, summary: Mapping) -> str:
    folder = f"--config.folder={shlex.quote(str(workdir))}"
    task = lambda name: f"python run.py --config=configs/{name}.py {folder}"
    commands = {"Resume: the same command": summary["command"], "Evaluate": task("evaluate")}
    if "mlm" in config.get("objectives", {}):
        text = '--config.text="The [MASK] of a function."'
        commands["Fill in masked words"] = f"{task('fill_mask')} {text}"
    if "clm" in config.get("objectives", {}):
        commands["Write"] = f'{task("generate")} --config.prompt="The"'
    if "tokenizer" in config:  # other models have no class there to become
        commands["Export for transformers"] = task("export")
    return html.commands(commands)


def _config(config: Mapping, difference: list) -> str:
    values = {key: _json(value) for key, value in flatten(config).items()}
    changed = {key: _json(default) for key, default, _ in difference if key in values}
    if not values:
        return ""
    note = f"{len(changed)} of {len(values)} values differ from the file's defaults."
    return f'<p class="soft">{escape(note)}</p>{html.settings(values, changed)}'


def _panel(name: str) -> str:
    """The figure of a metric: the part that is known (optim/lr/head is an lr), else the last."""
    parts = name.split("/")
    return next((part for part in parts if part in PANELS), parts[-1])


def _label(name: str) -> str:
    """The label of a curve in its figure: train/mlm/loss -> "train mlm".

    A metric without a split or a group, such as perf/tokens_per_sec, needs no name.
    """
    unsaid = (_panel(name), "perf", "optim", "memory")
    return " ".join(part for part in name.split("/") if part not in unsaid)


def _shown(name: str, value: Any) -> str:
    """A number as its kind is read: shares in percent, counters in full, the rest in 4 digits."""
    if value is None:
        return "–"
    last = name.split("/")[-1]
    if last == "flops":
        return report_facts.flop(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if PANELS.get(last, ("", 1))[1] == 100:
        return f"{value:.1%}"
    return count(value) if abs(value) >= 10_000 else f"{value:.4g}"


def _words(name: str) -> str:
    return name.replace("_per_sec", " per second").replace("_", " ").capitalize()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(content).__name__}")
    return content


def _replace(path: Path, text: str) -> None:
    """Write a file that is always whole: the old one or the new one."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with storage.writing(path):
        # Names of files that are no UTF-8 hold characters that cannot be encoded.
        try:
            new.write_text(text, encoding="utf-8", errors="backslashreplace")
            os.replace(new, path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise
