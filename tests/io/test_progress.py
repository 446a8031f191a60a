"""What is shown while a run goes on."""

import io
from types import SimpleNamespace

import pytest

from fmjax.io import progress

METRICS = {
    "train/loss": 5.12345,
    "validation/loss": 5.456,
    "optim/lr": 9.1e-4,
    "perf/tokens_per_sec": 41234.0,
    "perf/data_wait": 0.0012,
    "memory/peak_gib": 1.0,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (999, "999"), (999.6, "1k"), (41234, "41.2k"), (1.5e6, "1.5M"), (3e15, "3e+03T")],
)
def test_count(value, text):
    assert progress.count(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.42, "0.4s"),
        (1, "1s"),
        (59.6, "1m00s"),
        (80, "1m20s"),
        (3599.7, "1h00m"),
        (3725, "1h02m"),
        (93784, "1d02h"),
    ],
)
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


def test_plain_lines(clock):
    file = io.StringIO()
    with progress.Progress(1500, start=400, file=file) as shown:
        clock.now += 30  # Compilation and the first 50 steps.
        shown.log(450, METRICS)
        clock.now += 4
        shown.log(500, {"train/loss": 5.0})
    assert file.getvalue().splitlines() == [
        "step  450/1500  loss 5.123  val 5.456  lr 9.1e-04  41.2k tok/s  data 0.1%  eta 10m30s",
        # 50 steps in 4 s; the validation loss is the last one.
        "step  500/1500  loss 5.000  val 5.456  lr 9.1e-04  41.2k tok/s  data 0.1%  eta 1m20s",
    ]


@pytest.mark.parametrize(
    "best, said",
    [
        ("validation/tag/f1", "val 2.000  f1 0.613  "),
        ("validation/loss", "val 2.000  "),
        ("", "val 2.000  "),
    ],
)
def test_the_metric_that_decides_is_shown_beside_the_loss(clock, best, said):
    file = io.StringIO()
    with progress.Progress(10, best=best, file=file) as shown:
        shown.log(0, {"validation/loss": 2.0, "validation/tag/f1": 0.6127})
    assert file.getvalue() == f"step  0/10  {said}eta ?\n"


def test_of_several_groups_the_largest_learning_rate_is_shown(clock):
    file = io.StringIO()
    with progress.Progress(10, file=file) as shown:
        shown.log(0, {"optim/lr/head": 1e-2, "optim/lr/train": 1e-3, "optim/grad_norm": 7.0})
    assert file.getvalue() == "step  0/10  lr 1.0e-02  eta ?\n"


def test_long_lines_lose_what_matters_least(clock):
    file = io.StringIO()
    with progress.Progress(10**9, file=file) as shown:
        clock.now += 1
        shown.log(1, METRICS | {"perf/mfu": 0.381})
    (line,) = file.getvalue().splitlines()
    assert len(line) <= 100 and "mfu" not in line and "eta" in line


def test_any_metrics_and_any_numbers_can_be_shown(clock):
    file = io.StringIO()
    with progress.Progress(10, file=file) as shown:
        shown.log(0, {"reward": 1.0})
        shown.log(1, {"train/loss": float("nan")})
    assert file.getvalue().splitlines()[0] == "step  0/10  eta ?"
    assert "loss   nan" in file.getvalue()


def test_other_processes_show_nothing():
    file = Terminal()
    with progress.Progress(10, enabled=False, file=file) as shown:
        shown.step(1)
        shown.log(1, METRICS)
        shown.print("hello")
    assert file.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    file = Terminal()
    with progress.Progress(1500, file=file) as shown:
        shown.saved(400)
        shown.print("a [line] above")
        shown.log(500, METRICS)
    text = file.getvalue()
    assert "a [line] above" in text and "━" in text
    assert "step 500/1500" in text and "loss 5.123" in text and "saved 400" in text


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    with progress.Progress(10, file=file) as shown:
        shown.log(5, {"train/loss": 1.0})
    assert file.getvalue().startswith("step  5/10  loss 1.000")


def test_a_long_part_between_steps_gets_a_line_every_ten_seconds(clock):
    file = io.StringIO()
    with progress.Progress(10, file=file) as shown:
        clock.now += 60  # Training before it does not count.
        show = shown.part("evaluation")
        for done in range(1, 26):
            clock.now += 1
            show(done / 25)
    assert file.getvalue().splitlines() == ["evaluation 44 %", "evaluation 88 %"]


def test_a_part_is_shown_in_the_bar_until_the_next_numbers(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    file = Terminal()
    with progress.Progress(10, file=file) as shown:
        show = shown.part("evaluation")
        show(0.374)
        shown._bar._rich.refresh()
        middle = file.getvalue()
        shown.log(5, METRICS)
    assert "evaluation 37 %" in middle
    after = file.getvalue()[len(middle) :]
    assert "loss 5.123" in after and "evaluation" not in after


def test_a_part_outside_the_loop_is_a_bar_or_lines(clock, monkeypatch):
    lines = []
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with progress.part(lines.append) as show:
        for done in range(1, 13):
            clock.now += 1
            show(done / 12, f"{done} files")
    assert lines == ["11 files, 92 %"] and not progress.sys.stderr.getvalue()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stderr", Terminal())
    with progress.part(lines.append) as show:
        show(0.5, "6 files")
    assert "6 files" in progress.sys.stderr.getvalue() and len(lines) == 1
    monkeypatch.setattr("sys.stderr", Terminal())
    with progress.part(lines.append, enabled=False) as show:
        show(0.5, "6 files")
    assert not progress.sys.stderr.getvalue()


def test_the_bar_says_what_is_done_meanwhile():
    with progress.Progress(10, file=Terminal()) as shown:
        shown.log(1, METRICS)
        before = shown._bar.numbers
        with shown.doing("compiling …"):
            assert shown._bar.numbers == "compiling …"
        assert shown._bar.numbers == before
    with progress.Progress(10, file=io.StringIO()) as shown, shown.doing("compiling …"):
        pass
    assert shown._file.getvalue() == ""
