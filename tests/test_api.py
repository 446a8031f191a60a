"""The public interface gives what the tasks of the command line give."""

import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig

import inject
import jax
import numpy as np
import pytest
from common import ROOT

import fmjax
from fmjax.config import load as config_files
from fmjax.errors import ConfigError
from fmjax.tasks import embed, predict

QUIET = {"tensorboard": False, "log_every": 5, "eval_every": 10, "save_every": 10}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def encoder(home):
    return fmjax.train(fmjax.configs.load("configs/mlm.py:tiny", QUIET), home / "mlm")


@pytest.fixture(scope="module")
def classifier(home, encoder):
    words = ("good", "bad") * 16
    rows = [{"text": f"{word} module {i}", "label": word} for i, word in enumerate(words)]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = QUIET | {"init": str(encoder.folder), "data.train": str(home / "rows.jsonl")}
    changes |= {"data.name": "text", "batch_size": 8, "data.seq_len": 16, "total": 10}
    return fmjax.train(fmjax.configs.load("configs/finetune.py", changes), home / "classifier")


@pytest.fixture(scope="module")
def decoder(home):
    return fmjax.train(fmjax.configs.load("configs/clm.py:tiny", QUIET, ledger=()), home / "clm")


def task(name, **values):
    words = [f"--config.{key}={value}" for key, value in values.items()]
    return config_files.load(f"{ROOT}/configs/{name}.py", words)


def test_a_run_has_its_numbers_and_its_model(encoder):
    assert encoder.state == "done" and encoder.step == 20
    loss = encoder.metrics["validation/loss"]
    assert loss.steps.tolist() == [10, 20] and loss.values[-1] < loss.values[0]
    model = encoder.load()
    assert model.objectives == ("mlm",) and model.step == 20
    assert model.config.total == "20 steps" and jax.tree.leaves(model.params)
    assert repr(model) == f"fmjax.load('{encoder.folder} at step 20')"


def test_masks_are_filled_by_the_logits(encoder):
    model = encoder.load()
    ((guesses,),) = model.fill_mask(["the [MASK] of a function"], top_k=3)
    (logits,) = model.logits(["the [MASK] of a function"])
    ids = model.tokenizer("the [MASK] of a function")["input_ids"]
    assert logits.shape == (len(ids), model.model.cfg.vocab_size)
    at_mask = logits[ids.index(model.tokenizer.mask_token_id)]
    chances = np.exp(at_mask - at_mask.max()) / np.exp(at_mask - at_mask.max()).sum()
    found = [chance for _, chance in guesses]
    np.testing.assert_allclose(found, np.sort(chances)[::-1][:3], rtol=1e-4)


def test_vectors_are_those_of_the_task(home, encoder):
    texts = ["the first text", "and a second one"]
    (home / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    values = {"data.train": home / "texts.jsonl", "data.columns": "text"}
    embed.run(task("embed", folder=encoder.folder, **values), home)
    vectors = encoder.load().encode(texts)
    np.testing.assert_allclose(vectors, np.load(home / "embeddings.npy"), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_classes_are_those_of_the_task(home, classifier):
    texts = ["good module", "bad module"]
    (home / "new.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    values = {"data.train": home / "new.jsonl", "output": home / "labels.jsonl"}
    predict.run(task("predict", folder=classifier.folder, **values), home)
    lines = map(json.loads, (home / "labels.jsonl").read_text().splitlines())
    model = classifier.load()
    assert model.labels == ("bad", "good")
    for ours, theirs in zip(model.classify(texts), lines, strict=True):
        assert ours == pytest.approx(theirs["probabilities"], abs=1e-6)


def test_greedy_texts_are_the_most_probable_tokens(decoder):
    model = decoder.load()
    (text,) = model.generate(["The"], length=3, temperature=0)
    ids = model.tokenizer("The" + text, add_special_tokens=False)["input_ids"]
    (logits,) = model.logits(["The"])
    assert ids[logits.shape[0] - 1] == logits[-1].argmax()
    assert model.generate(["The", "A"], length=3, temperature=0)[0] == text
    assert model.generate(["The"], length=5, seed=1) == model.generate(["The"], length=5, seed=1)


def test_what_a_model_cannot_do_is_refused(encoder, decoder):
    with pytest.raises(ConfigError, match="an encoder, which fills gaps"):
        encoder.load().generate(["a"])
    with pytest.raises(ConfigError):
        decoder.load().fill_mask(["a [MASK]"])
    with pytest.raises(ConfigError, match="no text"):
        encoder.load().encode([])
    with pytest.raises(ConfigError, match="unknown key"):
        fmjax.configs.load("configs/mlm.py", {"optim.learning_rate": 1})


@pytest.mark.slow
def test_a_run_that_is_stopped_comes_back_and_goes_on(home, monkeypatch):
    config = fmjax.configs.load("configs/mlm.py:tiny", QUIET)
    inject.install("term@7", monkeypatch.setattr)
    run = fmjax.train(config, home / "stopped")
    assert run.state == "preempted" and 0 < run.step < 20
    monkeypatch.undo()
    assert fmjax.train(config, home / "stopped").state == "done"


def test_the_package_says_what_it_has():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fmjax.nothing  # noqa: B018
    assert callable(fmjax.load) and callable(fmjax.train)


@pytest.mark.slow
def test_a_wheel_lists_and_runs_its_configs(tmp_path):
    """In an environment without the checkout, from another folder. Builds with setuptools of a
    package index."""
    source, place = tmp_path / "source", tmp_path / "env"
    kept = shutil.ignore_patterns(".*", "runs", "*.egg-info", "__pycache__", "build")
    shutil.copytree(ROOT, source, ignore=kept)
    run = functools.partial(
        subprocess.run, check=True, cwd=tmp_path, capture_output=True, text=True
    )
    pip = [sys.executable, "-m", "pip", "--quiet"]
    run([*pip, "wheel", source, "--no-deps", "-w", tmp_path])
    (wheel,) = tmp_path.glob("fmjax-*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", place])
    run([*pip, "--python", place / "bin" / "python", "install", "--no-deps", wheel])
    # Everything else is of this environment, whose own fmjax is no folder on the path.
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    program = functools.partial(run, env=environment)
    assert "configs/mlm.py" in program([place / "bin" / "fmjax", "--list"]).stdout
    where = program([place / "bin" / "python", "-c", "import fmjax; print(fmjax.__file__)"]).stdout
    assert str(place) in where
    words = ["-m", "fmjax", "--config=configs/mlm.py:tiny,runlocal", f"--workdir={tmp_path}/run"]
    program([place / "bin" / "python", *words])
    assert (tmp_path / "run" / "report.html").exists()
