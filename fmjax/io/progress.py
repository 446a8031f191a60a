"""Progress of a run for a person: a bar on a terminal, else one plain line per log.

Also how numbers are shown to people everywhere: `count(41234)` is "41.2k", `duration(80)` "1m20s".
"""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# What people ask for first of a task, the last part of the metric's name.
FALLING = (  # less is better
    *("loss", "perplexity", "nats", "bits_per_byte", "ece", "brier"),
    *("balance", "router_z", "dropped"),
)
SHARES = ("accuracy", "f1", "exact_match", "retrieval")  # from 0 to 1
SCORES = ("accuracy", "spearman", "pearson", "f1", "exact_match", "retrieval")

WIDTH = 100  # of a plain line
SELDOM = 10.0  # seconds between plain lines about something that takes long
# Left out in this order when a line has no room.
OPTIONAL = ("saved", "mfu", "data", "lr", "best", "val")


class Progress:
    """Shows step, metrics and the time that remains; use it as a context manager.

    total, start: steps of the whole run, and those done before this session.
    enabled: False in processes other than 0, which show nothing.
    file: where to write, sys.stdout by default; the bar is for terminals only.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        best: str = "",
        enabled: bool = True,
        file: io.TextIOBase | None = None,
    ):
        self.total, self.best, self.enabled = total, best, enabled
        self._file = file or sys.stdout
        self._metrics: dict[str, float] = {}
        self._shown = self._saved = None
        self._anchor, self._logged = (start, time.monotonic()), False
        self._bar = _Bar(total, start, self._file) if enabled and _terminal(self._file) else None

    def step(self, step: int) -> None:
        """Advance to `step` steps done; cheap enough for every step."""
        if self._bar:
            self._bar.step(step)

    def log(self, step: int, metrics: Mapping[str, float], arm: int | None = None) -> None:
        """Show new numbers, of an `arm` where there are several.

        Those not given keep the value shown last; unknown ones are ignored. Shown are train/loss,
        validation/loss, the metric `best`, optim/lr (the largest optim/lr/<group>),
        perf/<unit>_per_sec and, as fractions of one, perf/mfu and perf/data_wait. A second plain
        line on a step holds only what is new.
        """
        if not self.enabled:
            return
        self._metrics |= metrics
        again, self._shown = step == self._shown and not self._bar, step
        fields = {} if arm is None else {"arm": f"arm {arm}"}
        fields |= _fields(metrics if again else self._metrics, self.best)
        fields["eta"] = f"eta {self._eta(step)}"
        if self._bar:
            saved = {} if self._saved is None else {"saved": f"saved {self._saved}"}
            self._bar.step(step)
            self._bar.show(_line(fields | saved, self._bar.room))
        else:
            width = len(str(self.total))
            self.print(_line({"step": f"step {step:>{width}}/{self.total}", **fields}, WIDTH))

    def part(self, what: str) -> Callable[[float], None]:
        """A function (share done) that shows how far something between two steps is, such as an
        evaluation: in the bar's line, else in a plain line every ten seconds."""
        show = self._bar.show if self._bar else seldom(self.print)
        return lambda share: show(f"{what} {percent(share)}")

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show `what` in the bar, where there is one, until the block ends."""
        if not self._bar:
            yield
            return
        before = self._bar.numbers
        self._bar.show(what)
        try:
            yield
        finally:
            self._bar.show(before)

    def saved(self, step: int) -> None:
        """Remember the last checkpoint, for the next `log`."""
        self._saved = step

    def print(self, *words: Any) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar:
            self._bar.print(" ".join(map(str, words)))
        elif self.enabled:
            print(*words, file=self._file, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _eta(self, step: int) -> str:
        """Time left at the pace since the first log, which compilation has slowed down."""
        (first, begin), now = self._anchor, time.monotonic()
        if not self._logged:
            self._anchor, self._logged = (step, now), True
        if step <= first:
            return "?"
        return duration((self.total - step) * (now - begin) / (step - first))


@contextlib.contextmanager
def part(
    print_line: Callable[[str], None], *, enabled: bool = True
) -> Iterator[Callable[[float, str], None]]:
    """A function (share done, message) for something long outside the loop: a bar on a terminal
    (of stderr), else a plain line every ten seconds; nothing where it is not enabled."""
    if not enabled:
        yield lambda share, message: None
        return
    if not _terminal(sys.stderr):
        line = seldom(print_line)
        yield lambda share, message: line(f"{message}, {percent(share)}")
        return
    import rich.console
    import rich.progress

    with rich.progress.Progress(console=rich.console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, message: bar.update(task, completed=share, description=message)


def seldom(print_line: Callable[[str], None]) -> Callable[[str], None]:
    """`print_line`, but at most every ten seconds, and not in the first ten."""
    last = time.monotonic()

    def line(text: str) -> None:
        nonlocal last
        if time.monotonic() - last > SELDOM:
            last = time.monotonic()
            print_line(text)

    return line


def percent(share: float) -> str:
    """0.374 -> "37 %"."""
    return f"{100 * share:.0f} %"


def count(value: float) -> str:
    """Three digits and a suffix: 999 -> "999", 41234 -> "41.2k", 1.5e6 -> "1.5M"."""
    for suffix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5 or suffix == "T":
            break
        value /= 1000
    return f"{value:.3g}{suffix}"


def duration(seconds: float) -> str:
    """0.42 -> "0.4s", 80 -> "1m20s", 3725 -> "1h02m", 93784 -> "1d02h"."""
    if seconds < 1:
        return f"{seconds:.1f}s"
    seconds = round(seconds)
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part:02}{below}"
    return f"{seconds // 60}m{seconds % 60:02}s" if seconds >= 60 else f"{seconds}s"


def spread(values: Sequence[Any]) -> str:
    """Mean and standard deviation; a number that is not finite may be text, as JSON has it."""
    numbers = np.array([float(value) for value in values])
    deviation = f" ± {np.std(numbers, ddof=1):.4f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.4f}{deviation}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as lines with aligned columns, the first to the left."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([name.ljust(first), *padded]).rstrip())
    return "\n".join(lines)


class _Bar:
    """One rich bar with a text of numbers; anything printed meanwhile appears above it."""

    def __init__(self, total: int, start: int, file: io.TextIOBase):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._console = Console(file=file)
        self._rich = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=16),
            TextColumn(
                "{task.fields[numbers]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=self._console,
            refresh_per_second=4,
        )
        self._rich.start()
        self.numbers = ""
        self._task = self._rich.add_task("", total=total, completed=start, numbers="")
        self.room = self._console.width - len(f"step {total}/{total}") - 16 - 3

    def step(self, step: int) -> None:
        self._rich.update(self._task, completed=step)

    def show(self, numbers: str) -> None:
        self.numbers = numbers
        self._rich.update(self._task, numbers=numbers)

    def print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._rich.stop()


def _terminal(file: io.TextIOBase) -> bool:
    if not file.isatty():
        return False
    from rich.console import Console

    return not Console(file=file).is_dumb_terminal


def _fields(metrics: Mapping[str, float], best: str) -> dict[str, str]:
    """The known metrics as short texts of constant width, in the order of the line."""
    rates = [value for name, value in metrics.items() if name.startswith("optim/lr")]
    if rates:
        metrics = {**metrics, "optim/lr": max(rates)}
    speed = next((name for name in metrics if name.endswith("_per_sec")), "")
    unit = speed.removeprefix("perf/").removesuffix("_per_sec").replace("tokens", "tok")
    shown = {
        "loss": ("train/loss", lambda v: f"loss {v:5.3f}"),
        "val": ("validation/loss", lambda v: f"val {v:5.3f}"),
        "best": (best, lambda v: f"{best.rpartition('/')[2]} {v:.3f}"),
        "lr": ("optim/lr", lambda v: f"lr {v:.1e}"),
        "speed": (speed, lambda v: f"{count(v):>5} {unit}/s"),
        "mfu": ("perf/mfu", lambda v: f"mfu {v:5.1%}"),
        "data": ("perf/data_wait", lambda v: f"data {v:.1%}"),
    }
    if best == "validation/loss":
        del shown["best"]
    return {
        name: text(metrics[metric]) for name, (metric, text) in shown.items() if metric in metrics
    }


def _line(fields: dict[str, str], width: int) -> str:
    for name in OPTIONAL:
        if len("  ".join(fields.values())) > width:
            fields.pop(name, None)
    return "  ".join(fields.values())
