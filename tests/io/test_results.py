"""Results that cannot be written: said before the work, in one line, and whole or not there."""

import errno
import importlib
import json
import os
import stat
import threading

import numpy as np
import pytest
from common import ROOT
from safetensors.numpy import save_file

from fmjax import __main__ as program
from fmjax import startup
from fmjax.config import load as configs
from fmjax.data import endings
from fmjax.errors import CheckpointError, ConfigError
from fmjax.evaluation.results_log import ResultsLog
from fmjax.experiments import evidence
from fmjax.io import atomic, results, storage

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full(*args, **kwargs):
    raise FULL


def load(name, *words):
    return configs.load(f"{ROOT}/configs/{name}.py", list(words))


@pytest.fixture
def file(tmp_path):
    """A path under a regular file, which nobody can write, not even root."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "under"


# ---- Places that are checked ---------------------------------------------------------------


@pytest.mark.parametrize("check", [results.check_file, results.check_growing, results.check_folder])
def test_what_cannot_be_written_is_refused_with_the_key(check, file, tmp_path):
    message = "file/under.* cannot be written .Not a directory.: .* or use another config.here"
    for path in (file, file / "deeper" / "still"):
        with pytest.raises(CheckpointError, match=message):
            check(path, "config.here")
    with pytest.raises(CheckpointError, match="cannot be written .File name too long"):
        check(tmp_path / ("x" * 300), "config.here")
    with pytest.raises(CheckpointError, match="/proc/.* cannot be written"):
        check("/proc/none/out", "config.here")
    with pytest.raises(ConfigError, match="config.here: .* is no name of a file"):
        check("a\0b", "config.here")


@pytest.mark.parametrize("check", [results.check_file, results.check_growing, results.check_folder])
def test_a_full_disk_is_noticed_and_a_check_leaves_nothing(check, tmp_path, monkeypatch):
    check(tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(results.tempfile, "TemporaryFile", full)
    with pytest.raises(CheckpointError, match="out cannot be written .No space left on device"):
        check(tmp_path / "out")


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path):
    (tmp_path / "file").write_text("")
    for check in (results.check_file, results.check_growing):
        with pytest.raises(CheckpointError, match="Is a directory"):
            check(tmp_path)
    with pytest.raises(CheckpointError, match="Not a directory"):
        results.check_folder(tmp_path / "file")
    with pytest.raises(ConfigError, match="is not empty: set config.output to a new folder"):
        results.check_folder(tmp_path)


@pytest.mark.parametrize(
    "task, name, key",
    [
        ("embed", "", "config.output"),
        ("predict", "", "config.output"),
        ("export", "", "config.output"),
        ("llama2c", "", "config.output"),
        ("evaluate", "evaluation.jsonl", "--workdir"),
        ("translate", "translate.jsonl", "--workdir"),
        ("fewshot", "fewshot.jsonl", "--workdir"),
        ("probe", "summary.json", "--workdir"),
    ],
)
def test_a_task_refuses_before_it_opens_its_model(task, name, key, file, tmp_path):
    """Else it would say that there is no such model."""
    output, workdir = (file, tmp_path) if key == "config.output" else ("", file)
    words = [f"--config.folder={tmp_path}/no-model"]
    if task == "llama2c":
        (tmp_path / "bad.bin").write_bytes(b"")
        words = [f"--config.{key}={tmp_path}/bad.bin" for key in ("file", "vocabulary")]
    words += [f"--config.output={output}"] if output else []
    run = importlib.import_module(f"fmjax.tasks.{task}").run
    with pytest.raises(CheckpointError) as caught:
        run(load(task, *words), workdir)
    assert str(file / name) in str(caught.value) and key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_folder_that_cannot_be_written_is_said_before(tmp_path):
    (tmp_path / "status.json").write_text("{}")  # a run's
    (tmp_path / "evaluation.jsonl").mkdir()
    with pytest.raises(CheckpointError, match="evaluation.jsonl cannot .* another config.folder"):
        ResultsLog(str(tmp_path), tmp_path, "evaluation.jsonl")


def test_a_replay_that_cannot_be_kept_is_refused_before_data_are_read(tmp_path):
    words = [f"--config.data.train={tmp_path}/no-such-file"]
    (tmp_path / "config.json").write_text(configs.to_json(load("mlm", *words)))
    (tmp_path / "dumps").write_text("")
    task = importlib.import_module("fmjax.tasks.replay")
    with pytest.raises(CheckpointError, match="replay_1.json cannot .* another config.folder"):
        task.run(load("replay", f"--config.folder={tmp_path}", "--config.step=1"), tmp_path)


@pytest.mark.parametrize("mark", ["config.json", "sweep.json"])
def test_a_page_that_cannot_be_written_is_said_before(mark, tmp_path):
    (tmp_path / mark).write_text("not read yet")
    (tmp_path / "report.html").mkdir()
    task = importlib.import_module("fmjax.tasks.report")
    with pytest.raises(CheckpointError, match="report.html cannot .* another config.folder"):
        task.run(load("report", f"--config.folder={tmp_path}"), tmp_path)


def test_evidence_that_cannot_be_written_is_said_before_the_trials(tmp_path):
    config = tmp_path / "mine.py"
    expected = dict(metric="m", value=1.0, tolerance=0.1, seeds=(0,), budget=1.0, source="none")
    config.write_text(f"def get_expected():\n    return [{expected}]\n")
    (tmp_path / "evidence").write_text("")
    with pytest.raises(CheckpointError, match="evidence/mine.json cannot .* another --config"):
        evidence.verify(str(config), [], tmp_path / "runs")


# ---- What fails while it is written --------------------------------------------------------


def test_lines_replace_those_of_before_as_a_whole(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    results.write_lines(path, [{"a": "é"}, {"a": float("nan")}])
    before = path.read_bytes()
    assert before == '{"a": "é"}\n{"a": "NaN"}\n'.encode()

    def rows():
        yield {"a": 1}
        assert path.read_bytes() == before
        raise FULL

    with pytest.raises(CheckpointError, match="out.jsonl cannot .*No space.* config.output"):
        results.write_lines(path, rows(), "config.output")
    assert path.read_bytes() == before and os.listdir(path.parent) == ["out.jsonl"]


def test_arrays_that_fail_leave_no_part(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="examples.npz cannot be written .No space"):
        atomic.write_arrays(tmp_path / "examples.npz", {"a": np.zeros(3)})
    assert not list(tmp_path.iterdir())


def test_an_interrupted_file_is_the_one_of_before(tmp_path):
    path = tmp_path / "out"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), results.replacing(path) as made:
        made.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["out"]


def test_an_error_about_another_file_stays_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), results.replacing(tmp_path / "a" / "out"):
        open(tmp_path / "input")


def test_a_link_leads_to_the_file_that_is_replaced(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "link").symlink_to("to/file")
    results.write_lines(tmp_path / "link", [{}])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "to" / "file").read_text() == "{}\n"


def test_a_device_is_written_and_never_replaced(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    results.check_file(pipe)
    results.write_lines(pipe, [{"a": 1}])
    reader.join(10)
    assert read == ['{"a": 1}\n'] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_that_is_gone_is_one_error(tmp_path):
    folder = tmp_path / "gone"
    with pytest.raises(CheckpointError, match="gone/out cannot be written .No such file"):
        with results.replacing(folder / "out") as made:
            made.write_text("")
            made.unlink()
            folder.rmdir()


def test_a_line_is_added_whole_or_not(tmp_path, monkeypatch):
    path = tmp_path / "new" / "log.jsonl"
    results.append(path, {"a": 1})

    def half(file, data):
        file.write(data[:3])
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(results, "_write_all", half)
        with pytest.raises(CheckpointError, match="log.jsonl cannot be written .No space"):
            results.append(path, {"b": 2})
    results.append(path, {"c": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"c": 3}]


def test_a_folder_gets_its_files_when_all_are_there(tmp_path):
    path = tmp_path / "out"
    (path / results.TEMPORARY).mkdir(parents=True)  # of a process that was killed
    (path / results.TEMPORARY / "part").write_text("")
    with results.new_folder(path, "config.json") as made:
        (made / "config.json").write_text("{}")
        (made / "inner").mkdir()
        (made / "inner" / "x").write_text("1")
        assert os.listdir(path) == [results.TEMPORARY]
    assert sorted(os.listdir(path)) == ["config.json", "inner"]
    assert (path / "inner" / "x").read_text() == "1"


def test_the_file_that_opens_a_folder_comes_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (moved.append(os.path.basename(b)), replace(a, b))
    )
    with results.new_folder(tmp_path, "config.json") as made:
        for name in ("a", "config.json", "z"):
            (made / name).write_text("")
    assert set(moved) == {"a", "z", "config.json"} and moved[-1] == "config.json"


@pytest.mark.parametrize("existed", [True, False])
def test_a_folder_that_fails_midway_is_as_before(existed, tmp_path):
    path = tmp_path / "parent" / "out"
    if existed:
        path.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="parent/out cannot .*No space.* config.output"):
        with results.new_folder(path, "config.json") as made:
            (made / "config.json").write_text("{}")
            endings.write(made, [1])
            raise FULL
    assert path.exists() == existed and not list(tmp_path.glob("parent/out/*"))


def test_errors_of_libraries_in_rust_are_errors_of_the_file_system(file):
    with pytest.raises(NotADirectoryError), storage.rust_errors():
        save_file({"a": np.zeros(2)}, file)
    with pytest.raises(ValueError, match="other"), storage.rust_errors():
        raise ValueError("other")


def test_no_room_for_temporary_files_names_their_variable(monkeypatch):
    monkeypatch.setattr(results.tempfile, "TemporaryDirectory", full)
    with pytest.raises(CheckpointError, match=r"No space.* use another \$TMPDIR"):
        with results.temporary_folder():
            pass


# ---- The program ---------------------------------------------------------------------------


def test_the_program_ends_with_one_line_and_the_code_of_storage(file, tmp_path, capsys):
    words = [f"--config={ROOT}/configs/predict.py", f"--config.folder={tmp_path}/none"]
    words += [f"--config.output={file}", f"--workdir={tmp_path}/work"]
    assert startup.exit_code(program.main, words) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {file} cannot be written (Not a directory): free space, change its permissions, "
        "or use another config.output"
    )
