"""Curves as inline SVG: a few lines, axes with nice numbers, no scripts, no dependency.

Colours are the CSS variables --c0 … --c5 of the page; text and grid use its classes.
"""

import math
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 8, 36  # LEFT is more where labels are long
CHARACTER = 7  # at most the width of a digit
BUCKETS = 250  # Longer series are drawn as the minimum and maximum of so many stretches.
DOTS = 40  # Series up to this long show their points, with the value on hovering.
COLOURS = 6


class Series(NamedTuple):
    """One curve: (step, value) pairs in order; values may be NaN or infinite (a gap)."""

    name: str
    points: list[tuple[float, float]]
    colour: int = 0


def plot(title: str, series: list[Series], *, zero: bool = False, log: bool = False) -> str:
    """A <figure> with the curves over the step. `zero`: the axis begins at 0, for values >= 0.

    `log` asks for a logarithmic axis; values <= 0 refuse it.
    """
    finite = [(x, y) for line in series for x, y in line.points if math.isfinite(y)]
    if not finite:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>no finite value</p></figure>"
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    log = log and low > 0
    marks = log_ticks(low, high) if log else ticks(min(low, 0.0) if zero else low, high)
    last = max(x for x, _ in finite)
    steps = [tick for tick in ticks(0, last) if tick <= last]

    scale = math.log10 if log else float
    bottom, span = scale(marks[0]), scale(marks[-1]) - scale(marks[0])
    right, base = WIDTH - RIGHT, HEIGHT - BOTTOM
    texts = labels(marks)
    left = max(LEFT, 10 + CHARACTER * max(map(len, texts)))
    px = lambda x: round(left + (x / last if last else 0.5) * (right - left), 1)
    py = lambda y: round(base - (scale(y) - bottom) / span * (base - TOP), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value, label in zip(marks, texts, strict=True):
        y = py(value)
        parts.append(f'<line class="rule" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 3.5}" text-anchor="end">{label}</text>')
    for value, label in zip(steps, labels(steps), strict=True):
        # The last label would stick out of the picture, were it centred.
        anchor = "end" if px(value) > right - 8 else "middle"
        x = px(value)
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text x="{x}" y="{base + 16}" text-anchor="{anchor}">{label}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    for line in series:
        parts += _curve(line, px, py, bottom=base)
    parts.append("</svg>")

    kind = " <small>log scale</small>" if log else ""
    legend = "".join(
        f'<i style="background:var(--c{line.colour % COLOURS})"></i>{escape(line.name)}'
        for line in series
        if line.name
    )
    caption = f'<b>{escape(title)}</b>{kind}<span class="keys">{legend}</span>'
    return f"<figure><figcaption>{caption}</figcaption>{''.join(parts)}</figure>"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 x 10^k that enclose [low, high] in at most `most` intervals or so.

    The step is the smallest with (high - low) / step <= most.
    """
    if high <= low:  # A constant still needs an axis around it.
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (0.0, 1.0)
    power = math.floor(math.log10((high - low) / most))
    exponents = [(m, p) for p in (power, power + 1) for m in (1, 2, 5)]
    fits = lambda m, p: (high - low) / (m * 10.0**p) <= most * (1 + 1e-9)
    mantissa, power = next(pair for pair in exponents if fits(*pair))
    step = mantissa * 10.0**power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Rounded, since 3 * 0.1 is not 0.3.
    return [round(n * step, 12 - power) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose [low, high] > 0; with 1-2-5 up to two decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if high > 100 * low:
        every = math.ceil((last - first) / 6)
        return [10.0**p for p in range(first, last + every, every)]
    marks = [m * 10.0**p for p in range(first, last + 1) for m in (1, 2, 5)]
    begin = max(n for n, mark in enumerate(marks) if mark <= low)
    end = min(n for n, mark in enumerate(marks) if mark >= high)
    return marks[begin : max(end, begin + 1) + 1]


def labels(marks: list[float]) -> list[str]:
    """Texts that tell neighbouring ticks apart, in thousands (k), millions (M) … from 10 000 on."""
    largest = max(abs(mark) for mark in marks)
    units = [(1e9, "G"), (1e6, "M"), (1e3, "k")] if largest >= 10_000 else []
    unit, suffix = next(((unit, s) for unit, s in units if largest >= unit), (1, ""))
    return [f"{mark / unit:.6g}{suffix if mark else ''}" for mark in marks]


def _curve(line: Series, px, py, bottom: float) -> list[str]:
    """Polylines between the gaps, dots for few or lonely points, crosses for non-finite ones."""
    style = f"var(--c{line.colour % COLOURS})"
    parts, run = [], []
    for x, y in [*_thin(line.points), (math.nan, math.nan)]:
        if math.isfinite(y):
            run.append((x, y))
            continue
        if len(run) > 1:
            path = " ".join(f"{px(a)},{py(b)}" for a, b in run)
            parts.append(f'<polyline points="{path}" style="stroke:{style}"/>')
        if len(run) == 1 or len(line.points) <= DOTS:
            parts += [
                f'<circle cx="{px(a)}" cy="{py(b)}" r="2.6" style="fill:{style}">'
                f"<title>{escape(line.name)} step {a:g}: {b:.5g}</title></circle>"
                for a, b in run
            ]
        if math.isfinite(x):
            parts.append(
                f'<text class="bad" x="{px(x)}" y="{bottom - 3}" text-anchor="middle">×'
                f"<title>{escape(line.name)} step {x:g}: {y}</title></text>"
            )
        run = []
    return parts


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 2 x BUCKETS finite points: each stretch's minimum and maximum, so spikes stay."""
    if len(points) <= 2 * BUCKETS:
        return points
    kept = []
    for n in range(BUCKETS):
        part = points[n * len(points) // BUCKETS : (n + 1) * len(points) // BUCKETS]
        finite = [point for point in part if math.isfinite(point[1])]
        bad = [point for point in part if not math.isfinite(point[1])]
        extremes = (
            {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        )
        kept += sorted(extremes | set(bad[:1]))
    return kept
