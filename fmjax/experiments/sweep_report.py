"""The trials of a sweep as one page a person can read, with its figures as pictures beside it.

    <workdir>/report.html        without scripts, needs nothing from elsewhere
    <workdir>/figures/….png      the same figures, to put into a text
    <workdir>/report.json        the numbers of its tables

Written at the end of each `--sweep`, and again by `--config=configs/report.py` on its folder.
"""

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.config.load import flatten, may_change
from fmjax.experiments import comparisons
from fmjax.experiments.comparisons import Group, Row
from fmjax.io import atomic, metrics_log, results
from fmjax.io.progress import FALLING, count, duration
from fmjax.reports import html, svg

# What a metric is drawn against: (title, what the axis says, of a result).
AGAINST = {
    "trains": ("parameters that train", lambda one: one["trainable_parameters"]),
    "flops": ("FLOP of the training", lambda one: one["metrics"]["flops"]),
    "seconds": ("seconds of training steps", lambda one: one["step_seconds"]),
    "peak": ("MiB of memory at the peak", lambda one: _of(one, "peak_bytes") / 2**20),
    "kept": ("MiB on disk beside the base", lambda one: one["kept_bytes"] / 2**20),
}
BUDGETS = {
    "step": "{} steps",
    "tokens": "{} tokens",
    "flops": "{} FLOP",
    "time": "{} seconds of the run, start and evaluation included",
}
CURVES = '<p class="soft">Means over seeds, from the least to the greatest, beside the first.</p>'


def write(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    families: Sequence[tuple[str, Sequence[Group]]],
    command: str,
    total: int,
) -> Path:
    """Writes the page, the figures and the numbers of a sweep's records; returns the page.

    `families` are metrics and the groups that are compared in them, as `fmjax.experiments.trials`
    makes them of the records; `command` runs all of it, which are `total` trials.
    """
    pictures = folder / "figures"
    pictures.mkdir(exist_ok=True)
    for old in pictures.glob("*.png"):
        old.unlink(missing_ok=True)  # Another command may share the folder.
    sections, told, numbers = [], [], []
    for metric, groups in families:
        rows = comparisons.compare(groups, metric)
        of = f" in {metric.removeprefix('validation/')}" if len(families) > 1 else ""
        figures = dict(_figures(rows, metric))
        for name, figure in figures.items():
            if "<svg" in figure:
                name = f"{_file(metric)}-{name}" if of else name
                with results.replacing(pictures / f"{name}.png") as made:
                    made.write_bytes(svg.png(figure, html.STYLE))
        told.append(_told(rows, metric))
        numbers.append(_numbers(rows, metric))
        sections += [
            html.section(f"{title}{of}", body) for title, body in _family(rows, metric, figures)
        ]
    name = folder.resolve().name
    groups = [group for _, own in families for group in own]
    sections = [
        f"<h1>{escape(name)}</h1>{_verdict(records, told, total)}",
        html.section("What was compared", html.table(_subject(records, len(groups)))),
        *sections,
        html.section("What failed", _failures(records)),
        html.section("What differs", _differences(records)),
        html.section("Commands", html.commands({"All trials": command} | _commands(records))),
        html.section("Environment", html.settings(_environment(groups), {})),
    ]
    text = json.dumps(metrics_log.plain(numbers), indent=2)
    atomic.write_atomic(folder / "report.json", text)
    atomic.write_atomic(folder / "report.html", html.page(name, sections))
    return folder / "report.html"


def _family(
    rows: Sequence[Row], metric: str, figures: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """(title, body) of the sections about groups that are compared in one metric."""
    groups = [row.group for row in rows]

    def grid(kind: str, note: str = "") -> str:
        own = "".join(figure for name, figure in figures.items() if name.startswith(kind))
        return f'{note}<div class="grid">{own}</div>' if own else ""

    yield "Results", _results(rows, metric)
    yield "What each takes", _wide(comparisons.costs(groups))
    yield "What it buys", grid("against", _front(metric))
    yield "Over what is varied", grid("over")
    yield "At equal budgets", _equal(groups, metric)
    yield "How soon", _until(rows, metric)
    yield "Learning curves", grid("curve", CURVES)
    yield "Where it is right", _slices(groups, metric)


def _of(result: Mapping[str, Any], name: str) -> float:
    return result["ledger"]["memory"][name]


def _told(rows: Sequence[Row], metric: str) -> str:
    """The conclusion of the comparisons, in a sentence; "" if there are none."""
    told = [row for row in rows if row.more]
    if not told:
        return ""
    kinds = ("higher", "lower")
    names = {kind: [row.group.name for row in told if row.verdict == kind] for kind in kinds}
    beside = ", ".join(dict.fromkeys(row.beside for row in told))
    parts = [f"is {kind} for {', '.join(found)}" for kind, found in names.items() if found]
    unclear = sum(row.verdict == "inconclusive" for row in told)
    parts += [f"shows no difference for {unclear} of {len(told)}"] if unclear else []
    return f" Beside {beside}, {metric.removeprefix('validation/')} {'; '.join(parts)}."


def _verdict(records: Sequence[Mapping], told: Sequence[str], total: int) -> str:
    done = sum(record["state"] == "done" for record in records)
    took = duration(sum(record["seconds"] for record in records))
    text = f"{done} of {total} trials done, in {took}.{''.join(told)}"
    failed = any(record["state"] == "failed" for record in records)
    state = "failed" if failed else "done" if done == total else ""
    return f'<p class="verdict {state}">{escape(text)}</p>'


def _subject(records: Sequence[Mapping[str, Any]], groups: int) -> list[tuple[str, str]]:
    """(name, text): which data and base model the trials had, and when this was written."""
    configs = [record["config"] for record in records]
    data = [config.get("data", {}) for config in configs]
    sources = [one.get("path") or one.get("train") or one.get("name") or "" for one in data]
    sources = [", ".join(x) if isinstance(x, list | tuple) else str(x) for x in sources]
    bases = [str(config.get("init") or "none: trained from scratch") for config in configs]
    each = lambda texts: ", ".join(filter(None, dict.fromkeys(texts)))
    rows = {"methods": str(groups), "data": each(sources), "base model": each(bases)}
    rows["written"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return [(name, text) for name, text in rows.items() if text]


def _results(rows: Sequence[Row], metric: str) -> str:
    if not rows:
        return ""
    head, *body = comparisons.shown(rows, metric)
    note = (
        "Means over seeds with 95 % intervals, for other seeds and, where single examples are "
        "known, other examples. Differences are paired by seed and example; p is corrected for "
        "all rows (Holm). Differences beyond their interval are unlikely, shown or not. For the "
        "next experiment: “detectable” is what such runs would show four times of five."
    )
    return html.wide(body, head) + f'<p class="soft">{note}</p>'


def _wide(rows: Sequence[Sequence[str]]) -> str:
    return html.wide(rows[1:], rows[0]) if rows else ""


def _front(metric: str) -> str:
    better = "lower" if metric.endswith(FALLING) else "higher"
    return (
        f'<p class="soft">{escape(metric.removeprefix("validation/"))}, {better} is better, with '
        "95 % intervals; the dashed line joins those that nothing cheaper surpasses.</p>"
    )


def _equal(groups: Sequence[Group], metric: str) -> str:
    """The comparison as it was when all had used the same."""
    parts = []
    for budget, words in BUDGETS.items():
        found = comparisons.at_equal(groups, metric, budget)
        if found and len(groups) > 1:
            most, then = found
            head, *body = comparisons.shown(comparisons.compare(then, metric), metric)
            parts.append(f"<h3>{escape(words.format(count(most)))}</h3>{html.wide(body, head)}")
    if not parts:
        return ""
    note = (
        "By the last evaluation within the most that all have used. A run that went on had not "
        "yet lowered its learning rate as far as one that ended there."
    )
    return "".join(parts) + f'<p class="soft">{note}</p>'


def _until(rows: Sequence[Row], metric: str) -> str:
    """The steps that each group took to its reference's final value."""
    falls, lines = metric.endswith(FALLING), []
    ended = {row.group.name: row.mean for row in rows}
    for row in rows:
        steps = []
        if row.reference and len(_curve(row.reference, metric)) > 1:
            level = ended[row.reference.name]
            steps = comparisons.steps_until(row.group, metric, level, falls)
        if any(step is not None for step in steps):
            shown = ", ".join("not" if step is None else f"{step:,}" for step in steps)
            lines.append((row.group.name, f"{row.beside}: {level:.4f}", shown))
    if not lines:
        return ""
    note = (
        "Steps of each seed until the evaluation that reached the mean at which its reference "
        "ended."
    )
    return html.wide(lines, ("", "reaches", "steps")) + f'<p class="soft">{note}</p>'


def _figures(rows: Sequence[Row], metric: str) -> Iterator[tuple[str, str]]:
    """(name, figure) of all that there is to draw."""
    for name, (words, read) in AGAINST.items():
        points = _points(rows, read)
        if len({x for x, *_ in points.values()}) > 1:
            yield f"against-{name}", _against(points, metric, words)
    yield from _over(rows, metric)
    yield from _curves([row.group for row in rows], metric)


def _points(rows: Sequence[Row], read: Callable) -> dict[str, tuple[float, float, float, float]]:
    """For each group that knows both, its cost, and the mean with its interval."""
    found = {}
    for row in rows:
        taken = []
        for result in row.group.results.values():
            with contextlib.suppress(KeyError):
                taken.append(float(read(result)))
        if taken and math.isfinite(row.mean):
            found[row.group.name] = (float(np.mean(taken)), row.mean, *_ends(row))
    return found


def _ends(row: Row) -> tuple[float, float]:
    """The interval of the mean, NaN where there is none."""
    return (row.interval.low, row.interval.high) if row.interval else (math.nan, math.nan)


def _against(points: Mapping[str, tuple], metric: str, words: str) -> str:
    """The metric over what is taken, and the front of what nothing cheaper surpasses."""
    sign = -1 if metric.endswith(FALLING) else 1
    front, best = [], -math.inf
    for x, y, *_ in sorted(points.values(), key=lambda point: (point[0], -sign * point[1])):
        if sign * y > best:
            front.append((x, y))
            best = sign * y
    series = [svg.Series("", front, svg.COLOURS - 1, dashed=True)]
    colours = _colours(points)
    named = {
        name for name, (x, y, *_) in points.items() if (x, y) in front or len(points) <= svg.NAMED
    }
    series += [
        svg.Series(
            name if name in named else "", [(x, y)], colours[name], ((x, low, high),), label=True
        )
        # Names of the front have the first choice of a place.
        for name, (x, y, low, high) in sorted(
            points.items(), key=lambda point: point[1][:2] not in front
        )
    ]
    taken = [x for x, *_ in points.values()]
    title = f"{_last(metric)} and {words}"
    return svg.plot(title, series, x=words, log_x=max(taken) > 10 * max(min(taken), 1e-30))


def _over(rows: Sequence[Row], metric: str) -> Iterator[tuple[str, str]]:
    """The metric over each number that the sweep varies, a curve for each of what else it does."""
    for key in dict.fromkeys(key for row in rows for key in row.group.settings):
        numbers = [row.group.settings.get(key) for row in rows]
        if len(set(numbers)) < 3 or not all(map(_is_number, numbers)):
            continue
        curves: dict[str, list] = {}
        for number, row in zip(numbers, rows, strict=True):
            others = {k: v for k, v in row.group.settings.items() if k != key}
            label = ", ".join(str(v) if k == "arg" else f"{k}={v}" for k, v in others.items())
            curves.setdefault(label, []).append((float(number), row.mean, *_ends(row)))
        series = []
        for colour, (label, found) in enumerate(_unlike(curves).items()):
            found = sorted(point for point in found if math.isfinite(point[1]))
            band = tuple((x, low, high) for x, _, low, high in found)
            series.append(svg.Series(label, [(x, y) for x, y, *_ in found], colour, band))
        log_x = max(numbers) > 10 * max(min(numbers), 1e-30)
        yield f"over-{key}", svg.plot(f"{_last(metric)} over {key}", series, x=key, log_x=log_x)


def _unlike(curves: Mapping[str, list]) -> dict[str, list]:
    """The same under names without the words that all have, where these still tell them apart."""
    words = [name.replace(",", " ").split() for name in curves]
    alike = set.intersection(*map(set, words)) if len(words) > 1 else set()
    kept = [" ".join(word for word in own if word not in alike) for own in words]
    names = kept if len(set(kept)) == len(kept) else list(curves)
    return dict(zip(names, curves.values(), strict=True))


def _colours(names: Iterable[str]) -> dict[str, int]:
    """{method: its colour}, in the order in which the sweep has them."""
    return {name: number for number, name in enumerate(names)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _curves(groups: Sequence[Group], metric: str) -> Iterator[tuple[str, str]]:
    """The metric while training, else the training loss, of each group beside the first one."""
    for name in (metric, "train/loss"):
        found = {group.name: _curve(group, name) for group in groups}
        found = {name: curve for name, curve in found.items() if len(curve) > 1}
        if found:
            break
    if not found:
        return
    first, *_ = found
    colours = _colours(group.name for group in groups)

    def line(own: str, band: bool = False) -> svg.Series:
        ends = tuple((s, low, high) for s, _, low, high in found[own]) if band else ()
        return svg.Series(own, [(s, mean) for s, mean, *_ in found[own]], colours[own], ends)

    if len(found) > 1:
        yield "curve-all", svg.plot(f"{_words(name)}: all", [line(own) for own in found])
    for number, own in enumerate(found):
        if own == first and len(found) > 1:
            continue
        lines = [line(first)] if own != first else []
        yield f"curve-{number}", svg.plot(f"{_words(name)}: {own}", [*lines, line(own, True)])


def _curve(group: Group, name: str) -> list[tuple[int, float, float, float]]:
    """(step, mean, least, greatest) over the seeds at the steps that all of them logged."""
    each = []
    for result in group.results.values():
        rows, _ = metrics_log.read(Path(result["folder"]))
        each.append({row["step"]: float(row[name]) for row in rows if name in row})
    steps = sorted(set.intersection(*map(set, each))) if each else []
    values = [[one[step] for one in each] for step in steps]
    return [(s, float(np.mean(v)), min(v), max(v)) for s, v in zip(steps, values, strict=True)]


def _slices(groups: Sequence[Group], metric: str) -> str:
    """The metric by class and by length, means over seeds."""
    tables, key = "", metric.removeprefix("validation/")
    for kind, title in (("classes", "class"), ("lengths", "length")):
        parts: dict[str, dict[str, float]] = {}
        for group in groups:
            found: dict[str, list[float]] = {}
            for result in group.results.values():
                for part in result.get("ledger", {}).get("slices", {}).get(kind, ()):
                    if key in part:
                        found.setdefault(f"{part['name']} ({part['examples']})", []).append(
                            float(part[key])
                        )
            if found:
                parts[group.name] = {name: float(np.mean(values)) for name, values in found.items()}
        names = dict.fromkeys(name for own in parts.values() for name in own)
        rows = [
            [own, *(f"{told[name]:.3f}" if name in told else "" for name in names)]
            for own, told in parts.items()
        ]
        tables += html.wide(rows, [f"by {title} (examples)", *names])
    return tables


def _failures(records: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (str(record["number"]), record["reason"])
        for record in records
        if record["state"] == "failed"
    ]
    rows += [
        (f"{record['number']}, seed {one['seed']}", one["failed"])
        for record in records
        for one in record["results"]
        if one.get("failed") and record["state"] != "failed"
    ]
    return html.table(rows, ("trial", "why"))


def _differences(records: Sequence[Mapping[str, Any]]) -> str:
    """For each trial, the keys in which it differs from the first."""
    flat = [
        {key: value for key, value in flatten(record["config"]).items() if not may_change(key)}
        for record in records
    ]
    rows = {}
    for record, own in zip(records, flat, strict=True):
        changed = [
            f"{key}={json.dumps(own[key], ensure_ascii=False)}" if key in own else f"no {key}"
            for key in sorted({*own, *flat[0]})
            if own.get(key) != flat[0].get(key)
        ]
        words = ", ".join(map(str, record["settings"].values()))
        rows[f"{record['number']} {words}"] = (
            "\n".join(changed) or "the first, which others differ from"
        )
    return "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
        for name, text in rows.items()
    )


def _commands(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {f"Trial {record['number']}": record["command"] for record in records}


def _environment(groups: Sequence[Group]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for group in groups:
        for result in group.results.values():
            for key, value in result.get("environment", {}).items():
                found.setdefault(key, set()).add(value)
    return {key: ", ".join(sorted(values)) for key, values in found.items()}


def _numbers(rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """The comparison as data."""
    return {
        "metric": metric,
        "groups": [
            {
                "name": row.group.name,
                "settings": row.group.settings,
                "values": {
                    str(seed): float(value)
                    for seed, value in row.group.values(metric, by_example=False).items()
                },
                "mean": row.mean,
                "interval": row.interval and [row.interval.low, row.interval.high],
                "difference": row.more and [row.more.mean, row.more.low, row.more.high],
                "p_holm": row.p,
                "p_signs": row.p_signs,
                "verdict": row.verdict,
                "detectable": row.detectable,
                "failed": row.group.failed,
                **{name: comparisons.cost(row.group, name) for name in comparisons.COSTS},
            }
            for row in rows
        ],
    }


def _file(metric: str) -> str:
    return re.sub(r"\W+", "-", metric.removeprefix("validation/"))


def _last(metric: str) -> str:
    return metric.rpartition("/")[2].replace("_", " ").capitalize()


def _words(name: str) -> str:
    return re.sub(r"^(train|validation)/.*?(\w+)$", r"\2 (\1)", name)
