"""What fmjax writes and reads of its own: data only, without secrets, in its own folders.

Beside these: a saved config is JSON and nothing else (test_config.py), a config.py in a run folder
is not looked at (test_tasks.py), every text of a report is escaped (test_report.py), what others
made (test_security_downloads.py), what may not be written at all (test_lint.py).
"""

import contextlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import saved_states
from common import CACHE, ROOT
from test_report import Page

from fmjax import __main__ as command
from fmjax.checkpoints import checkpointer, pretrained
from fmjax.config import load as configs
from fmjax.errors import CheckpointError, ConfigError, DataError
from fmjax.io import disk_cache, manifest, metrics_log, retention, sealed
from fmjax.params import sharding
from fmjax.reports import run_report

SECRET = "hunter2-0123456789abcdef"
CONFIG = f"""
from configs import mlm

def get_config():
    config = mlm.get_config("tiny")
    config.data.update(name="text", train="text.txt", max_documents=0)
    config.model.update(variant="tiny", max_len=32)
    config.total, config.log_every, config.eval_every = "2 steps", 1, 2
    config.tokenizer.vocab_size = 64
    config.hub = dict(hf_token="", apikeys=("{SECRET}", "b"), user="somebody")
    config.proxy = dict(credentials=dict(name="{SECRET}"), passwd="{SECRET}", port=80)
    config.wandb = True
    return config
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A whole run whose config and command line hold secrets, and what W&B was told."""
    home = tmp_path_factory.mktemp("secrets")
    (home / "mine.py").write_text(CONFIG)
    (home / "text.txt").write_text("\n\n".join("abcd efgh " * 9 for _ in range(40)))
    told = []
    note = lambda *args, **kwargs: told.append((args, kwargs))
    wandb = SimpleNamespace(init=note, define_metric=note, log=note, finish=note)
    words = ["--config=mine.py", "--workdir=out", f"--config.hub.hf_token={SECRET}"]
    words += ["--config.proxy.passwd", SECRET, "--config.seed=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("FMJAX_CACHE", str(CACHE))
        patch.setitem(sys.modules, "wandb", wandb)
        patch.setattr(sys, "argv", ["run.py", *words])
        command.main(words)
    return home / "out", told


# ---- configs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['touch x']", "__import__('os').system('touch x')",
     "{{ 7 * 7 }}", "${HOME}", "$(touch x)", "`touch x`", "cos\nsystem\n(S'touch x'\ntR.", "%s{0}"],
)  # fmt: skip
def test_text_in_a_saved_config_stays_text(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configs.load(str(ROOT / "configs" / "mlm.py"), [f"--config.data.subset={text}"])
    Path("config.json").write_text(configs.to_json(config))
    again = configs.load("config.json", ["--config.data.columns=" + text])
    assert again.data.subset == again.data.columns == text
    assert os.listdir() == ["config.json"]


@pytest.mark.parametrize(
    "name", ["__reduce__", "__class__", "__setstate__", "py/object", "a.b", ""]
)
def test_names_in_a_saved_config_are_names(name, tmp_path):
    for content in ({name: ["os.system", "touch x"]}, {"data": {name: {}}}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match="is no name"):
            configs.load(str(tmp_path / "config.json"))


@pytest.mark.parametrize("task", ["os", "..train", "data.hub", "config", "__init__", "train\n"])
def test_a_saved_config_cannot_choose_what_is_imported(task):
    with pytest.raises(ConfigError, match="--config.task: got .*Possible: .*evaluate"):
        configs.rules.check({"task": task})
    for section in ("model", "objectives"):
        wrong = {"model": {"name": task}} if section == "model" else {"objectives": {task: {}}}
        with pytest.raises(ConfigError, match=section):
            configs.rules.check(wrong)


# ---- secrets -------------------------------------------------------------------------------


def test_no_file_of_a_run_holds_a_secret(ran):
    folder, told = ran
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.json", "report.html", "metrics.jsonl", "summary.json", "metadata"} <= {
        path.name for path in files
    }
    assert any(path.parent.name == "tensorboard" for path in files)
    assert [str(path) for path in files if SECRET.encode() in path.read_bytes()] == []
    assert told and SECRET not in repr(told)


def test_what_is_no_secret_is_kept(ran):
    folder, told = ran
    saved = json.loads((folder / "config.json").read_text())
    assert saved["hub"] == {"hf_token": "***", "apikeys": ["***", "***"], "user": "somebody"}
    assert saved["proxy"] == {"credentials": {"name": "***"}, "passwd": "***", "port": 80}
    assert saved["tokenizer"]["name"] == "train" and saved["tokenizer"]["vocab_size"] == 64
    shown = next(kwargs["config"] for _, kwargs in told if "config" in kwargs)
    assert shown["hub"]["user"] == "somebody" and shown["hub"]["hf_token"] == "***"


def test_the_saved_command_can_be_typed_but_for_its_secrets(ran):
    started = metrics_log.read(ran[0])[1][0]["command"]
    assert started == (
        "python run.py --config=mine.py --workdir=out '--config.hub.hf_token=***' "
        "--config.proxy.passwd '***' --config.seed=3"
    )
    whole = metrics_log.command(["run.py", "--config.hub={'api_key': 'x', 'user': 'y'}", "--fresh"])
    assert whole == "python run.py '--config.hub=***'"


# ---- the report ----------------------------------------------------------------------------


def test_a_report_runs_and_fetches_nothing(tmp_path):
    nasty = "<img src=x onerror=alert(1)>\"'><script>alert(1)</script>"
    folder = tmp_path / "<script>alert(2)<"
    folder.mkdir()
    data = {"train": nasty, "path": "https://x.y/z.js"}
    config = {"data": data, nasty: 1, "objectives": {nasty: {}}}
    (folder / "config.json").write_text(json.dumps(config))
    start = {"event": "start", "time": 1, "step": 0, "command": f"python run.py {nasty}"}
    row = {"step": 1, "time": 2, f"train/{nasty}": 1.5, f"{nasty}/loss": 2.0}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(row)}\n")
    status = {"state": f"done'\" onclick=alert(3) {nasty}", "reason": nasty}
    (folder / "status.json").write_text(json.dumps(status))
    difference = [["data.train", nasty, 1]]
    run_report.summarize(folder, environment={nasty: nasty}, config_difference=difference)
    text = run_report.write(folder).read_text(encoding="utf-8")
    assert "default-src 'none'" in text.partition("<title>")[0]
    assert text.count("alert(1)") > 5  # shown, as text
    found = Page(text)
    assert not {"script", "img", "link", "a", "iframe"} & set(found.tags)
    assert not [name for name, _ in found.attributes if re.match("on|src|href", name)]


def test_a_report_of_names_that_are_no_utf8(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data": {"train": "\udcff.txt"}}))
    assert "\\udcff.txt" in run_report.write(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["config.json", "summary.json", "status.json"])
@pytest.mark.parametrize("content", ["{", "[]", "[" * 10**5, "\xff"])
def test_a_damaged_run_folder_is_an_error_that_names_the_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("latin1"))
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        run_report.write(tmp_path)


# ---- checkpoints ---------------------------------------------------------------------------


@pytest.fixture
def saver(tmp_path):
    with contextlib.closing(checkpointer.Checkpointer(tmp_path)) as saver:
        saved_states.save(saver, 1, 2)
        yield saver


def reseal(folder: Path, **changes) -> None:
    """A manifest with other content and a right digest, as anybody can make."""
    body = sealed.loads((folder / manifest.NAME).read_bytes())
    (folder / manifest.NAME).write_bytes(sealed.dumps(body | changes))


@pytest.mark.parametrize("name", ["../../private", "/dev/zero", "state/../../../private", ".."])
def test_a_manifest_cannot_make_verification_read_elsewhere(saver, tmp_path, name, monkeypatch):
    (tmp_path / "private").write_text("secret")
    read = []
    digest = manifest._digest
    monkeypatch.setattr(manifest, "_digest", lambda path: read.append(path) or digest(path))
    folder = saved_states.step_folder(tmp_path, 2)
    reseal(folder, files={name: [6, "00"]})
    assert manifest.problems(folder) == [
        f"MANIFEST.json: names files outside of its folder: [{name!r}]"
    ]
    assert read == []
    state, meta = saver.restore(saved_states.abstract(saved_states.make_state()))
    assert meta["step"] == 1
    assert (tmp_path / "private").read_text() == "secret"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2.corrupt"]


@pytest.mark.parametrize(
    "changes",
    [{"files": []}, {"files": 3}, {"files": {"a": 3}}, {"files": {"a": [1, 2, 3]}}, {"format": "x"},
     {"format": None}, {"files": {"meta": [4096, "00"]}}, {"files": {"pipe": [0, "00"]}}],
)  # fmt: skip
def test_a_manifest_that_nobody_wrote_is_damage(saver, tmp_path, changes):
    folder = saved_states.step_folder(tmp_path, 2)
    os.mkfifo(folder / "pipe")  # reading it would wait for ever
    reseal(folder, **changes)
    assert len(manifest.problems(folder)) == 1
    assert saver.restore(saved_states.abstract(saved_states.make_state()))[1]["step"] == 1


@pytest.mark.parametrize(
    "content",
    ["", "[]", "[" * 10**5, '{"format": 1}',
     '{"format": "x", "step": 2, "metrics": {}, "arrays": {}}',
     '{"format": 1, "step": "2", "metrics": {}, "arrays": {}}',
     '{"format": 1, "step": 2, "metrics": {}, "arrays": []}', "\xff"],
)  # fmt: skip
def test_meta_that_nobody_wrote_is_refused(saver, tmp_path, content):
    folder = saved_states.step_folder(tmp_path, 2)
    (folder / "meta" / "metadata").write_bytes(content.encode("latin1"))
    (folder / manifest.NAME).unlink()
    manifest.write(folder)
    for read in (lambda: checkpointer.load_params(tmp_path), lambda: retention.read_meta(folder)):
        with pytest.raises(CheckpointError, match="meta"):
            read()


def test_deleting_a_step_that_is_a_link_leaves_what_it_leads_to(saver, tmp_path):
    mine = tmp_path / "mine" / "checkpoints"
    mine.mkdir(parents=True)
    (mine / "7").symlink_to(saved_states.step_folder(tmp_path, 2))
    retention.make_room(mine, 7)
    assert os.listdir(mine) == []
    assert manifest.problems(saved_states.step_folder(tmp_path, 2)) == []


@pytest.mark.parametrize(
    "content, said",
    [
        ({}, "lacks"),
        ({"model": {"name": "os"}, "data": {"seq_len": 8}, "precision": "float32"}, "model.name"),
        ({"model": {"name": "bert", "width": 10**12}}, "model.width"),
        ({"model": 3}, "model: got 3, expected a dict"),
    ],
)
def test_a_run_folder_with_a_config_that_nobody_wrote(saver, tmp_path, content, said):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises((ConfigError, CheckpointError), match=said):
        pretrained.open_folder(str(tmp_path), sharding.make_mesh())


# ---- compiled programs ---------------------------------------------------------------------


def test_compiled_programs_are_kept_for_this_user_alone(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "xla"
    assert disk_cache.private(folder).stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert disk_cache.private(folder).stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(DataError, match="belongs to another user"):
        disk_cache.private(folder)


def test_a_run_compiles_into_that_folder(ran):
    assert (CACHE / "xla").stat().st_mode & 0o777 == 0o700
