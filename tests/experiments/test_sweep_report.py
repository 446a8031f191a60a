"""The page of a sweep: its numbers are those of the records, and anyone can open it."""

import json
import re
import struct
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest

from fmjax.experiments import sweep_report, sweep_results
from fmjax.io import sealed
from fmjax.reports import svg
from fmjax.tasks import report

METRIC = "validation/classify/accuracy"


def put(folder, number, settings, values, **facts):
    """A finished trial with an arm for each of the values; a task without seeds for one."""
    name, results = f"train-{number:08d}", []
    for seed, value in enumerate(values):
        own = folder / name / f"arms/{seed}"
        own.mkdir(parents=True)
        lines = [{"step": s, "time": s, "train/loss": 1 / (s + seed + 1)} for s in (10, 20, 30)]
        (own / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        arm = {"seed": seed} if len(values) > 1 else {}
        result = dict(seed=seed if arm else None, arm=arm, folder=f"arms/{seed}", failed="")
        results.append(result | {"metrics": {METRIC: value, "flops": 10**9 * number}} | facts)
    record = dict(number=number, settings=settings, command=f"python run.py <{number}>")
    record |= dict(state="done", reason="", exit_code=0, seconds=60.0, results=results)
    record["config"] = {"total": number, "log_every": number, "data": {"name": "pydocs"}}
    sealed.write(folder / f"{name}.json", record)
    return name


@pytest.fixture
def sweep(tmp_path):
    slices = {"classes": [{"name": "<b>", "examples": 9, "classify/accuracy": 0.25}]}
    facts = lambda size: dict(
        trainable_parameters=size,
        kept_bytes=4 * size,
        step_seconds=size / 100,
        ledger={"memory": {"peak_bytes": 2**20 * size}, "slices": slices},
        environment={"jax": "0.10"},
    )
    names = [
        put(tmp_path, 1, {"arg": "full,big"}, [0.8, 0.82, 0.84], **facts(1000)),
        put(tmp_path, 2, {"arg": "lora,big"}, [0.70, 0.71, 0.75], **facts(100)),
        put(tmp_path, 3, {"arg": "words,big"}, [0.75], trainable_parameters=10, kept_bytes=40),
    ]
    file = tmp_path / "train-failed.json"
    lost = sealed.read(tmp_path / f"{names[0]}.json") | {"settings": {"arg": "bad"}}
    lost |= dict(number=4, state="failed", reason="a <tag> & more", results=[])
    sealed.write(file, lost)
    belong(tmp_path, *names, file.stem, "train-not-yet")
    return tmp_path


def belong(folder, *names):
    """These trials are the sweep of the folder, in this order."""
    trials = []
    for number, name in enumerate(names, 1):
        file = folder / f"{name}.json"
        settings = json.loads(file.read_text())["settings"] if file.exists() else {}
        trials.append({"name": name, "number": number, "settings": settings})
    told = {"command": "python run.py --sweep", "trials": trials}
    sealed.write(folder / "sweep.json", told)


def test_the_page_says_what_the_records_say(sweep):
    text = sweep_results.report(sweep).read_text()
    (numbers,) = json.loads((sweep / "report.json").read_text())
    full, lora, words, bad = numbers["groups"]
    assert [g["name"] for g in numbers["groups"]] == ["full,big", "lora,big", "words,big", "bad"]
    assert full["values"] == {"0": 0.8, "1": 0.82, "2": 0.84} and full["difference"] is None
    assert lora["difference"][0] == pytest.approx(-0.1)
    assert lora["p_signs"] == 0.25 and lora["p_holm"] > 0.001  # all of 8 signs but two
    assert words["values"] == {"None": 0.75} and words["difference"][0] == pytest.approx(-0.07)
    assert lora["trains"] == [100] * 3 and lora["peak"] == [2**20 * 100] * 3
    assert bad["failed"] == 1
    for part in ("0.8200", "-0.1000", "3 of 5 trials done", "&lt;b&gt; (9)", "0.250"):
        assert part in text
    assert "a &lt;tag&gt; &amp; more" in text and "<tag>" not in text and "<b> (" not in text
    assert "python run.py &lt;2&gt;" in text and "total=2" in text and "log_every" not in text


def test_it_needs_nothing_from_elsewhere(sweep):
    text = sweep_results.report(sweep).read_text()
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert "width=device-width" in text and "overflow-x: auto" in text


def test_the_front_is_what_nothing_cheaper_surpasses():
    points = {
        name: (x, y, y - 0.1, y + 0.1)
        for name, x, y in (
            ("a", 1, 0.5),
            ("b", 2, 0.4),
            ("c", 3, 0.7),
            ("d", 9, 0.7),
            ("e", 9, 0.8),
        )
    }
    figure = ET.fromstring(sweep_report._against(points, METRIC, "cost"))
    (line,) = figure.iter("polyline")
    assert len(line.get("points").split()) == 3  # a, c, e
    dots = {dot.get("cx") + "," + dot.get("cy") for dot in figure.iter("circle")}
    assert len(dots) == 5 and set(line.get("points").split()) < dots
    # Of a loss the lower is the better: a, b and nothing after it.
    figure = ET.fromstring(sweep_report._against(points, "validation/loss", "cost"))
    (line,) = figure.iter("polyline")
    assert len(line.get("points").split()) == 2


def test_figures_are_pictures_too(sweep):
    sweep_results.report(sweep)
    files = {path.stem: path.read_bytes() for path in (sweep / "figures").iterdir()}
    against = {f"against-{name}" for name in ("trains", "flops", "seconds", "peak", "kept")}
    assert files.keys() == against | {"curve-all", "curve-1", "curve-2"}
    for content in files.values():
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width == 2 * svg.WIDTH and height > 2 * svg.HEIGHT


def test_curves_are_means_with_the_least_and_the_greatest(sweep):
    told = [one["name"] for one in json.loads((sweep / "sweep.json").read_text())["trials"][:2]]
    ended = [(name, json.loads((sweep / f"{name}.json").read_text())) for name in told]
    group = sweep_results.groups_of(ended, sweep)[1]
    (step, mean, least, most), *_ = sweep_report._curve(group, "train/loss")
    each = [1 / (10 + seed + 1) for seed in range(3)]
    assert (step, least, most) == (10, min(each), max(each))
    assert mean == pytest.approx(np.mean(each))


def test_what_is_varied_in_numbers_is_drawn(tmp_path):
    names, number = [], 0
    for base in ("scratch", "books"):
        for size in (16, 64, 256):
            number += 1
            own = {"data.examples": size, "init": base}
            names.append(put(tmp_path, number, own, [0.5, 0.6 + number / 100]))
    belong(tmp_path, *names)
    text = sweep_results.report(tmp_path).read_text()
    assert (tmp_path / "figures/over-data.examples.png").exists()
    assert "Accuracy over data.examples" in text
    figure = text[text.index("Accuracy over data.examples") :]
    figure = figure[: figure.index("</figure>")]
    assert figure.count("<polyline") == 2 and figure.count("<polygon") == 2
    assert "scratch" in figure and "books" in figure


def test_all_learning_curves_are_in_one_figure_a_colour_a_method(sweep):
    text = sweep_results.report(sweep).read_text()
    figure = text[text.index("loss (train): all") :]
    figure = figure[: figure.index("</figure>")]
    colours = [line.split("var(--c")[1][0] for line in figure.split("<polyline")[1:]]
    assert colours == ["0", "1", "2"]
    against = text[text.index("Accuracy and parameters that train") :]
    dots = [dot.split("var(--c")[1][0] for dot in against.split("<circle")[1:4]]
    assert sorted(dots) == ["0", "1", "2"]


def test_the_page_names_data_base_and_date(sweep):
    text = sweep_results.report(sweep).read_text()
    assert "<td>data</td><td>pydocs</td>" in text
    assert "<td>base model</td><td>none: trained from scratch</td>" in text
    assert re.search(r"<td>written</td><td>20\d\d-\d\d-\d\d \d\d:\d\d UTC</td>", text)


def test_intervals_of_shares_are_possible_shares(tmp_path):
    names = [put(tmp_path, 1, {"arg": "a"}, [0.3, 0.6]), put(tmp_path, 2, {"arg": "b"}, [0.9, 1.0])]
    belong(tmp_path, *names)
    text = sweep_results.report(tmp_path).read_text()
    (numbers,) = json.loads((tmp_path / "report.json").read_text())
    # Student's intervals of two seeds reach from -1.46 to 2.36, and from 0.31 to 1.59.
    a, b = (one["interval"] for one in numbers["groups"])
    assert a == [0, 1] and b[0] == pytest.approx(0.95 - 12.706 * 0.05, abs=1e-3) and b[1] == 1
    assert "0.0000 … 1.0000" in text


def test_the_task_writes_it_again(sweep, capsys):
    report.run(SimpleNamespace(folder=str(sweep)), sweep)
    assert (sweep / "report.html").exists()
    assert capsys.readouterr().out == f"report: {sweep / 'report.html'}\n"


def test_a_sweep_of_which_nothing_is_known_has_a_page(sweep):
    belong(sweep, "none")
    assert "0 of 1 trials done" in sweep_results.report(sweep).read_text()


def test_trials_have_the_numbers_and_settings_of_the_sweep_as_it_is_now(sweep):
    names = [one["name"] for one in json.loads((sweep / "sweep.json").read_text())["trials"]]
    belong(sweep, names[2], names[0], names[1])
    text = sweep_results.report(sweep).read_text()
    for number, command in ((1, 3), (2, 1), (3, 2)):
        assert f"<p>Trial {number}</p><pre>python run.py &lt;{command}&gt;</pre>" in text
    assert "3 of 3 trials done" in text and 'class="verdict done"' in text


def test_curves_of_settings_with_the_same_words_stay_apart():
    curves = {"rank=8, alpha=16": [1], "alpha=16, rank=8": [2]}
    assert sweep_report._unlike(curves) == curves
    assert list(sweep_report._unlike({"a, x": [1], "b, x": [2]})) == ["a", "b"]
