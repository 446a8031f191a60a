"""Whole runs, in processes of their own or in this one, on one small config and one cache.

After the first a start takes seconds. A test module gets the fixtures by
`pytest_plugins = ["runs"]`. Faults are those of inject.py.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import inject
import jax
import numpy as np
import pytest
from common import CACHE, ROOT

from fmjax.checkpoints import checkpointer
from fmjax.config import load as configs
from fmjax.io import metrics_log, retention
from fmjax.params import sharding
from fmjax.tasks import train
from fmjax.training import setup

TOTAL = 40
KEEP_ALL = "--config.keep=99"
# configs/mlm.py with a tiny model, dropout, a small corpus, and everything more often.
CONFIG = f"""
from configs import mlm

def get_config():
    config = mlm.get_config()
    config.total = "{TOTAL} steps"
    config.batch_size = 8
    config.precision = "float32"
    config.data.update(name="text", train="text.txt", seq_len=32)
    config.tokenizer.vocab_size = 300
    config.model.update(variant="tiny", width=32, mlp=64, max_len=32)
    config.model.update(dropout=0.1, attention_dropout=0.1)
    config.optim.lr = 1e-3
    config.optim.args.eps = 1e-3  # so that rounding noise is not scaled up to a step of size lr
    config.log_every, config.save_every, config.eval_every = 5, 5, 20
    config.tensorboard = False
    return config
"""


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The folder where commands are typed: a config and its corpus."""
    home = tmp_path_factory.mktemp("runs")
    (home / "small.py").write_text(CONFIG)
    write_corpus(home, seed=0)
    return home


@pytest.fixture(scope="session")
def straight(home):
    """A run that nothing happened to, with all its checkpoints."""
    folder = home / "straight"
    done = run(home, folder, KEEP_ALL)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


@pytest.fixture(scope="session")
def abstract(home):
    """The training state's shapes, to read checkpoints with."""
    mesh = sharding.make_mesh()
    config = configs.load(str(home / "small.py"), [f"--config.data.train={home}/text.txt"])
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMJAX_CACHE", str(CACHE))
        return setup.setup(config, mesh).abstract


def write_corpus(folder: Path, seed: int) -> None:
    """400 documents of two-syllable words."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.sample(syllables, 2)) for _ in range(200)]
    documents = [" ".join(rng.choices(words, k=rng.randint(10, 40))) for _ in range(400)]
    (folder / "text.txt").write_text("\n\n".join(documents))


def start(home: Path, folder: Path | str, *flags: str, faults="", devices=1) -> subprocess.Popen:
    """`python run.py` typed in `home`."""
    command = [ROOT / "tests" / "inject.py", faults] if faults else [ROOT / "run.py"]
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *command, "--config=small.py", f"--workdir={folder}", *flags],
        cwd=home,
        env=os.environ | {"FMJAX_CACHE": str(CACHE), "XLA_FLAGS": xla, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return ended(start(*args, **kwargs))


def run_here(home: Path, folder: Path, *flags: str, faults="", monkeypatch) -> None:
    """The same in this process, which saves its start, on 8 devices; raises what the run raises."""
    with monkeypatch.context() as patch:
        patch.chdir(home)
        if faults:
            inject.install(faults, patch.setattr)
        train.run(configs.load("small.py", flags), folder)


def wait(process: subprocess.Popen, happened) -> None:
    """Until `happened()`, or the process has ended."""
    while process.poll() is None and not happened():
        time.sleep(0.002)


def reached(folder: Path, step: int) -> bool:
    return any(row["step"] >= step for row in metrics_log.read(folder)[0])


def saving(folder: Path) -> bool:
    directory = folder / "checkpoints"
    there = {path.name for path in directory.glob("[0-9]*")}
    return bool(there - set(map(str, retention.finished(directory))))


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def final_state(folder: Path, abstract, total: int = TOTAL):
    saver = checkpointer.Checkpointer(folder)
    try:
        state, meta = saver.restore(abstract)
    finally:
        saver.close()
    assert meta["step"] == int(state.step) == total
    return state


def digest(state) -> str:
    """sha256 over the names and bytes of step, parameters, optimizer state and random key."""
    found = hashlib.sha256()
    state = state.replace(rng=jax.random.key_data(state.rng))
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} ".encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def history(folder: Path) -> list[dict]:
    """The metrics of a run without what depends on the clock and the machine."""
    rows, _ = metrics_log.read(folder)
    machine = ("perf/", "memory/", "time", "spent")
    return [{k: v for k, v in row.items() if not k.startswith(machine)} for row in rows]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock.json")
    return {str(path): path.read_bytes() for path in files}


def assert_same_end(folder: Path, straight: Path, abstract, total: int = TOTAL) -> None:
    """The same bits in the state, and every logged line once, with the same numbers."""
    ours, theirs = (final_state(path, abstract, total) for path in (folder, straight))
    assert digest(ours) == digest(theirs)
    assert history(folder) == history(straight)
    assert status(folder)["state"] == "done" and (folder / "report.html").exists()
