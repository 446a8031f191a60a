"""Sweeps: what trials there are, and that each is run once, whatever becomes of the others."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from common import ROOT

from fmjax import dispatch
from fmjax.config import load as configs
from fmjax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FmjaxError,
    NumericsError,
    Preempted,
)
from fmjax.experiments import sweep, sweep_results, trials
from fmjax.io import lock, workdir

FILE = """
import runpy
from fmjax.experiments import sweep

def get_config(arg=None):
    return runpy.run_path({path!r})["get_config"]("tiny" + (arg or ""))

{body}
"""
GRID = """
def get_sweep():
    return sweep.product(sweep.grid("optim.lr", (1e-3, 3e-3)), sweep.grid("seed", (0, 1)))
"""


def write(folder, body=GRID, name="trying.py"):
    file = folder / name
    file.write_text(FILE.format(path=str(ROOT / "configs/mlm.py"), body=body))
    return str(file)


# ---- the vocabulary ----


def test_the_words_by_hand():
    two, three = sweep.grid("a", (1, 2)), sweep.grid("b.c", "xyz")
    assert sweep.product(two, three) == [
        {"a": a, "b.c": b} for a in (1, 2) for b in "xyz"
    ]  # the last varies fastest
    assert sweep.zip(sweep.grid("a", (1, 2, 3)), three) == [
        {"a": 1, "b.c": "x"},
        {"a": 2, "b.c": "y"},
        {"a": 3, "b.c": "z"},
    ]
    assert sweep.zip(sweep.fixed("k", 0), two) == [{"k": 0, "a": 1}, {"k": 0, "a": 2}]
    assert sweep.chain(two, sweep.fixed("b", 0)) == [{"a": 1}, {"a": 2}, {"b": 0}]
    assert sweep.product() == [{}] and sweep.zip() == [] and sweep.product(two, []) == []
    with pytest.raises(ConfigError, match=r"sweep.zip: the sweeps have \[2, 3\] trials"):
        sweep.zip(two, three)
    with pytest.raises(ConfigError, match="'a' is set twice"):
        sweep.product(two, sweep.fixed("a", 3))


def test_what_is_drawn_stays_when_more_is_drawn():
    space = {
        "optim.lr": sweep.log_uniform(1e-5, 1e-2),
        "model.dropout": sweep.uniform(0, 0.5),
        "adapter.rank": sweep.choice(4, 8, 16),
    }
    many = sweep.random(space, 200, 3)
    assert sweep.random(space, 20, 3) == many[:20] != sweep.random(space, 20, 4)
    # One key's numbers do not depend on which others there are.
    del space["model.dropout"]
    alone = sweep.random(space, 20, 3)
    assert [one["optim.lr"] for one in alone] == [one["optim.lr"] for one in many[:20]]
    assert len(sweep.random({"adapter.rank": space["adapter.rank"]}, 50)) == 3  # no repeats
    with pytest.raises(ConfigError, match="'total' is given 3, which is no draw"):
        sweep.random({"total": 3}, 5)
    rates = [trial["optim.lr"] for trial in many]
    assert all(1e-5 <= rate <= 1e-2 and float(f"{rate:.3g}") == rate for rate in rates)
    assert 0.2 < sum(rate < 10**-3.5 for rate in rates) / 200 < 0.8
    assert {trial["adapter.rank"] for trial in many} == {4, 8, 16}
    json.dumps(many)


# ---- which trials there are ----


def one(key, *values):
    return f"def get_sweep(): return sweep.grid({key!r}, {values})"


def walk(spec, *words, folder=Path("nowhere")):
    return list(trials.walk(spec, words, folder))


def test_trials_are_the_configs_that_their_commands_make(tmp_path):
    spec = write(tmp_path)
    found = walk(spec, "--config.total=7")
    assert [trial.number for trial in found] == [1, 2, 3, 4]
    assert len({trial.name for trial in found}) == 4
    for trial, (rate, seed) in zip(
        found, [(1e-3, 0), (1e-3, 1), (3e-3, 0), (3e-3, 1)], strict=True
    ):
        assert trial.config.total == 7
        assert trial.config.optim.lr == rate and trial.config.seed == seed
        assert trial.words[0] == f"--config={spec}"
        again = configs.load(spec, trial.words[1:])
        assert configs.digest(again) == configs.digest(trial.config) in trial.name


def test_a_trial_may_be_another_argument_of_the_config(tmp_path):
    body = 'def get_sweep(arg): return sweep.grid("arg", ("", arg))'
    first, second = walk(write(tmp_path, body) + ":,runlocal")
    assert second.words[0].endswith(":,runlocal") and first.words[0].endswith(".py")
    assert configs.digest(first.config) != configs.digest(second.config)


@pytest.mark.parametrize(
    ("body", "words", "said"),
    [
        ("", (), r"trying.py: the file defines no get_sweep\(arg=None\)"),
        ("def get_sweep(): return []", (), r"gave \[\], expected a list with a \{key: value\}"),
        ("def get_sweep(): return ['seed']", (), "gave 'seed', expected a list"),
        ("def get_sweep(): pass", (), "gave None, expected a list"),
        ("def get_sweep(): yield 3", (), "gave 3, expected a list"),
        ("def get_sweep(): yield {'seed': 1 / 0}", (), "trying.py:8: ZeroDivisionError"),
        (one("seed", 0, 1), ("--config.arms=(('seed', (0, 1)),)",), "is what config.arms varies"),
        ("def get_sweep():\n    return 1 / 0", (), "trying.py:9: ZeroDivisionError"),
        (one("sede", 1, 2), (), r"trial 1 \(sede=1\): unknown key"),
        (one("seed", 1, -2), (), r"trial 2 \(seed=-2\): .*got -2"),
        (one("seed", 3, 3), (), r"trials 1 and 2 \(seed=3\) are the same run"),
        (one("log_every", 3, 4), (), "are the same run"),
        (GRID, ("--config.seed=5",), "--config.seed is what the trials of the sweep differ in"),
        (GRID, ("--config.distributed.auto=True",), "a sweep runs each trial in one process"),
    ],
)  # fmt: skip
def test_sweeps_that_cannot_be_run_are_refused_before_any_trial(body, words, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        walk(write(tmp_path, body), *words)


# ---- running them ----


class Task:
    """In the place of `tasks.start`: writes down what it was asked for."""

    def __init__(self, **failing):
        self.ran, self.failing = [], failing

    def __call__(self, config, folder, *, file, **flags):
        key = f"{config.optim.lr:g}/{config.seed}"
        self.ran.append(key)
        if key in self.failing:
            raise self.failing[key]
        folder.mkdir(parents=True, exist_ok=True)
        found = {"metrics": {"validation/loss": config.optim.lr + config.seed}, "seconds": 1.5}
        (folder / "summary.json").write_text(json.dumps(found))


@pytest.fixture
def task(monkeypatch):
    def use(**failing):
        made = Task(**failing)
        monkeypatch.setattr(dispatch, "start", made)
        return made

    return use


def start(spec, folder, which="all", *words, **flags):
    trials.start(spec, words, which, folder, **flags)


def records(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]


ALL = ["0.001/0", "0.001/1", "0.003/0", "0.003/1"]


def test_what_has_ended_is_not_done_again(task, tmp_path, capsys):
    spec, folder, ran = write(tmp_path), tmp_path / "sweep", task()
    start(spec, folder, "2")
    assert ran.ran == ALL[1:2]
    start(spec, folder)
    assert ran.ran == [ALL[1], ALL[0], *ALL[2:]]
    capsys.readouterr()
    start(spec, folder)
    start(spec, folder, "list")
    start(spec, folder, dry_run=True)
    assert len(ran.ran) == 4
    assert capsys.readouterr().out.count("4 of 4 trials have ended") == 3
    found = {record["number"]: record for record in records(folder)}
    assert found[4]["settings"] == {"optim.lr": 3e-3, "seed": 1} and found[4]["state"] == "done"
    (result,) = found[4]["results"]
    assert result["metrics"] == {"validation/loss": 1.003} and result["seed"] == 1
    assert f"--config={spec} --config.optim.lr=0.003 --config.seed=1" in found[4]["command"]
    assert found[4]["config"]["optim"]["lr"] == 3e-3
    start(spec, folder, "3", fresh=True)
    assert ran.ran[4:] == ["0.003/0"]


def test_a_changed_config_makes_other_trials_and_leaves_the_old_ones(task, tmp_path):
    spec, folder, ran = write(tmp_path), tmp_path / "sweep", task()
    start(spec, folder)
    start(spec, folder, "all", "--config.total=9")
    assert ran.ran == 2 * ALL and len(records(folder)) == 8
    write(tmp_path, GRID.replace("(0, 1)", "(0, 1, 2)"))  # other numbers, and two more trials
    start(spec, folder)
    assert ran.ran[8:] == ["0.001/2", "0.003/2"] and len(records(folder)) == 10


def test_a_failure_is_recorded_and_does_not_stop_the_rest(task, tmp_path, capsys):
    spec, folder = write(tmp_path), tmp_path / "sweep"
    ran = task(
        **{
            ALL[0]: DataError("no such file"),
            ALL[1]: NumericsError("loss is NaN"),
            ALL[2]: KeyError("bug"),
        }
    )
    with pytest.raises(DataError, match="3 of 4 trials failed; trial 1: no such file"):
        start(spec, folder)
    assert ran.ran == ALL
    found = {record["number"]: record for record in records(folder)}
    assert [found[n]["exit_code"] for n in (1, 2, 3, 4)] == [5, 3, 1, 0]
    assert found[3]["reason"] == "KeyError: 'bug'" and found[3]["results"] == []
    assert "Traceback" in capsys.readouterr().err
    # What may have passed is tried again; that it diverges is a result.
    ran = task()
    with pytest.raises(NumericsError, match="^trial 2: loss is NaN"):
        start(spec, folder)
    assert ran.ran == [ALL[0], ALL[2]]
    start(spec, folder, "1")
    start(spec, folder, "2")
    assert ran.ran == [ALL[0], ALL[2], ALL[1]]
    start(spec, folder)


def test_a_generator_may_give_up(task, tmp_path):
    with pytest.raises(ConfigError, match="get_sweep gave no trial"):
        start(write(tmp_path, "def get_sweep():\n    return\n    yield"), tmp_path / "sweep")
    # What it makes of a trial that failed is its own; a mistake there has its place.
    task(**{"0.001/0": NumericsError("NaN")})
    with pytest.raises(ConfigError, match=r"trying.py:\d+: IndexError"):
        start(write(tmp_path, ADAPTIVE), tmp_path / "sweep")


def test_numbers_of_numpy_are_numbers(tmp_path):
    body = "import numpy\ndef get_sweep(): return sweep.grid('optim.lr', numpy.logspace(-4, -3, 2))"
    assert [trial.config.optim.lr for trial in walk(write(tmp_path, body))] == [1e-4, 1e-3]


def test_a_trial_that_a_command_of_its_own_runs_is_left_alone(task, tmp_path, monkeypatch, capsys):
    spec, folder, ran = write(tmp_path), tmp_path / "sweep", task()
    start(spec, folder)
    second = folder / walk(spec)[1].name
    with lock.locked(second, print):
        start(spec, folder, fresh=True)
        assert ran.ran == [*ALL, ALL[0], *ALL[2:]]
        assert (second / "summary.json").exists() and len(records(folder)) == 4
        assert "trial 2 is being run already" in capsys.readouterr().out
    task(**{ALL[1]: lock.InUse("in use")})
    (folder / f"{second.name}.json").unlink()
    start(spec, folder)
    assert len(records(folder)) == 3 and "trial 2 is being run already" in capsys.readouterr().out


def test_the_list_says_how_far_each_is(task, tmp_path, capsys):
    spec, folder = write(tmp_path), tmp_path / "sweep"
    first, second, *_ = walk(spec)
    for trial, step in ((first, 7), (second, 9)):
        (folder / trial.name).mkdir(parents=True)
        status = {"state": "running", "step": step}
        (folder / trial.name / "status.json").write_text(json.dumps(status))
    with lock.locked(folder / "locks", print, f"{first.name}.json"):
        start(spec, folder, "list")
    told = capsys.readouterr().out
    assert "running at step 7" in told and "stopped at step 9" in told
    with pytest.raises(ConfigError, match="--fresh means nothing"):
        start(spec, folder, "list", fresh=True)


def test_damaged_examples_are_named(task, tmp_path):
    spec, folder = write(tmp_path), tmp_path / "sweep"
    task()
    start(spec, folder)
    file = folder / walk(spec)[2].name / workdir.EXAMPLES
    for damage in (b"", b"no archive", b"PK\x03\x04 half of one"):
        file.write_bytes(damage)
        with pytest.raises(CheckpointError, match="examples.npz cannot be read"):
            start(spec, folder, "list")
    file.unlink()
    start(spec, folder, "list")


def test_arms_are_shown_as_what_they_are():
    def result(accuracy, failed="", **arm):
        return {"metrics": {"m": accuracy}, "failed": failed, "arm": arm}

    seeds = [result(0.8, seed=0), result(0.9, seed=1)]
    assert sweep_results._number_of(seeds, "m") == "0.8500 ± 0.0707"
    assert sweep_results._number_of([*seeds, result(0.1, "NaN", seed=2)], "m").endswith(
        ", 1 failed"
    )
    rates = [result(0.8, **{"optim.lr": 1e-3}), result(0.1, **{"optim.lr": 1.0})]
    assert sweep_results._number_of(rates, "m") == "0.1000 … 0.8000"
    assert sweep_results._number_of([result(0.1, "NaN")], "m") == "1 failed"
    assert sweep_results._number_of([], "m") == sweep_results._number_of(seeds, "other") == ""


def test_a_task_of_which_nothing_is_known_afterwards_has_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "start", lambda *args, **flags: None)
    with pytest.raises(ConfigError, match="the task 'train' leaves no summary.json"):
        start(write(tmp_path), tmp_path / "sweep", "1")


def test_a_generator_may_ask_twice(task, tmp_path, capsys):
    body = "def get_sweep():\n    for rate in (1e-3, 3e-3, 1e-3):\n        yield {'optim.lr': rate}"
    spec, ran = write(tmp_path, body), task()
    start(spec, tmp_path / "sweep")
    assert ran.ran == ["0.001/0", "0.003/0"]
    assert "2 of 2 trials have ended" in capsys.readouterr().out


def test_a_signal_stops_all(task, tmp_path):
    spec, folder = write(tmp_path), tmp_path / "sweep"
    ran = task(**{ALL[1]: Preempted("stopped by SIGTERM")})
    with pytest.raises(Preempted):
        start(spec, folder)
    assert ran.ran == ALL[:2] and len(records(folder)) == 1


def test_a_trial_that_runs_elsewhere_is_passed_by(task, tmp_path, capsys):
    spec, folder, ran = write(tmp_path), tmp_path / "sweep", task()
    third = walk(spec)[2]
    with lock.locked(folder / "locks", print, f"{third.name}.json"):
        start(spec, folder)
    assert ran.ran == [ALL[0], ALL[1], ALL[3]]
    assert "trial 3 is being run already" in capsys.readouterr().out


def test_commands_at_once_share_the_trials(monkeypatch, tmp_path):
    spec, folder, both = write(tmp_path), tmp_path / "sweep", threading.Barrier(2, timeout=20)
    made, work = Task(), Task.__call__

    def slowly(*args, **flags):
        both.wait()  # each of two has one
        work(made, *args, **flags)

    monkeypatch.setattr(dispatch, "start", slowly)
    threads = [threading.Thread(target=start, args=(spec, folder)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made.ran) == ALL and len(records(folder)) == 4


@pytest.mark.parametrize("which", ["0", "9", "-1", "some", ""])
def test_there_has_to_be_such_a_trial(which, task, tmp_path):
    task()
    with pytest.raises(ConfigError, match=f"--sweep={which}: "):
        start(write(tmp_path), tmp_path / "sweep", which)


ADAPTIVE = """
def get_sweep():
    rate, losses = 1e-3, []
    for _ in range(3):
        record = yield {"optim.lr": rate}
        losses.append(record["results"][0]["metrics"]["validation/loss"])
        rate = round(min(losses) / 2, 6)
"""


def test_a_generator_learns_from_the_trials_and_goes_on_where_it_was(task, tmp_path):
    spec, folder = write(tmp_path, ADAPTIVE), tmp_path / "sweep"
    ran = task(**{"0.0005/0": Preempted("stopped")})
    with pytest.raises(Preempted):
        start(spec, folder)
    assert [trial.settings for trial in walk(spec, folder=folder)] == [
        {"optim.lr": 1e-3},
        {"optim.lr": 5e-4},
    ]
    ran = task()
    start(spec, folder)
    assert ran.ran == ["0.0005/0", "0.00025/0"]


@pytest.mark.slow
def test_a_trial_of_a_real_sweep_is_the_run_alone(tmp_path):
    spec = write(tmp_path)
    words = ["--config.total=3", "--config.eval_every=0", "--config.save_every=0"]
    start(spec, tmp_path / "sweep", "4", *words)
    trial = walk(spec, *words)[3]
    dispatch.start(trial.config, tmp_path / "alone", file=spec)
    summary = json.loads((tmp_path / "alone/summary.json").read_text())
    (result,) = trials.read(tmp_path / "sweep", trial)["results"]
    for name, value in summary["metrics"].items():
        if name.startswith(("train", "validation")):
            assert result["metrics"][name] == value
    assert result["trainable_parameters"] == summary["trainable_parameters"]
    # Its page says how to go on with it alone.
    where = tmp_path / "sweep" / trial.name
    own = json.loads((where / "summary.json").read_text())["command"]
    assert own.endswith(f"--config.seed=1 --workdir={where}") and "--sweep" not in own


def test_listing_on_the_command_line_needs_no_jax(tmp_path):
    spec = write(tmp_path)
    code = (
        "import sys; from fmjax.__main__ import main\n"
        "main(sys.argv[1:])\n"
        "assert 'jax' not in sys.modules"
    )
    words = [f"--config={spec}", "--sweep=list", f"--workdir={tmp_path}/sweep"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "optim.lr" in done.stdout and "0 of 4 trials have ended" in done.stdout


def test_the_number_that_is_shown_is_the_one_that_the_runs_choose_by():
    def record(best, *names):
        return {"config": {"best": best}, "results": [{"metrics": dict.fromkeys(names, 0.5)}]}

    loss, accuracy = "validation/loss", "validation/classify/accuracy"
    assert sweep_results.main_metric([record(loss, accuracy, loss)]) == loss
    assert (
        sweep_results.main_metric([record("", accuracy, loss), record(accuracy, accuracy)])
        == accuracy
    )
    assert sweep_results.main_metric([record(None, loss, "train/accuracy", accuracy)]) == accuracy
    assert (
        sweep_results.main_metric([record(loss, "train/loss")])
        == sweep_results.main_metric([])
        == ""
    )


def test_secrets_are_in_no_record(task, tmp_path):
    body = GRID + "\nplain = get_config\ndef get_config():\n    config = plain()\n"
    body += "    config.hub_token = ''\n    return config\n"
    task()
    start(write(tmp_path, body), tmp_path / "sweep", "1", "--config.hub_token=abc123")
    (file,) = (tmp_path / "sweep").glob("*-*.json")
    assert "hub_token" in file.read_text() and "abc123" not in file.read_text()


def test_a_failure_without_a_code_of_its_own_keeps_its_words(task, tmp_path):
    task(**dict.fromkeys(ALL, ValueError("odd")))
    with pytest.raises(FmjaxError, match="4 of 4 trials failed; trial 1: ValueError: odd"):
        start(write(tmp_path), tmp_path / "sweep")


def test_results_of_a_group_may_differ_in_more_than_the_seed(task, tmp_path, capsys):
    task()
    body = """
def get_sweep():
    return [
        {"group": name, "optim.lr": rate, "seed": seed}
        for name, rate in (("slow", 1e-3), ("fast", 2.0)) for seed in (0, 1)
    ] + [{"group": "odd", "optim.lr": 3.0, "seed": 0}, {"group": "odd", "optim.lr": 4.0, "seed": 1}]
"""
    start(write(tmp_path, body), tmp_path / "sweep")
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if line.startswith("odd "))
    assert row.split()[1:3] == ["2", "4.0000"]  # of 3 + 0 and 4 + 1


def test_trials_are_compared_in_what_they_choose_their_best_by(task, tmp_path, capsys):
    """A sweep of two stages, the second from what the first leaves."""
    task()
    body = """
def get_sweep():
    for seed in (0, 1):
        record = yield {"group": "first", "seed": seed}
        assert record["folder"].endswith(record["command"].rpartition("/")[2])
        yield {"group": "second", "seed": seed, "optim.lr": 2.0, "best": "validation/mlm/loss"}
        yield {"group": "third", "seed": seed, "optim.lr": 3.0, "best": "validation/mlm/loss"}
"""
    add = {"validation/mlm/loss": 7.0}
    kept = sweep_results.found
    more = lambda *args: [one | {"metrics": one["metrics"] | add} for one in kept(*args)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_results, "found", more)
        start(write(tmp_path, body), tmp_path / "sweep")
    files = (tmp_path / "sweep").glob("train-*.json")
    told = [(path.stem, json.loads(path.read_text())) for path in files]
    told.sort(key=lambda pair: pair[1]["number"])
    (_, first), (metric, second) = sweep_results.families(told, tmp_path / "sweep")
    assert [group.name for group in first] == ["first"] and metric == "validation/mlm/loss"
    assert {group.name for group in second} == {"second", "third"}
    text = (tmp_path / "sweep/report.html").read_text()
    assert "Results in mlm/loss" in text and "Results in loss" in text


def test_a_group_with_a_seed_twice_is_refused_before_any_trial(tmp_path):
    body = "def get_sweep(): return [{'group': 'a', 'optim.lr': x} for x in (1e-3, 1e-4)]"
    with pytest.raises(
        ConfigError, match="trials 1 and 2 have the same group 'a' and the same seed 0"
    ):
        walk(write(tmp_path, body))


def test_a_group_that_lost_a_run_in_one_stage_is_not_judged_in_the_next(task, tmp_path, capsys):
    task(**{"0.003/1": NumericsError("not finite")})
    body = """
def get_sweep():
    for seed in (0, 1):
        yield {"group": "a", "seed": seed}
    for name, seeds in (("b", (0, 1)), ("a", (0,)), ("c", (0, 1))):
        for seed in seeds:
            best = {"best": "validation/mlm/loss", "optim.lr": 2.0 + (name == "c")}
            yield {"group": name, "seed": seed, **best, "data.seq_len": 32 + 8 * (name == "a")}
"""
    kept = sweep_results.found
    more = lambda *args: [
        one | {"metrics": one["metrics"] | {"validation/mlm/loss": 7.0 + one["seed"]}}
        for one in kept(*args)
    ]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NumericsError):
        patch.setattr(sweep_results, "found", more)
        start(write(tmp_path, body), tmp_path / "sweep")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("a ")]
    assert len(rows) == 1 and "1, 1 failed" in rows[0] and "inconclusive" not in rows[0]


def test_a_ledger_that_is_asked_for_later_is_made_up_for(task, tmp_path):
    made, spec = task(), write(tmp_path)
    start(spec, tmp_path / "sweep", "1")
    start(spec, tmp_path / "sweep", "1")
    assert len(made.ran) == 1
    start(spec, tmp_path / "sweep", "1", "--config.ledger=('memory',)")
    assert len(made.ran) == 2
