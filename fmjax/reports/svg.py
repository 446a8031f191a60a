"""Curves as inline SVG: a few lines, axes with nice numbers, no scripts, no dependency.

Colours are the CSS variables --c0 … --c5 of the page; text and grid use its classes.
"""

import math
import re
from html import escape
from typing import NamedTuple

from fmjax.io.progress import count

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 8, 36  # LEFT is more where labels are long
CHARACTER = 7  # at most the width of a digit
BUCKETS = 250  # Longer series are drawn as the minimum and maximum of so many stretches.
NAMED = 15  # So many names are all shown, of more those that have a place.
DOTS = 40  # Series up to this long show their points, with the value on hovering.
COLOURS = 6


class Series(NamedTuple):
    """One curve: (x, value) pairs in order; values may be NaN or infinite (a gap)."""

    name: str
    points: list[tuple[float, float]]
    colour: int = 0
    band: tuple[tuple[float, float, float], ...] = ()  # (x, low, high): a region; of one x, a bar
    dashed: bool = False  # a line without points
    label: bool = False  # the name beside the points, not in the caption


def plot(
    title: str,
    series: list[Series],
    *,
    zero: bool = False,
    log: bool = False,
    x: str = "step",
    log_x: bool = False,
) -> str:
    """A <figure> with the curves over `x`. `zero`: the axis begins at 0, for values >= 0.

    `log` and `log_x` ask for logarithmic axes; values <= 0 refuse them.
    """
    points = [point for line in series for point in line.points]
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>no finite value</p></figure>"
    values = [y for _, y in finite]
    values += [y for line in series for _, *ends in line.band for y in ends if math.isfinite(y)]
    low, high = min(values), max(values)
    log = log and low > 0
    marks = log_ticks(low, high) if log else ticks(min(low, 0.0) if zero else low, high)
    first, last = min(x for x, _ in finite), max(x for x, _ in finite)
    log_x = log_x and first > 0
    steps = log_ticks(first, last) if log_x else [t for t in ticks(0, last) if t <= last]

    right, base = WIDTH - RIGHT, HEIGHT - BOTTOM
    texts = labels(marks)
    left = max(LEFT, 10 + CHARACTER * max(map(len, texts)))
    px = _scale((steps[0], steps[-1]) if log_x else (0, last), (left, right), log_x)
    py = _scale((marks[0], marks[-1]), (base, TOP), log)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value, label in zip(marks, texts, strict=True):
        y = py(value)
        parts.append(f'<line class="rule" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 3.5}" text-anchor="end">{label}</text>')
    shown = [count(step) for step in steps] if log_x else labels(steps)
    for value, label in zip(steps, shown, strict=True):
        # The last label would stick out of the picture, were it centred.
        anchor = "end" if px(value) > right - 8 else "middle"
        at = px(value)
        parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text x="{at}" y="{base + 16}" text-anchor="{anchor}">{label}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x)}</text>')
    for line in series:
        parts += _band(line, px, py)
    for line in series:
        parts += _curve(line, px, py, bottom=base, x=x)
    parts += _names([line for line in series if line.label], px, py, (left, right))
    parts.append("</svg>")

    kind = " <small>log scale</small>" if log else ""
    legend = "".join(
        f'<i style="background:var(--c{line.colour % COLOURS})"></i>{escape(line.name)}'
        for line in series
        if line.name and not line.label
    )
    caption = f'<b>{escape(title)}</b>{kind}<span class="keys">{legend}</span>'
    return f"<figure><figcaption>{caption}</figcaption>{''.join(parts)}</figure>"


def _scale(values: tuple[float, float], pixels: tuple[float, float], log: bool):
    """From values to pixels, both from the first to the second; a single value is in the middle."""
    own = math.log10 if log else float
    low, span = own(values[0]), own(values[1]) - own(values[0])
    size = pixels[1] - pixels[0]
    return lambda value: round(pixels[0] + ((own(value) - low) / span if span else 0.5) * size, 1)


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
    units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")] if largest >= 10_000 else []
    unit, suffix = next(((unit, s) for unit, s in units if largest >= unit), (1, ""))
    return [f"{mark / unit:.6g}{suffix if mark else ''}" for mark in marks]


def _band(line: Series, px, py) -> list[str]:
    """The region between the ends of the band, or a bar where it has one x."""
    style = f"var(--c{line.colour % COLOURS})"
    ends = [(x, low, high) for x, low, high in line.band if math.isfinite(low + high)]
    if len(ends) == 1:
        ((x, low, high),) = ends
        at, top, bottom = px(x), py(high), py(low)
        return [f'<line x1="{at}" x2="{at}" y1="{top}" y2="{bottom}" style="stroke:{style}"/>']
    border = [(x, low) for x, low, _ in ends] + [(x, high) for x, _, high in reversed(ends)]
    path = " ".join(f"{px(x)},{py(y)}" for x, y in border)
    return [f'<polygon points="{path}" style="fill:{style}" opacity="0.18"/>'] if ends else []


def _curve(line: Series, px, py, bottom: float, x: str) -> list[str]:
    """Polylines between the gaps, dots for few or lonely points, crosses for non-finite ones."""
    style = f"var(--c{line.colour % COLOURS})"
    dashes = ";stroke-dasharray:5 4" if line.dashed else ""
    parts, run = [], []
    for at, y in [*_thin(line.points), (math.nan, math.nan)]:
        if math.isfinite(y):
            run.append((at, y))
            continue
        if len(run) > 1:
            path = " ".join(f"{px(a)},{py(b)}" for a, b in run)
            parts.append(f'<polyline points="{path}" style="stroke:{style}{dashes}"/>')
        if not line.dashed and (len(run) == 1 or len(line.points) <= DOTS):
            parts += [
                f'<circle cx="{px(a)}" cy="{py(b)}" r="2.6" style="fill:{style}">'
                f"<title>{escape(line.name)} {escape(x)} {a:g}: {b:.5g}</title></circle>"
                for a, b in run
            ]
        if math.isfinite(at):
            parts.append(
                f'<text class="bad" x="{px(at)}" y="{bottom - 3}" text-anchor="middle">×'
                f"<title>{escape(line.name)} {escape(x)} {at:g}: {y}</title></text>"
            )
        run = []
    return parts


def _names(lines: list[Series], px, py, sides: tuple[float, float]) -> list[str]:
    """The names beside their first points, each where it is clear of those before.

    Where no place near the point is, a few names go further from it, with a line to the point; of
    many only the point itself tells its name, under the pointer.
    """
    lines = [line for line in lines if line.name]
    parts, taken = [], []
    dots = [(px(x), py(y)) for line in lines for x, y in line.points[:1] if math.isfinite(y)]
    for line in lines:
        (x, y), width = line.points[0], CHARACTER * 0.86 * len(line.name)
        if not math.isfinite(y):
            continue
        at, level = px(x), py(y)
        places = [(at + 6, level + 4), (at - 6 - width, level + 4)]
        places += [(at - width / 2, level + 4 + d) for d in (-11, 12, -21, 22, -31, 32)]
        near = len(places)
        if len(lines) <= NAMED:
            places += _further(at, level, width, sides)
        boxes = [(a, b - 9, a + width, b + 1) for a, b in places]
        inside = [box for box in boxes if sides[0] <= box[0] and box[2] <= sides[1]]
        inside = [box for box in inside if TOP <= box[1] and box[3] <= HEIGHT - BOTTOM]
        others = [dot for dot in dots if dot != (at, level)]
        box = next((box for box in inside if _clear(box, taken, others)), None)
        if box is None:
            continue
        taken.append(box)
        if box not in boxes[:near]:
            end = min(max(at, box[0]), box[2])
            parts.append(
                f'<line class="rule" x1="{at}" y1="{level}" x2="{end:.1f}" y2="{box[3]:.1f}"/>'
            )
        place = f'x="{box[0]:.1f}" y="{box[3] - 1:.1f}"'
        parts.append(f'<text class="name" {place}>{escape(line.name)}</text>')
    return parts


def _further(
    at: float, level: float, width: float, sides: tuple[float, float]
) -> list[tuple[float, float]]:
    """Places for a name anywhere in the figure, the nearest first."""
    rows = range(TOP + 10, HEIGHT - BOTTOM, 12)
    columns = range(round(sides[0]) + 2, round(sides[1] - width), 12)
    places = [(float(x), float(y)) for y in rows for x in columns]
    return sorted(places, key=lambda p: math.hypot(p[0] + width / 2 - at, 2 * (p[1] - level)))


def _clear(box: tuple[float, ...], boxes: list[tuple], dots: list[tuple[float, float]]) -> bool:
    """True if a box (left, top, right, bottom) meets none of the others, and no dot is in it."""
    left, top, right, bottom = box
    dotted = any(left - 2 < x < right + 2 and top < y < bottom for x, y in dots)
    return not dotted and not any(_meet(box, other) for other in boxes)


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """True if two boxes (left, top, right, bottom) overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def png(figure: str, style: str, zoom: float = 2.0) -> bytes:
    """A <figure> of `plot` as a picture, on white, with its title; `style` has the colours --c0 …

    Texts are drawn with a sans-serif font of the system.
    """
    import resvg_py

    light = reversed(re.findall(r"--(c\d): (#\w+);", style))  # the first of each; dark ones follow
    colours = dict(light)
    title = re.search(r"<b>(.*?)</b>", figure)[1]
    keys = re.findall(r'<i style="background:var\(--(c\d)\)"></i>([^<]*)', figure)
    top = 22 + 14 * len(keys)
    body = re.search(r"<svg[^>]*>(.*)</svg>", figure, re.DOTALL)[1]
    body = re.sub(r"var\(--(c\d)\)", lambda match: colours[match[1]], body)
    legend = "".join(
        f'<rect x="10" y="{24 + 14 * n}" width="14" height="3" fill="{colours[colour]}"/>'
        f'<text x="30" y="{29 + 14 * n}">{name}</text>'
        for n, (colour, name) in enumerate(keys)
    )
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" '
            f'height="{HEIGHT + top}"><text x="10" y="14" class="title">{title}</text>{legend}'
            f'<g transform="translate(0 {top})">{body}</g></svg>',
            background="white",
            zoom=zoom,
            style_sheet=PNG_STYLE,
        )
    )


PNG_STYLE = """
text {
  font-family: "DejaVu Sans", "Liberation Sans", "Noto Sans", Arial, Helvetica, sans-serif;
  font-size: 11px; fill: #667085;
}
text.title { font-size: 13px; font-weight: 600; fill: #1c2430; }
text.bad { fill: #b42318; font-size: 14px; }
text.name { fill: #1c2430; paint-order: stroke; stroke: white; stroke-width: 3px; }
.rule { stroke: #e4e7ec; } .axis { stroke: #667085; }
polyline { fill: none; stroke-width: 1.6; }
"""


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
