"""Damaged records of trials, and of what belongs to them: said, and written again."""

import json

import pytest
import runs
from test_sweep import ALL, records, start, task, walk, write  # noqa: F401  (task is a fixture)

from fmjax.errors import CheckpointError
from fmjax.experiments import evidence, sweep_results, trial_records
from fmjax.io import sealed, summary, workdir

pytest_plugins = ["runs"]
DAMAGE = [b"[]", lambda text: text[:100], lambda text: text.replace(b"1.0", b"1.4")]


def damaged(text, damage):
    return damage(text) if callable(damage) else damage


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_as_good_as_none(task, tmp_path, capsys, damage):  # noqa: F811
    spec, folder, ran = write(tmp_path), tmp_path / "sweep", task()
    start(spec, folder)
    before = {record["number"]: record["results"] for record in records(folder)}
    file = folder / f"{walk(spec)[1].name}.json"
    file.write_bytes(damaged(file.read_bytes(), damage))
    start(spec, folder, "list")
    told = capsys.readouterr()
    assert "3 of 4 trials have ended" in told.out
    assert f"warning: {file} is damaged" in told.err
    sweep_results.report(folder)
    start(spec, folder)
    assert ran.ran == [*ALL, ALL[1]]
    assert {record["number"]: record["results"] for record in records(folder)} == before


@pytest.mark.parametrize("damage", [b"{}", lambda text: text.replace(b"trials", b"trjals")])
def test_a_damaged_list_of_trials_is_an_error_with_a_remedy(task, tmp_path, damage):  # noqa: F811
    spec, folder, _ = write(tmp_path), tmp_path / "sweep", task()
    start(spec, folder)
    file = folder / sweep_results.SWEEP
    file.write_bytes(damaged(file.read_bytes(), damage))
    with pytest.raises(CheckpointError, match="sweep.json is damaged.*--sweep writes it again"):
        sweep_results.report(folder)
    start(spec, folder)
    sweep_results.report(folder)


def test_no_flipped_bit_passes(tmp_path):
    file, content = tmp_path / "a.json", {"x": [1.5, float("nan")], "y": {"z": "text"}}
    sealed.write(file, content)
    assert sealed.read(file) == {"x": [1.5, "NaN"], "y": {"z": "text"}}
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with pytest.raises(ValueError):
            sealed.read(file)


def test_the_name_of_the_digest_is_no_key_of_others():
    """It would be replaced, and the object count as damaged for ever."""
    with pytest.raises(ValueError, match="'digest'"):
        sealed.dumps({"digest": "of the tokens"})


@pytest.mark.parametrize("text", [b"", b"null", b"{}", b"[" * 100_000, b"\xff", b'{"state": '])
def test_what_is_no_record_is_none(tmp_path, capsys, text):
    assert trial_records.read(tmp_path / "a.json") is None and capsys.readouterr().err == ""
    (tmp_path / "a.json").write_bytes(text)
    assert trial_records.read(tmp_path / "a.json") is None
    assert f"warning: {tmp_path}/a.json is damaged" in capsys.readouterr().err


RESULT = {"seed": 0, "arm": {}, "folder": "", "failed": "", "metrics": {"a": "NaN", "b": 1}}
WRONG = [{"metrics": {"a": []}}, {"metrics": {"a": "x"}}, {"metrics": 3}, {"arm": 1}, {"folder": 0}]


@pytest.mark.parametrize("wrong", WRONG)
def test_results_of_other_kinds_are_none(tmp_path, wrong, capsys):
    text = dict.fromkeys(("state", "reason", "command"), "")
    record = text | {"exit_code": 0, "seconds": 1.0, "results": [RESULT], "config": {}}
    file = tmp_path / "a.json"
    sealed.write(file, record)
    assert trial_records.read(file) == record
    sealed.write(file, record | {"results": [RESULT | wrong]})
    assert trial_records.read(file) is None
    assert "is damaged (no results)" in capsys.readouterr().err


def test_a_damaged_row_of_evidence_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    (tmp_path / "a.json").write_text('{"digests": ')
    with pytest.raises(CheckpointError, match="a.json is damaged: --verify"):
        evidence.render("<!-- evidence a validation/loss .2f -->1<!-- -->")


@pytest.mark.slow
def test_a_finished_run_writes_its_summary_again(home, tmp_path, monkeypatch):
    """And its arms, of which one has failed, theirs."""
    flags = ["--config.total=2 steps", "--config.arms=(('seed', (0, 1)),)"]
    runs.run_here(home, tmp_path, *flags, monkeypatch=monkeypatch)
    of_all = json.loads((tmp_path / "summary.json").read_text())["arms"]
    for damage in (b"", b"[]", b'{"metrics": {"a": []}}', b'{"metrics": {}, "goodput": {}}'):
        file = tmp_path / "arms" / "1" / "summary.json"
        file.write_bytes(damage)
        (tmp_path / "arms" / "0" / workdir.LEDGER).write_bytes(damage)
        runs.run_here(home, tmp_path, *flags, monkeypatch=monkeypatch)
        assert not summary.is_damaged(file.parent)
        again = json.loads((tmp_path / "summary.json").read_text())["arms"]
        for ours, theirs in zip(again, of_all, strict=True):
            metrics = ("validation/loss", "train/loss")
            assert [ours["metrics"][m] for m in metrics] == [theirs["metrics"][m] for m in metrics]
