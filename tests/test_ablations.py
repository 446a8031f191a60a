"""The shipped ablations: their trials, and some of them run on a small encoder."""

import pytest
from common import ROOT
from test_finetune import encoder, files, home  # noqa: F401

from fmjax import config as configs
from fmjax import trials

DEPTH = f"{ROOT}/configs/ablations/depth.py"


def test_the_trials_of_depth(tmp_path):
    words = ["--config.init=some/base", "--config.data.train=some.tsv"]
    found = list(trials.walk(f"{DEPTH}:depth=6,steps=7", words, tmp_path))
    methods = [trial.settings["arg"].partition(",")[0] for trial in found]
    last = [f"last{layers}" for layers in (5, 4, 3, 2, 1)]
    probes = ["words", "features"]
    assert methods == ["full", *last, "head", *probes, "lora", "houlsby", "bitfit", "prompt"]
    for method, trial in zip(methods, found, strict=True):
        config = trial.config
        assert config.init == "some/base" and config.data.train == "some.tsv"
        assert config.data.seq_len == 128
        if method in probes:
            assert config.task == "probe" and config.folder == config.init
            continue
        assert config.task == "train" and config.total == 7 and config.batch_size == 32
        assert config.arms == (("seed", (0, 1, 2)),)
        assert configs.load(f"{DEPTH}:{method},depth=6,steps=7", words) == config
    assert "block_(-1|-2|-3)" in dict(zip(methods, found, strict=True))["last3"].config.groups[0][0]


def test_trials_of_depth_run_and_are_compared(home, encoder, tmp_path, capsys):  # noqa: F811
    words = [*files(home), f"--config.init={encoder}", "--config.data.seq_len=12"]
    spec = f"{DEPTH}:tiny,steps=3,seeds=2"
    for number in ("1", "4"):
        trials.start(spec, words, number, tmp_path)
    told = {t.number: trials.read(tmp_path, t) for t in trials.walk(spec, words, tmp_path)}
    assert {number for number, record in told.items() if record} == {1, 4}
    assert [result["arm"] for result in told[1]["results"]] == [{"seed": 0}, {"seed": 1}]
    assert [result["seed"] for result in told[4]["results"]] == [None]
    lines = capsys.readouterr().out.splitlines()
    start = max(i for i, line in enumerate(lines) if "less full" in line)
    shown = [line.split()[:2] for line in lines[start + 1 : start + 3]]
    assert shown == [["full", "2"], ["words", "1"]]
    assert "2 of 9 trials have ended" in lines[-2]


@pytest.mark.slow
def test_all_trials_of_depth_run(home, encoder, tmp_path):  # noqa: F811
    words = [*files(home), f"--config.init={encoder}", "--config.data.seq_len=12"]
    trials.start(f"{DEPTH}:tiny,steps=2,seeds=2", words, "all", tmp_path)
    assert len(list(tmp_path.glob("*-*.json"))) == 9
