"""Datasets in the hub's format, from local folders: no network in tests."""

import json

import pytest

from fmjax.data import sources
from fmjax.data.settings import DataSettings
from fmjax.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(params=[False, True], ids=["map", "stream"])
def read(request, tmp_path):
    """read({file: lines}, **config.data): (text, split) of the documents."""

    def read(contents, **settings):
        folder = tmp_path / "corpus"
        folder.mkdir(exist_ok=True)
        for name, lines in contents.items():
            (folder / name).write_text("".join(line + "\n" for line in lines))
        defaults = {"name": "hub", "path": str(folder), "validation_fraction": 0.0}
        settings = DataSettings(**defaults | {"streaming": request.param} | settings)
        return [(d.text, d.split) for d in sources.read(settings, log=print).documents()]

    return read


def rows(*texts):
    return [json.dumps({"text": text}) for text in texts]


def test_a_local_folder_with_splits(read):
    contents = {"train.jsonl": rows("one", "two"), "validation.jsonl": rows("three")}
    assert read(contents) == [("one", "train"), ("two", "train")]
    expected = [("one", "train"), ("two", "train"), ("three", "validation")]
    assert read(contents, validation="validation") == expected
    assert read(contents, train="validation") == [("three", "train")]


def test_a_limit_stops_reading(read):
    assert read({"train.jsonl": rows(*"abcde")}, max_documents=2) == [
        ("a", "train"),
        ("b", "train"),
    ]


def test_streaming_prepares_the_same_dataset(tmp_path, prepare):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(rows("one two", "three")))
    settings = {"name": "hub", "train": "", "path": str(folder)}
    found = [
        prepare("", streaming=streaming, cache=str(tmp_path / str(streaming)), **settings).digest
        for streaming in (False, True)
    ]
    assert found[0] == found[1]


def test_row44_a_missing_column_split_or_folder(read):
    contents = {"train.jsonl": rows("one")}
    with pytest.raises(ConfigError, match=r"config\.data\.columns='txt' is no column.*'text'"):
        read(contents, columns="txt")
    with pytest.raises(DataError, match="test.*train.*config.data.path.*names of splits"):
        read(contents, train="test")
    with pytest.raises(DataError, match="cannot be read beyond row 0.*no/where"):
        read(contents, path="./no/where")


def test_row44_null_and_an_empty_file(read):
    with pytest.raises(DataError, match=r"\[train\] row 2: the value is null, not text"):
        read({"train.jsonl": rows("one", None)})
    with pytest.raises(DataError, match="a file without records"):
        read({"train.jsonl": []})


def test_a_column_that_is_there_twice(read):
    """pandas, by which .csv is read, would call the second text.1 and say nothing."""
    with pytest.raises(DataError, match="the columns 'text' and 'text.1' .*there twice"):
        read({"train.csv": ["text,text", "one,two"]})
    assert read({"train.csv": ["text,other", "one,two"]}) == [("one", "train")]


def test_a_name_like_that_of_a_column_that_is_there_twice(read):
    assert read({"train.jsonl": ['{"text": "one", "text.1": "two"}']}) == [("one", "train")]


def test_row45_one_row_of_another_type(read):
    with pytest.raises(DataError, match="column 'text' .* not text. One record of another type"):
        read({"train.jsonl": rows("one", 2, "three")})


def test_row43_a_broken_line(read):
    with pytest.raises(DataError, match="cannot be read beyond row 0: .*config.data.path"):
        read({"train.jsonl": [*rows("one"), '{"text":', *rows("three")]})


def test_a_script_in_the_folder_is_not_run(read, tmp_path):
    marker = tmp_path / "ran"
    script = [f"open({str(marker)!r}, 'w')"]
    with pytest.raises(DataError, match="scripts are no longer supported"):
        read({"train.jsonl": rows("one"), "corpus.py": script})
    assert not marker.exists()


def test_what_is_not_pinned_is_said():
    lines = []
    sources.read(DataSettings(name="hub", path="someone/corpus"), lines.append)
    assert "config.data.revision" in lines[0]
    lines.clear()
    sources.read(DataSettings(name="hub", path="someone/corpus", revision="0" * 40), lines.append)
    assert not lines
