"""Nothing is left out, taken for another or changed in silence: columns, keys, files, bytes."""

import gzip
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from common import ROOT

from fmjax.data import digests, files, labelled, sources
from fmjax.data.settings import DataSettings
from fmjax.errors import ConfigError, DataError, Preempted
from fmjax.io import disk_cache


def settings_of(path, **more):
    return DataSettings(**{"name": "text", "train": str(path), "validation_fraction": 0.0} | more)


def documents(path, **more):
    return list(sources.read(settings_of(path, **more), log=print).documents())


# ---- columns and keys that are there twice ----


@pytest.mark.parametrize("name, mark", [("a.csv", ","), ("a.tsv", "\t")])
def test_a_column_that_is_there_twice(tmp_path, name, mark):
    path = tmp_path / name
    path.write_text(mark.join(["text", "n", "text"]) + "\n" + mark.join("abc") + "\n")
    with pytest.raises(DataError, match=rf"{name}: the column 'text' .*columns\) is there twice"):
        documents(path)
    path.write_text(mark.join(["n", "text", "n"]) + "\n" + mark.join("abc") + "\n")
    assert [d.text for d in documents(path)] == ["b"]  # nobody asked for the other column


def test_a_column_of_parquet_that_is_there_twice(tmp_path):
    columns = [pyarrow.array([text]) for text in "abc"]
    table = pyarrow.Table.from_arrays(columns, names=["text", "n", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: the column 'text' .* is there twice"):
        documents(tmp_path / "a.parquet")


def test_a_key_of_json_that_is_there_twice(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n{"text": "d"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON \(the key 'text' is there twice\)"):
        documents(path)
    found = documents(path, on_bad_record="skip")
    assert [d.text for d in found if d.split == "train"] == ["a", "d"]
    (tmp_path / "b.json").write_text('[{"text": "b", "text": "c"}]')
    with pytest.raises(DataError, match="the key 'text' is there twice"):
        documents(tmp_path / "b.json")


def test_a_bad_line_within_quotes_makes_its_row_bad(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\n"one\ncaf\xe9\nthree",1\nfine,2\n')
    found = documents(path, on_bad_record="skip")
    assert [(d.split, d.text, d.where[-7:]) for d in found] == [
        ("bad", "", "a.csv:2"),
        ("train", "fine", "a.csv:5"),
    ]
    assert found[0].bad.startswith("line 3: byte 0xe9")


@pytest.mark.parametrize("header", [b"t\xe9xt,text\n", b'text,"n\n'])
def test_the_row_after_a_bad_header_is_no_header(tmp_path, header):
    path = tmp_path / "a.csv"
    path.write_bytes(header + b"text,n\nx,y\n")
    with pytest.raises(DataError, match=r"a\.csv:1: in the header: .*config\.data\.train"):
        documents(path, on_bad_record="skip")


# ---- types in which others store text ----

TEXTS = ["some words", "more words", "some words"]
STORED = {
    "categories": pyarrow.array(TEXTS).dictionary_encode(),
    "large": pyarrow.array(TEXTS, pyarrow.large_string()),
    "views": pyarrow.array(TEXTS, pyarrow.string_view()),
}


@pytest.mark.parametrize("text", STORED.values(), ids=STORED)
@pytest.mark.parametrize("label", STORED.values(), ids=STORED)
def test_text_and_labels_of_parquet_in_every_type_of_text(tmp_path, text, label):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "label": label}), path)
    assert [d.text for d in documents(path)] == TEXTS
    found = documents(path, format="classes", long="truncate")
    assert [d.fields for d in found] == [{"text": x, "label": x} for x in TEXTS]


def test_texts_of_parquet_within_lists_and_structures(tmp_path):
    path = tmp_path / "a.parquet"
    words = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2, 3], pyarrow.int32()), words)
    turns = pyarrow.StructArray.from_arrays(
        [pyarrow.array(["user", "assistant"]).dictionary_encode(), pyarrow.array(["q", "r"])],
        ["role", "content"],
    )
    chats = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2, 2], pyarrow.int32()), turns)
    table = {"words": lists, "tags": lists, "messages": chats}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    tags = documents(path, format="tags", columns="words", label="tags", long="truncate")
    assert tags[0].fields == {"words": ["a", "b"], "tags": ["a", "b"]}
    chat = documents(path, format="chat", columns="messages", long="drop", on_bad_record="skip")
    roles = [message["role"] for message in chat[0].fields["messages"]]
    assert roles == ["user", "assistant"] and chat[1].bad.startswith("the value is an empty list")


def test_other_types_of_parquet_are_refused_by_column(tmp_path):
    path = tmp_path / "a.parquet"
    far = pyarrow.array([10**14], pyarrow.timestamp("s"))  # beyond what Python's own type holds
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": far}), path)
    for form, kind in (("classes", "text or a whole number"), ("values", "a finite number")):
        with pytest.raises(DataError, match=rf"'label' .* holds timestamp\[.*\], not {kind}"):
            documents(path, format=form, long="truncate")
    turn = {"role": pyarrow.array(["user"]), "content": pyarrow.array(["a"]), "time": far}
    turns = pyarrow.StructArray.from_arrays(list(turn.values()), list(turn))
    chats = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1], pyarrow.int32()), turns)
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats}), path)
    with pytest.raises(DataError, match=r"a\.parquet: not readable as parquet beyond row 0"):
        documents(path, format="chat", columns="messages", long="drop")


def test_a_text_of_parquet_that_is_not_utf8_is_a_bad_record(tmp_path):
    path = tmp_path / "a.parquet"
    both = pyarrow.py_buffer(b"\xff\xfefine")
    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 6)))
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, both])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    with pytest.raises(DataError, match=r"row 1: byte 0xff at place 1 of the text is not UTF-8"):
        documents(path)
    assert [d.text for d in documents(path, on_bad_record="skip")][1] == "fine"


# ---- matches of a pattern ----


def test_a_pattern_whose_matches_are_no_files(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("nowhere")
    (tmp_path / "d.txt").symlink_to(tmp_path / "d.txt")
    expected = (
        r"3 of 4 matches of .* are no files .*: b\.txt \(a pipe\), c\.txt \(a dead link\), "
        r"d\.txt \(Too many levels of symbolic links\)"
    )
    with pytest.raises(DataError, match=expected):
        files.expand(f"{tmp_path}/*.txt", "data.train")
    with pytest.raises(ConfigError, match=r"c\.txt' is a dead link, no file"):
        files.expand(f"{tmp_path}/c.txt", "data.train")


def test_a_folder_with_the_name_of_a_file(tmp_path):
    """Spark writes train.jsonl/part-0.jsonl."""
    (tmp_path / "more").mkdir()
    (tmp_path / "a.jsonl").write_text("{}")
    assert len(files.expand(f"{tmp_path}/*", "data.train")) == 1  # `more` is not named as data is
    (tmp_path / "train.jsonl").mkdir()
    (tmp_path / "train.jsonl/part-0.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"1 of 2 matches .*train\.jsonl \(a folder\)"):
        files.expand(f"{tmp_path}/*.jsonl", "data.train")
    assert len(files.expand(f"{tmp_path}/**/*.jsonl", "data.train")) == 2


# ---- files that cannot be read ----

READ_AS_ANOTHER = """
import os, sys
from fmjax.data import sources, tokenizer
from fmjax.data.settings import DataSettings, TokenizerSettings
from fmjax.errors import FmjaxError
os.chdir("/")
if os.geteuid() == 0:
    os.seteuid(65534)
for kind, name in (words.split("=") for words in sys.argv[1:]):
    try:
        if kind == "tokenizer":
            tokenizer._identity(TokenizerSettings(name=name), None)
        else:
            more = {"train": name} if kind == "train" else {"name": "hub", "path": name}
            list(sources.read(DataSettings(**more), print).documents())
    except FmjaxError as error:
        print(error.exit_code, error)
"""


def test_row44_files_and_folders_that_may_not_be_read():
    """By another user than the superuser, who may read everything."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        home = Path(name)
        for folder in (home, home / "open", home / "closed"):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)
            for file in ("a.txt", "b.txt", "tokenizer.json"):
                (folder / file).write_text("some words")
        (home / "open/b.txt").chmod(0)
        (home / "open/tokenizer.json").chmod(0)
        (home / "closed").chmod(0)
        names = ["open/b.txt", "open/*.txt", "closed/*.txt", "*/a.txt"]
        given = [f"train={home}/{name}" for name in names]
        given += [f"hub={home}/open", f"tokenizer={home}/open"]
        command = [sys.executable, "-c", READ_AS_ANOTHER, *given]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        (home / "closed").chmod(0o755)
    denied = "(Permission denied)"
    assert done.stdout.splitlines() == [
        f"5 {home}/open/b.txt: cannot be read {denied}; config.data.train",
        f"5 {home}/open/b.txt: cannot be read {denied}; config.data.train",
        f"5 config.data.train: the folder '{home}/closed' cannot be listed {denied}.",
        f"5 config.data.train: the folder '{home}/closed' cannot be listed {denied}.",
        f"5 {home}/open/b.txt: cannot be read {denied}; config.data.path",
        f"5 {home}/open: cannot be read {denied}; config.tokenizer.name",
    ], done.stderr


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux has a file that fails so")
def test_a_file_of_a_bad_disk(tmp_path):
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(Input/output error\)"):
        documents(tmp_path / "a.txt")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux has a file of no size")
def test_a_file_of_no_size_is_not_read_without_end(tmp_path):
    (tmp_path / "a.txt").symlink_to("/proc/self/pagemap")
    with pytest.raises(DataError, match=r"a\.txt: has content but no size.*config\.data\.train"):
        documents(tmp_path / "a.txt")


# ---- files that change while they are read ----

TEXT = "".join(f"words of document {i}{' and more' * 100}\n\n" for i in range(400))
TABLE = pyarrow.table({"text": ["a", "b"]})
CONTENTS = {
    "a.txt": TEXT.encode(),
    "a.txt.gz": gzip.compress(TEXT.encode()),
    "a.jsonl": b'{"text": "a"}\n',
    "a.json": b'[{"text": "a"}]',
    "a.csv": b"text\na\n",
}


@pytest.mark.parametrize("name", [*CONTENTS, "a.parquet"])
def test_a_file_that_changed_after_its_digest(tmp_path, name):
    path = tmp_path / name
    write = lambda: path.write_bytes(CONTENTS[name])
    if name == "a.parquet":
        write = lambda: pyarrow.parquet.write_table(TABLE, path)
    write()
    source = sources.read(settings_of(path), log=print)
    assert list(source.documents())
    write()  # of the same size, in the same moment
    with pytest.raises(DataError, match=rf"{name}: changed while it was read.*config\.data\.train"):
        list(source.documents())


@pytest.mark.parametrize("change", ["append", "cut", "replace"])
def test_a_file_that_changes_between_two_of_its_blocks(tmp_path, change):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    assert len(TEXT) > 2 * (1 << 17)
    found = sources.read(settings_of(path), log=print).documents()
    assert next(found).text.startswith("words of document 0 and")
    if change == "append":
        with path.open("a") as file:
            file.write("more")
    elif change == "cut":
        os.truncate(path, len(TEXT) // 2)
    else:
        (tmp_path / "new").write_text(TEXT.upper())
        (tmp_path / "new").rename(path)
    with pytest.raises(DataError, match="changed while it was read"):
        list(found)


def test_nothing_of_a_changed_file_is_kept_under_its_digest(prepare, tmp_path, monkeypatch):
    """The next preparation, of the right text, has its tokens."""
    path = tmp_path / "corpus.txt"
    take = digests.Digests.take

    def changing(self, file):
        digest = take(self, file)
        file.write_text("b c. a.")
        return digest

    monkeypatch.setattr(digests.Digests, "take", changing)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare("a b. c.")
    monkeypatch.undo()
    again = prepare("a b. c.")
    assert again.digest == prepare("a b. c.", cache=str(tmp_path / "clean")).digest
    assert path.read_text() == "a b. c."


def test_a_folder_of_the_hub_that_changes(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    settings = DataSettings(name="hub", path=str(folder), validation_fraction=0, streaming=True)
    source = sources.read(settings, log=print)
    (folder / "train.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl: changed while it was read"):
        list(source.documents())


# ---- signals ----


def stopped():
    raise Preempted("stopped by SIGTERM")


@pytest.mark.parametrize("content", [b"\n" * (1 << 20), b"\xff\n" * (1 << 18), b"a" * (1 << 20)])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json", "a.conll"])
def test_a_signal_is_heard_within_a_block(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(b"text\n" * (name == "a.csv") + content)
    more = {"format": "tags", "long": "truncate"} if name == "a.conll" else {}
    settings = settings_of(path, on_bad_record="skip", **more)
    with pytest.raises(Preempted):
        list(files.records([path], settings, "data.train", poll=stopped))


def test_a_signal_is_heard_while_digests_are_taken(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("words")
    with pytest.raises(Preempted):
        sources.read(settings_of(path), print, stopped)
    with pytest.raises(Preempted):
        disk_cache.file_digest(path, stopped)
    settings = DataSettings(name="hub", path=str(tmp_path))
    calm = sources.read(settings, print)
    assert calm.identity["hub"]
    with pytest.raises(Preempted):
        sources.read(settings, print, stopped)


@pytest.mark.parametrize("polls", [1, 5, 12])
def test_a_signal_while_examples_are_made_leaves_nothing(prepare, tmp_path, monkeypatch, polls):
    monkeypatch.setattr(labelled, "CHUNK", 1)
    path, left = tmp_path / "a.jsonl", iter(range(polls))
    path.write_text("".join(f'{{"text": "a", "label": "{i % 2}"}}\n' for i in range(20)))

    def poll():
        if next(left, None) is None:
            stopped()

    settings = dict(format="classes", long="truncate")
    with pytest.raises(Preempted):
        prepare(path, poll=poll, **settings)
    assert not list((tmp_path / "cache").glob("examples-*/"))
    assert prepare(path, **settings).counts["train"]["rows"] == 20
