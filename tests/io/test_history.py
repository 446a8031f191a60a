"""Damage to metrics.jsonl: said, the other lines kept, and no reason not to go on."""

import json
import random
import sys

import pytest
import runs

from fmjax.errors import CheckpointError
from fmjax.io import metrics_history, metrics_log
from fmjax.reports import run_report

pytest_plugins = ["runs"]
STEPS = range(10, 101, 10)


def write_log(folder):
    """A start, ten lines of training with a checkpoint after each second, an evaluation, an end."""
    with metrics_log.Logger(folder, tensorboard=False) as log:
        for step in STEPS:
            log.write(step, {"train/loss": 30 / step, "flops": 10**20, "x": float("nan")})
            if step % 20 == 0:
                log.event("checkpoint", step=step)
        log.write(100, {"validation/loss": 2.0})
        log.event("done", step=100, signal="")
    return folder / metrics_log.FILE


def change(file, index, change):
    """Changes the line `index` of a log."""
    lines = file.read_bytes().splitlines(keepends=True)
    lines[index] = change(lines[index])
    file.write_bytes(b"".join(lines))


def resume(folder, step=100):
    metrics_log.Logger(folder, resume_step=step, tensorboard=False).close()


ROW = {"step": 30, "time": 0.0}
DAMAGE = [
    lambda line: bytes([line[0] ^ 1]) + line[1:],
    lambda line: line.replace(b'"step"', b'"stdp"'),
    lambda line: line.replace(b'"step": 30', b'"step": null'),
    lambda line: line.replace(b'"step": 30', b'"step": "30"'),
    lambda line: line.replace(b'"step": 30', b'"step": true'),
    lambda line: line.replace(b'"step": 30', b'"step": 9030'),
    lambda line: line.replace(b'"step": 30', b'"step": 3'),
    lambda line: line.replace(b'"time": ', b'"time": 90000'),
    lambda line: line.replace(b'"time": ', b'"time": -'),
    lambda line: line.replace(b'"time": ', b'"time": 1e400, "a": '),
    lambda line: json.dumps(ROW | {"spent": 3}).encode() + b"\n",
    lambda line: json.dumps(ROW | {"spent": {"saving": "x"}}).encode() + b"\n",
    lambda line: json.dumps(ROW | {"train/loss": [1.0]}).encode() + b"\n",
    lambda line: json.dumps(ROW | {"train/loss": None}).encode() + b"\n",
    lambda line: json.dumps(ROW | {"train/loss": "much"}).encode() + b"\n",
    lambda line: b'{"step": 30, "time": 0.0, "tokens": 1' + 400 * b"0" + b"}\n",
    lambda line: b'{"event": "resume", "time": 0.0, "lost_sec": "x"}\n',
    lambda line: b'{"event": 3, "time": 0.0}\n',
    lambda line: b'{"event": "resume", "time": 0.0, "command": 3}\n',
    lambda line: b"[" * 100_000 + b"\n",
    lambda line: b"\xff" + line,
    lambda line: b"\0\0\0\n",
    lambda line: b"\n",
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_damaged_line_costs_no_other(tmp_path, capsys, damage):
    file = write_log(tmp_path)
    change(file, 4, damage)
    before = file.read_bytes()
    metrics_log.goodput(*metrics_log.read(tmp_path))
    run_report.write(tmp_path)
    resume(tmp_path)
    rows, events = metrics_log.read(tmp_path)
    assert [row["step"] for row in rows] == [step for step in STEPS if step != 30] + [100]
    names = ["start", "checkpoint", "damaged", *["checkpoint"] * 4, "done", "resume"]
    assert [event["event"] for event in events] == names
    text = before.splitlines()[4].decode(errors="backslashreplace").strip()
    assert events[2]["line"] == text[:2000]
    said = capsys.readouterr().err
    assert said == (
        f"warning: {file}: left out damaged lines (1); the file as it was is "
        "metrics.jsonl.damaged\n"
    )
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    resume(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_cut_after_damage_is_at_the_step(tmp_path):
    file = write_log(tmp_path)
    change(file, 2, lambda line: b"{\n")
    (tmp_path / "metrics.jsonl.damaged").write_text("of before")
    resume(tmp_path, step=60)
    assert [row["step"] for row in metrics_log.read(tmp_path)[0]] == [10, 30, 40, 50, 60]
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == "of before"
    assert (tmp_path / "metrics.jsonl.damaged.2").exists()


def test_no_flipped_bit_stops_a_reader(tmp_path):
    file = write_log(tmp_path)
    whole, count = file.read_bytes(), len(metrics_history.read(file).lines)
    for bit in random.Random(0).sample(range(8 * len(whole)), 200):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert len(metrics_history.read(file).lines) >= count - 2, (
            bit
        )  # A line break less spoils two.
        run_report.write(tmp_path)


def test_only_what_falls_is_out_of_order():
    assert metrics_history._rising([]) == []
    assert metrics_history._rising([1, 1, 9, 2, 3]) == [0, 1, 3, 4]
    assert metrics_history._rising([5, 6, 1, 7]) == [0, 1, 3]


def test_a_log_that_cannot_be_written_is_an_error_of_storage(tmp_path):
    (tmp_path / metrics_log.FILE).mkdir()
    with pytest.raises(CheckpointError, match=r"metrics.jsonl cannot be \w+ \(Is a dir"):
        resume(tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_whatever_its_log_holds(home, tmp_path, monkeypatch, capsys):
    runs.run_here(home, tmp_path, "--config.total=4 steps", monkeypatch=monkeypatch)
    file = tmp_path / metrics_log.FILE
    (tmp_path / "status.json").unlink()  # so that it is not taken for a finished one
    for content in (b'{"stdp": 4, "time": 1}\n', b"\0" * 999, b"[]\n" * 9, b"[" * 99_999 + b"\n"):
        file.write_bytes(content)
        runs.run_here(home, tmp_path, "--config.total=4 steps", monkeypatch=monkeypatch)
        assert [row["step"] for row in metrics_log.read(tmp_path)[0]] == [4]
        (tmp_path / "status.json").unlink()
    sys.stdout.flush()
    assert capsys.readouterr().err.count("left out damaged lines") == 3
