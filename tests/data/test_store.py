"""The store: exact tokens, killed and resumed, shared, damaged, tokenised by several processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fmjax.data import store
from fmjax.errors import DataError
from fmjax.io import disk_cache

DOCUMENTS = [f"{a}{b}c. {a}d." for a in "abcdefghij" for b in "abcdefghij"]  # 100 of 8 characters
TEXT = "\n\n".join(DOCUMENTS)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD_CHARACTERS", 100)  # 13 documents in each of 8 shards
    monkeypatch.setattr(store, "IN_PROCESS_SHARDS", 100)


def shards(tmp_path):
    (home,) = (path for path in (tmp_path / "cache").glob("tokens-*") if path.is_dir())
    return sorted(path for path in home.iterdir() if path.name.isdigit())


def test_shards_hold_the_tokens_of_every_document_in_order(prepare, tmp_path):
    dataset = prepare(TEXT)
    assert len(shards(tmp_path)) == 8
    found = []
    for shard in store.read(shards(tmp_path)[0].parent, 8, "train"):
        assert shard.tokens.dtype == np.uint16
        ends = shard.documents
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            found.append("".join("." if t == 31 else chr(t + 92) for t in shard.tokens[start:end]))
    assert found == [document.replace(" ", "") for document in DOCUMENTS]
    assert dataset.counts["train"]["documents"] == 100
    assert dataset.counts["train"]["source_tokens"] == 700


def test_row48_the_dtype_follows_the_vocabulary():
    assert store.token_dtype(30522) == np.uint16
    assert store.token_dtype(65536) == np.uint16
    assert store.token_dtype(65537) == np.uint32


def test_row48_an_id_beyond_the_vocabulary_is_refused(letters):
    from fmjax.data.sources import Document
    from fmjax.data.tokenizer import encoder

    documents = [Document("ab", "train", "a.txt:1", 1.0)]
    with pytest.raises(DataError, match=r"a\.txt:1: the tokenizer gives id 6.* has 6"):
        store._tokenised(encoder(letters), documents, 6)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One two. Three four! Five?", ["One two.", "Three four!", "Five?"]),
        ('He said "go." Then went.', ['He said "go."', "Then went."]),
        ("e.g. this stays... and so on. End", ["e.g. this stays... and so on.", "End"]),
        ("No mark\n\nNext\nline", ["No mark", "Next\nline"]),
        ("3.14 is pi. 2 is not.", ["3.14 is pi.", "2 is not."]),
        ("今日は。明日も！終", ["今日は。", "明日も！", "終"]),
        ("one", ["one"]),
    ],
)
def test_sentences(text, expected):
    characters = np.array([i for i, c in enumerate(text) if not c.isspace()])  # a token a character
    starts = characters[store.sentence_starts(text, characters)].tolist()
    ends = [*starts[1:], len(text)]
    found = [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    assert found == expected


class Killed(Exception):
    pass


def stop_after(number, tmp_path):
    """A `poll` that raises once there are `number` shards, as one does that finds a signal."""

    def poll():
        if len(list(tmp_path.glob("cache/tokens-*/0*/index.json"))) == number:
            raise Killed

    return poll


def test_an_interrupted_preparation_resumes_where_it_stopped(prepare, tmp_path, monkeypatch):
    straight = prepare(TEXT, cache=str(tmp_path / "straight"))
    with pytest.raises(Killed):
        prepare(TEXT, poll=stop_after(5, tmp_path))
    done = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    assert len(done) == 5
    resumed = prepare(TEXT)
    assert len(shards(tmp_path)) == 8
    assert all(path.stat().st_mtime_ns == at for path, at in done.items())
    assert resumed.digest == straight.digest and resumed.counts == straight.counts


PREPARE = """
import os, signal, sys
from fmjax import data
from fmjax.data import store
store.SHARD_CHARACTERS = store.IN_PROCESS_SHARDS = 100
settings = {"train": sys.argv[1], "cache": sys.argv[2], "validation_fraction": 0, "seq_len": 16}
def run(**more):
    print(data.prepare(settings | more.pop("data", {}), {"name": sys.argv[3]}, **more).digest)
"""


def start(script, tmp_path, letters):
    (tmp_path / "corpus.txt").write_text(TEXT)
    arguments = [tmp_path / "corpus.txt", tmp_path / "cache", letters]
    command = [sys.executable, "-c", PREPARE + script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_preparation_killed_while_writing_resumes(prepare, tmp_path, letters):
    killer = """
save = store.np.save
def dying(path, array):
    if "00003" in str(path):
        open(path, "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, array)
store.np.save = dying
run()
"""
    process = start(killer, tmp_path, letters)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    home = shards(tmp_path)[0].parent
    assert len(shards(tmp_path)) == 3 and list(home.glob("*.tmp-*"))
    resumed = prepare(TEXT)
    assert not list(home.glob("*.tmp-*"))
    assert resumed.digest == prepare(TEXT, cache=str(tmp_path / "straight")).digest


def test_two_processes_at_once_prepare_one_store(prepare, tmp_path, letters):
    both = [start("run()", tmp_path, letters) for _ in range(2)]
    output = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    digests = {out.splitlines()[-1] for out, _ in output}
    assert digests == {prepare(TEXT).digest} and len(shards(tmp_path)) == 8


def test_who_comes_second_waits_and_says_so(tmp_path):
    path, lines, polls = tmp_path / "x.lock", [], []

    def second():
        with disk_cache.lock(path, lines.append, lambda: polls.append(1)):
            lines.append("in")

    thread = threading.Thread(target=second)
    with disk_cache.lock(path, print, lambda: None):
        thread.start()
        while not polls:
            time.sleep(0.01)
        assert len(lines) == 1 and "another process" in lines[0]
    thread.join(10)
    assert lines[1:] == ["in"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("part", ["packed-16-split/train.tokens", "00004/train.tokens.npy"])
def test_a_damaged_cache_is_noticed_and_made_again(prepare, tmp_path, damage, part):
    before = prepare(TEXT)
    expected = before.splits["train"].rows(np.arange(len(before.splits["train"])))
    home = shards(tmp_path)[0].parent
    path = home / part
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    if part.startswith("0"):
        for file in (home / "packed-16-split").iterdir():  # so that the shards are looked at
            file.unlink()
    lines = []
    after = prepare(TEXT, log=lines.append)
    assert any("damaged" in line or "incomplete" in line for line in lines)
    found = after.splits["train"].rows(np.arange(len(after.splits["train"])))
    assert after.digest == before.digest
    np.testing.assert_array_equal(found["input_ids"], expected["input_ids"])


def write_to(path):
    """As long as before, and as old."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.with_name("other").write_bytes(content)
    path.with_name("other").replace(path)


@pytest.mark.parametrize("part", ["tokens", "documents"])
@pytest.mark.parametrize(
    "change", [write_to, replace, lambda path: os.truncate(path, 130), Path.unlink]
)
def test_a_shard_that_changed_since_it_was_written_is_not_packed(prepare, tmp_path, change, part):
    prepare(TEXT)
    home = shards(tmp_path)[0].parent
    reading = store.read(home, 8, "train")
    next(reading)
    change(home / "00003" / f"train.{part}.npy")
    assert len(next(reading).documents) == len(next(reading).documents) == 14
    with pytest.raises(DataError, match=r"00003.* has been changed while it was read") as error:
        next(reading)
    assert f"train.{part}.npy" in str(error.value)
    assert len(list(store.read(home, 8, "validation"))) == 8  # whose files are whole


def test_a_shard_that_changes_while_it_is_read_is_named(prepare, tmp_path, monkeypatch):
    """Its bytes are right again when the digest is taken."""
    prepare(TEXT)
    home = shards(tmp_path)[0].parent
    read = store.MappedFiles.npy

    def meanwhile(files, name):
        found = read(files, name)
        if name == "train.tokens.npy":
            content = (files.folder / name).read_bytes()
            with (files.folder / name).open("r+b") as file:
                file.write(content)
        return found

    monkeypatch.setattr(store.MappedFiles, "npy", meanwhile)
    with pytest.raises(DataError, match=r"00000/train\.tokens\.npy has been changed while it was"):
        next(store.read(home, 8, "train"))


def test_a_cache_that_cannot_be_written(prepare, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made.*config.data.cache or .FMJAX_CACHE"):
        prepare("a", cache=str(tmp_path / "file" / "cache"))


def test_several_processes_give_the_same_store(prepare, tmp_path):
    alone = prepare(TEXT, workers=1)
    several = prepare(TEXT, workers=2, cache=str(tmp_path / "several"))
    assert several.digest == alone.digest and several.counts == alone.counts
    assert not multiprocessing.active_children()


def test_row52_a_killed_worker_is_an_error_that_says_where(prepare, tmp_path):
    killed = []

    def kill():
        children = multiprocessing.active_children()
        if len(children) == 2 and not killed:  # once, with both up: none is gone in the meantime
            killed.append(children[0])
            os.kill(children[0].pid, signal.SIGKILL)

    with pytest.raises(DataError, match=r"died .*from .*corpus\.txt:\d+ on.*config\.data\.workers"):
        prepare(TEXT, workers=2, poll=kill)
    assert killed and not multiprocessing.active_children()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_row52_no_worker_outlives_a_killed_parent(tmp_path, letters):
    script = """
import multiprocessing, time
def poll():
    children = multiprocessing.active_children()
    if len(children) == 2:
        time.sleep(2)  # both are up
        print(*(child.pid for child in children), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
run(data={"workers": 2}, poll=poll)
"""
    process = start(script, tmp_path, letters)
    out, _ = process.communicate(timeout=60)
    workers = out.splitlines()[-1].split()
    assert process.returncode == -signal.SIGKILL and len(workers) == 2

    def alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
        except OSError:
            return False

    until = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, workers))
