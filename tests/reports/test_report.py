"""The page of a run: complete, self-contained, and safe to open."""

import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from fmjax.errors import ConfigError
from fmjax.io import environment, metrics_log
from fmjax.reports import report_facts, run_report
from fmjax.tasks import report

NASTY = "<script>alert('x')</script>&\""


@pytest.fixture
def folder(tmp_path):
    """A run of 40 steps with a roll-back, a skipped update and hostile texts everywhere."""
    folder = tmp_path / "mlm-1a2b3c4d"
    folder.mkdir()
    config = {"optim": {"lr": 3e-4, "name": "adamw"}, "init": NASTY, "objectives": {"mlm": {}}}
    config["tokenizer"] = {"kind": "wordpiece"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "status.json").write_text(json.dumps({"state": "failed", "reason": NASTY}))
    rows = [
        {"event": "start", "step": 0, "time": 4, "spent": {"init": 4}, "command": "python run.py"},
        {"step": 10, "time": 10, "spent": {"compile": 1}, "train/loss": 9.0, "optim/lr": 1e-4},
        {"step": 20, "time": 12, "train/loss": "NaN", "optim/lr": 2e-4, NASTY: 0.1},
        {"event": "skipped_update", "step": 20, "time": 12},
        {"step": 20, "time": 13, "validation/loss": 7.25, "validation/mlm/accuracy": 0.125},
        {"event": "resume", "step": 20, "time": 18, "lost_sec": 5, "command": "python run.py a"},
        {"step": 40, "time": 20, "train/loss": 6.5, "tokens": 12345, NASTY: 0.2},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_report.summarize(
        folder,
        total=1500,
        config_difference=[["optim.lr", 1e-3, 3e-4], ["init", "", NASTY]],
        environment=environment.environment(device=NASTY),
    )
    return folder


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def page(folder):
    return Page(run_report.write(folder).read_text(encoding="utf-8"))


def test_the_page_is_self_contained(folder, page):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "href", "srcset"} & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not re.search(r"https?:|url\(|@import", text)


def test_every_text_is_escaped(page):
    joined = "".join(page.texts)
    assert "script" not in page.tags
    # Status, configuration value, environment, metric name in table and figure.
    assert joined.count("alert('x')") >= 5


def test_the_verdict_says_what_happened(page):
    verdict = next(text for text in page.texts if text.startswith("Failed after"))
    assert verdict.startswith("Failed after 40 of 1,500 steps (<script>")
    assert "in 20s. Validation loss 7.250, mlm accuracy 12.5%. Resumed 1×." in verdict
    assert verdict.endswith("Updates skipped as not finite: 1.")


def test_what_differs_from_the_defaults_is_marked(folder, page):
    text = (folder / "report.html").read_text(encoding="utf-8")
    changed = re.findall(r'<tr class="changed"><td>(.*?)</td><td>(.*?)<small>(.*?)</small>', text)
    assert ("optim.lr", "0.0003", "default 0.001") in changed and len(changed) == 2
    assert "2 of 5 values differ from the file's defaults." in page.texts


def test_shares_of_time(page):
    # 20 s: 4 start-up, 1 compilation, 5 lost, the other 10 training.
    at = page.texts.index("training steps")
    told = page.texts[at : page.texts.index("Commands")]
    assert [text for text in told if text.endswith("%")] == ["50.0%", "20.0%", "5.0%", "25.0%"]
    assert "saving" not in told  # Nothing was spent on it.


def test_the_last_command_resumes_and_others_name_the_folder(folder, page):
    assert "python run.py a" in page.texts
    task = lambda name: f"python run.py --config=configs/{name}.py --config.folder={folder}"
    assert task("evaluate") in page.texts and task("export") in page.texts
    assert f'{task("fill_mask")} --config.text="The [MASK] of a function."' in page.texts
    images = run_report._commands(folder, {"objectives": {"classify": {}}}, {"command": ""})
    assert "configs/evaluate.py" in images and "configs/export.py" not in images


def test_rows_of_one_image_each_are_counted_once():
    counts = {"train": {"images": 1423, "rows": 1423}, "validation": {"images": 2, "rows": 1}}
    facts = dict(report_facts.rows({"data": {"name": "digits"}}, {"step": 0, "data": counts}))
    assert facts["data"] == "digits; train 1,423 images; validation 2 images, 1 rows"


def test_curves_share_a_figure_by_what_they_measure():
    rows = [
        {"step": step, "time": step, "train/mlm/loss": 2.0, "validation/mlm/loss": 3.0}
        | {"optim/lr/head": 0.1, "optim/lr/trunk": 0.2, "tokens": step, "reward": step / 7}
        for step in (1, 2)
    ]
    loss, lr, reward = run_report._curves(rows)
    assert "Loss" in loss and "train mlm" in loss and "validation mlm" in loss
    assert "Learning rate" in lr and "head" in lr and "trunk" in lr
    assert "Reward" in reward


def test_the_loss_of_the_only_objective_is_drawn_once():
    rows = [{"step": n, "time": n, "train/loss": n, "train/mlm/loss": n} for n in (1.0, 2.0)]
    assert "train mlm" not in run_report._curves(rows)[0]
    rows[1] |= {"train/mlm/loss": 1.5}
    assert "train mlm" in run_report._curves(rows)[0]


def test_a_split_has_one_colour_in_all_figures_and_noise_none():
    rows = [
        {"step": n, "time": n, "train/loss": n, "train/mlm/accuracy": 0.1 * n}
        | {
            "validation/loss": n,
            "validation/mlm/accuracy": 0.1 * n,
            "train/mlm/mask_rate": 0.15 + n / 1e4,
        }
        for n in (1.0, 2.0)
    ]
    figures = run_report._curves(rows)
    assert not any("Mask rate" in figure for figure in figures)
    for figure in figures[:2]:
        found = re.findall(r"background:var\(--c(\d)\)\"></i>(\w+)", figure)
        assert found == [("0", "train"), ("1", "validation")]
    assert list(run_report._colours(["train/a/loss", "train/b/loss"], {})) == [0, 2]


def test_what_was_trained_is_said():
    config = {
        "data": {"name": "text", "train": ["a.txt", "b.txt"]},
        "batch_size": 8,
        "init": "base",
    }
    counts = {"documents": 98, "tokens": 186_671, "rows": 240}
    summary = {
        "model": {"name": "bert", "width": 128, "depth": 2, "vocab_size": 8192, "experts": 0},
        "parameters": 1_234_567,
        "trainable_parameters": 1000,
        "data": {"train": counts, "validation": {"documents": 2}, "bad_records": 0},
        "step": 60,
        "metrics": {"tokens": 15360},
        "finished": "2026-11-30 17:00 UTC",
        "environment": {"device": "1 x cpu", "fmjax": "0.1.0 aa", "commit": "commit bb"},
    }
    assert dict(report_facts.rows(config, summary)) == {
        "model": "bert: width 128, depth 2, vocabulary 8,192",
        "parameters": "1,234,567, of which 1,000 train",
        "starts from": "base",
        "data": "a.txt, b.txt; train 98 documents, 186,671 tokens, 240 rows; "
        "validation 2 documents",
        "trained on": "15,360 tokens in 60 steps, 2 epochs",
        "device": "1 x cpu",
        "finished": "2026-11-30 17:00 UTC",
        "code": "0.1.0 aa commit bb",
    }
    assert report_facts.rows({}, {"step": 0}) == []
    assert run_report._shown("flops", 7_043_914_137_600) == "7.04 TFLOP"


def test_the_loss_of_the_only_objective_is_no_row_beside_the_loss():
    metrics = {"train/loss": 2.0, "train/mlm/loss": 2.0, "validation/loss": 3.0}
    metrics["validation/mlm/loss"] = 3.0
    text = run_report._results({"metrics": metrics, "step": 1})
    assert "mlm/loss" not in text and "<td>loss</td>" in text
    metrics["train/mlm/loss"] = 1.5
    assert "mlm/loss" in run_report._results({"metrics": metrics, "step": 1})


def test_a_wide_range_of_losses_gets_a_log_axis():
    rows = [{"step": n, "time": n, "train/loss": value} for n, value in enumerate((50.0, 1.0))]
    assert "log scale" in run_report._curves(rows)[0]
    rows[1]["train/loss"] = math.nan
    assert "log scale" not in run_report._curves(rows)[0]


def test_summary(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == 40 and summary["total"] == 1500 and summary["seconds"] == 20
    assert summary["metrics"]["train/loss"] == 6.5 and summary["metrics"]["tokens"] == 12345
    assert summary["resumes"] == summary["skipped_updates"] == 1
    assert summary["goodput"]["lost"] == 5 and summary["environment"]["fmjax"]


def test_a_summary_with_nan_is_json(tmp_path):
    with metrics_log.Logger(tmp_path, tensorboard=False) as log:
        log.write(1, {"train/loss": math.nan})
    run_report.summarize(tmp_path)
    text = (tmp_path / "summary.json").read_text()
    summary = json.loads(text, parse_constant=pytest.fail)
    assert summary["metrics"]["train/loss"] == "NaN"
    assert "nan" in run_report.write(tmp_path).read_text(encoding="utf-8")


def test_a_run_that_was_killed_early_has_a_page(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    Page(run_report.write(tmp_path).read_text(encoding="utf-8"))


def test_the_task_writes_the_page(folder, tmp_path, capsys):
    config = SimpleNamespace(folder=str(folder))
    report.run(config, tmp_path, dry_run=True)
    assert not (folder / "report.html").exists()
    report.run(config, tmp_path)
    assert (folder / "report.html").exists() and "report.html" in capsys.readouterr().out


def test_the_task_refuses_other_folders(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.folder=.*nowhere.* is neither a run folder"):
        report.run(SimpleNamespace(folder=tmp_path / "nowhere"), tmp_path)


def test_nothing_temporary_is_left(folder):
    run_report.write(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "status.json",
        "metrics.jsonl",
        "summary.json",
        "report.html",
    }
