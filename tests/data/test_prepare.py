"""The whole preparation: the embedded default, settings, reuse."""

import hashlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from fmjax import data
from fmjax.data import pycode
from fmjax.data import pydocs as documentation
from fmjax.errors import ConfigError, DataError


def test_pydocs_is_english_documentation(pydocs):
    dataset = pydocs()
    texts = documentation.texts()
    assert len(texts) == len({text for _, text in texts}) > 400
    assert sum(len(text) for _, text in texts) > 1_500_000
    counts = dataset.counts
    assert counts["train"]["documents"] + counts["validation"]["documents"] == len(texts)
    assert 0.02 < counts["validation"]["documents"] / len(texts) < 0.09
    assert dataset.vocab.size == 8192


def test_the_texts_are_the_same_in_every_process():
    script = (
        "import hashlib; from fmjax.data import pydocs; "
        "print(hashlib.sha256(repr(pydocs.texts()).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    here = hashlib.sha256(repr(documentation.texts()).encode()).hexdigest()
    assert output.stdout.strip() == here


def test_pycode_is_the_code_of_modules(pydocs):
    texts = pycode.texts()
    assert len(texts) == len({text for _, text in texts}) > 400
    assert sum(len(text) for _, text in texts) > 8_000_000
    assert ("code of textwrap.py", Path(textwrap.__file__).read_text()) in texts
    named = " ".join(where for where, _ in texts)
    assert not re.search(r"/tests?/|idlelib|__pycache__|_sysconfigdata|site-packages", named)
    counts = pydocs(name="pycode", max_documents=20, validation_fraction=0).counts["train"]
    assert counts["documents"] == 20


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(format="classes", long="drop"), "'pycode' has documents in one column.*'classes'"),
        (dict(format="chat", long="drop"), "'pycode' has documents in one column.*'chat'"),
        (dict(train="a.txt"), "leave config.data.train empty"),
    ],
)
def test_pycode_is_nothing_else(pydocs, how, said):
    with pytest.raises(ConfigError, match=said):
        pydocs(name="pycode", **how)


def test_a_second_start_reads_the_cache_without_heavy_imports(pydocs):
    pydocs()  # fills it
    script = (
        "import sys; from fmjax import data; data.prepare({}, {}, log=lambda line: None); "
        "print(sorted({'jax', 'torch', 'transformers', 'datasets', 'grain'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_other_settings_are_other_data(prepare):
    text = "\n\n".join("abcdefghij"[i:] for i in range(9))
    base = prepare(text)
    assert prepare(text).digest == base.digest
    assert prepare(text, seq_len=24).digest == base.digest  # packing is not the tokens
    assert prepare(text, seq_len=24).format != base.format
    assert prepare(text, document="file").digest != base.digest
    assert prepare(text + "\n\nz").digest != base.digest
    assert prepare(text, validation_fraction=0.5).digest != base.digest


def test_the_validation_split_is_a_share_or_a_file(prepare, tmp_path):
    text = "\n\n".join(a + b for a in "abcdefghij" for b in "abcdefghij")
    assert set(prepare(text).splits) == {"train"}
    shared = prepare(text, validation_fraction=0.3).counts
    assert 15 < shared["validation"]["documents"] < 45
    assert shared["train"]["documents"] + shared["validation"]["documents"] == 100
    (tmp_path / "v.txt").write_text("xyz\n\nzyx")
    given = prepare(text, validation=str(tmp_path / "v.txt"), validation_fraction=0.3)
    assert given.counts["train"]["documents"] == 100
    assert given.counts["validation"]["documents"] == 2


def test_documents_of_both_files_can_be_left_out_of_training(prepare, tmp_path):
    (tmp_path / "v.txt").write_text("xyz\n\nab")
    given, lines = dict(validation=str(tmp_path / "v.txt"), overlap="drop"), []
    counts = prepare("abc\n\nab\n\nde\n\nab", **given, log=lines.append).counts
    assert counts["train"]["documents"] == 2 and counts["train"]["source_tokens"] == 5
    assert counts["validation"]["documents"] == 2
    assert "2 dropped as in validation" in lines[0] and "dropped" not in lines[1]


def test_files_given_to_the_default_source_are_read(prepare):
    assert prepare("abc", name="pydocs").counts["train"]["source_tokens"] == 3


def test_what_was_prepared_is_logged(prepare):
    lines = []
    prepare("abc\n\nde", seq_len=10, log=lines.append)
    expected = "data: train: 2 documents, 5 tokens, 1 rows of 10 (90.0 % filled)"
    assert expected in lines


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seqlen": 3}, r"Unknown key config\.data\.seqlen\. Did you mean 'seq_len'"),
        (
            {"name": "txt"},
            r"config\.data\.name='txt'.*Possible: digits, hub, idx, pycode, pydocs, text",
        ),
        ({"format": "pair"}, r"config\.data\.format='pair'.*'pairs'"),
        ({"long": "cut"}, r"config\.data\.long='cut'.*drop, error, split, truncate"),
        ({"seq_len": 4}, r"config\.data\.seq_len=4 must be a number from 8"),
        ({"validation_fraction": float("nan")}, r"validation_fraction=nan must be a number"),
        ({"name": "hub"}, r"config\.data\.path"),
        ({"validation": "x.txt"}, r"config\.data\.validation needs config\.data\.train"),
        ({"overlap": "drop"}, r"overlap='drop' needs config\.data\.validation"),
        ({"format": "pairs", "long": "drop"}, r"config\.data\.long='drop' has no meaning"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(ConfigError, match=message):
        data.prepare(settings, {})


def test_a_split_without_rows_is_an_error(prepare):
    with pytest.raises(DataError, match="training split has no rows.*1 dropped documents"):
        prepare("abcdefghij", seq_len=8, long="drop")


def test_real_text_in_every_format(pydocs):
    for settings in ({"format": "padded"}, {"format": "pairs"}, {"seq_len": 512}):
        split = pydocs(**settings).splits["validation"]
        rows = split.rows(np.arange(len(split)))
        assert rows["input_ids"].max() < 8192
        assert (rows["input_ids"][rows["segment_ids"] > 0] != 0).all()
        assert rows["positions"].max() < split.seq_len
