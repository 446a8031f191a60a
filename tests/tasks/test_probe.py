"""The vectors that a probe keeps: computed once, and an error where they change under it."""

import json
import os

import numpy as np
import pytest
import tiny_folders
from common import ROOT

from fmjax.config import load as configs
from fmjax.errors import DataError
from fmjax.tasks import probe


@pytest.fixture
def config(tmp_path):
    words = tiny_folders.tokenizer(tmp_path / "words")
    tiny_folders.decoder(tmp_path / "model", words)
    rows = [{"text": text, "label": text[:1]} for text in ("aa", "ab", "ba", "bb") * 4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "folder": tmp_path / "model",
        "data.train": tmp_path / "rows.jsonl",
        "data.validation": tmp_path / "rows.jsonl",
        "data.cache": tmp_path / "cache",
        "data.seq_len": 8,
        "batch_size": 8,
    }
    given = [f"--config.{key}={value}" for key, value in values.items()]
    return configs.load(str(ROOT / "configs/probe.py"), given)


class Disturbed:
    """A classifier under which another program writes into the vectors."""

    classes_ = np.arange(2)

    def __init__(self, cache):
        self.cache = cache

    def fit(self, rows, labels):
        for file in self.cache.glob("vectors-*/vectors.npy"):
            with file.open("r+b") as opened:
                opened.seek(-4, os.SEEK_END)
                opened.write(np.float32(np.nan).tobytes())
        if np.isnan(rows).any():
            raise ValueError("Input X contains NaN.")  # as scikit-learn does

    def predict_proba(self, rows):
        return np.full((len(rows), 2), 0.5)


def test_vectors_that_change_while_they_are_read_are_an_error(config, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "classifier", lambda *_: Disturbed(tmp_path / "cache"))
    with pytest.raises(DataError, match="vectors.npy has been changed while it was read"):
        probe.run(config, tmp_path / "changed")
    monkeypatch.undo()
    probe.run(config, tmp_path / "run")  # prepares them again
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert metrics["validation/classify/accuracy"] == 1
