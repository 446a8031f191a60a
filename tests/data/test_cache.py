"""The cache folder: damage of every file is seen, killed preparations leave nothing behind."""

import json
import os
import random

import numpy as np
import pytest

from fmjax.errors import ConfigError, DataError
from fmjax.evaluation import benchmarks
from fmjax.io import disk_cache, sealed
from fmjax.tasks import translate


def made(folder):
    def write(temporary):
        (temporary / "numbers").write_bytes(b"12345")
        return {"counts": {"train": 3}, "labels": ["no", "yes"]}

    return disk_cache.build(folder, write)


def test_the_index_is_read_as_it_was_written(tmp_path):
    index = made(tmp_path / "home")
    assert disk_cache.verified(tmp_path / "home", pytest.fail) == index
    assert index["files"] == {"numbers": [5, disk_cache.file_digest(tmp_path / "home/numbers")]}


@pytest.mark.parametrize("name", ["index.json", "numbers"])
def test_every_flipped_bit_is_seen(tmp_path, name):
    made(tmp_path / "home")
    file, lines = tmp_path / "home" / name, []
    content = file.read_bytes()
    for bit in range(0, 8 * len(content), 3):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert disk_cache.verified(tmp_path / "home", lines.append) is None, bit
        assert "is damaged" in lines[-1] and len(lines[-1].splitlines()) == 1
    file.write_bytes(content)
    assert disk_cache.verified(tmp_path / "home", lines.append)


SHAPES = {
    "list": [],
    "number": 5,
    "null": None,
    "text": "x",
    "no files": {},
    "files a list": {"files": []},
    "a file a number": {"files": {"a": 5}},
    "a file without digest": {"files": {"a": [1]}},
    "a file elsewhere": {"files": {"../../secret": [6, "00"]}},
    "a name of no file": {"files": {"a\0b": [1, "00"]}},
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_index_of_another_shape_is_made_again(tmp_path, shape, whole):
    home, lines = tmp_path / "home", []
    before = made(home)
    can_seal = whole and isinstance(shape, dict)
    raw = sealed.dumps(shape) if can_seal else json.dumps(shape).encode()
    (home / disk_cache.INDEX).write_bytes(raw)
    assert disk_cache.verified(home, lines.append) is None and len(lines) == 1
    assert made(home) == before == disk_cache.verified(home, pytest.fail)


@pytest.mark.parametrize("place", ["file", "dead link", "folder as index", "nested", "not UTF-8"])
def test_what_is_not_a_folder_with_an_index_is_made_again(tmp_path, place):
    home = tmp_path / "home"
    if place == "file":
        home.write_text("a file in its place")
    elif place == "dead link":
        home.symlink_to("/nonexistent/x")
    else:
        made(home)
        (home / disk_cache.INDEX).unlink()
        if place == "folder as index":
            (home / disk_cache.INDEX).mkdir()
        else:
            (home / disk_cache.INDEX).write_bytes(b"[" * 100_000 if place == "nested" else b"\xff")
    assert disk_cache.verified(home, lambda line: None) is None
    assert made(home) == disk_cache.verified(home, pytest.fail)


def test_a_file_that_a_bad_disk_does_not_give_is_made_again(tmp_path, monkeypatch):
    made(tmp_path / "home")

    def fail(path, poll):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk_cache, "file_digest", fail)
    lines = []
    assert disk_cache.verified(tmp_path / "home", lines.append) is None
    assert "Input/output error" in lines[0] and "preparing it again" in lines[0]


@pytest.mark.parametrize("format", ["packed", "padded", "classes"])
def test_what_was_prepared_is_found_again(prepare, tmp_path, monkeypatch, format):
    (tmp_path / "a.jsonl").write_text('{"text": "ab.", "label": 0}\n{"text": "cd.", "label": 1}\n')
    first, lines = prepare(tmp_path / "a.jsonl", format=format, long="truncate"), []
    monkeypatch.setattr(disk_cache, "build", lambda *_: pytest.fail("it is prepared again"))
    again = prepare(tmp_path / "a.jsonl", format=format, long="truncate", log=lines.append)
    assert again.digest == first.digest and not any("again" in line for line in lines)


SPLITS = {
    "packed": ("ab. cd.", {}),
    "pairs": ("ab. Cd.\n\nef. Gh.", {}),
    "classes": ('{"text": "ab.", "label": 0}\n{"text": "cd.", "label": 1}\n', {}),
    "spans": (
        '{"question": "ab", "context": "cd", "answers": {"text": ["cd"], "answer_start": [0]}}\n',
        {"columns": "question,context", "label": "answers", "stride": 2},
    ),
}


@pytest.mark.parametrize("format", SPLITS)
def test_a_file_that_changes_while_it_is_read_is_an_error(prepare, tmp_path, format):
    """Its bytes are right again at the end: what counts is that they were read in between."""
    text, settings = SPLITS[format]
    file = tmp_path / ("a.txt" if text.startswith("ab") else "a.jsonl")
    file.write_text(text)
    long = "split" if format in ("packed", "pairs", "spans") else "truncate"
    read = lambda: prepare(file, format=format, long=long, **settings).splits["train"]
    split, index = read(), np.arange(1)
    rows = split.rows(index)
    watched = [(split._files, lambda split: split.rows(index))]
    if format == "spans":
        watched.append((split.questions._files, lambda split: split.questions.read([0])))
    names = [(name, use) for files, use in watched for name, _, _ in files._opened]
    assert names, "no file is watched"
    for name, use in names:
        split, path = read(), split._files.folder / name
        content = path.read_bytes()
        with path.open("r+b") as opened:
            opened.write(bytes([content[0] ^ 1]))
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name} has been changed while it was read"):
            use(split)
    split = read()
    for path in split._files.folder.iterdir():  # whoever has it open still has it
        path.unlink()
    np.testing.assert_array_equal(split.rows(index)["input_ids"], rows["input_ids"])


@pytest.mark.parametrize("damage", ["cut", "nonsense"])
@pytest.mark.parametrize("format", SPLITS)
def test_a_file_that_is_cut_or_overwritten_is_named(prepare, tmp_path, format, damage):
    """Read beyond its end a memory map ends the process, and nonsense is no index of anything."""
    text, settings = SPLITS[format]
    file = tmp_path / ("a.txt" if text.startswith("ab") else "a.jsonl")
    file.write_text(text)
    long = "split" if format in ("packed", "pairs", "spans") else "truncate"
    read = lambda: prepare(file, format=format, long=long, **settings).splits["train"]
    uses = [lambda split: split.rows(np.arange(1)), lambda split: split.widths(np.arange(1))]
    if format in ("classes", "spans"):
        uses.append(lambda split: split.extent(np.arange(1)))
    for name in [name for name, _, _ in read()._files._opened]:
        for use in uses if name.endswith("ends.npy") else uses[:1]:
            split = read()
            path = split._files.folder / name
            with path.open("r+b") as opened:
                if damage == "cut":
                    opened.truncate(0)
                else:
                    opened.write(b"\xff" * path.stat().st_size)
            with pytest.raises(DataError, match=f"{name} has been changed while it was read"):
                use(split)


def test_questions_that_are_cut_are_named(prepare, tmp_path):
    text, settings = SPLITS["spans"]
    (tmp_path / "a.jsonl").write_text(text)
    read = lambda: prepare(tmp_path / "a.jsonl", format="spans", **settings).splits["train"]
    for part, use in {
        "offsets": lambda asked: asked.offsets(0),
        "windows.npy": lambda asked: asked.of(0),
        "questions.jsonl": lambda asked: asked.read([0]),
    }.items():
        split = read()
        os.truncate(split._files.folder / f"train.{part}", 0)
        with pytest.raises(DataError, match=f"train.{part} has been changed while it was read"):
            use(split.questions)


def test_flips_in_a_prepared_set_change_no_numbers(prepare, tmp_path):
    words = {"vocab_size": 100, "kind": "char"}
    rows = lambda dataset: dataset.splits["train"].rows(np.arange(len(dataset.splits["train"])))
    first = prepare("ab. cd.\n\nef. gh.", tokenizer=words)
    files = sorted(path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock")
    rng = random.Random(0)
    for path in (path for path in files if path.is_file()):
        content = bytearray(path.read_bytes())
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        lines = []
        again = prepare("ab. cd.\n\nef. gh.", tokenizer=words, log=lines.append)
        assert again.vocab.mask_id == first.vocab.mask_id and again.digest == first.digest
        np.testing.assert_array_equal(rows(again)["input_ids"], rows(first)["input_ids"])


def test_what_is_stored_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(disk_cache.manifest, "sync", lambda path: synced.append(os.fspath(path)))
    made(tmp_path / "home")
    temporary = f"{tmp_path}/home.tmp-{os.getpid()}"
    inside = [f"{temporary}/numbers", f"{temporary}/index.json", temporary]
    assert synced == [*inside, str(tmp_path)]


# ---- killed preparations ----


def test_leftovers_of_killed_preparations_are_removed(prepare, tmp_path):
    prepare("a b.")
    root = tmp_path / "cache"
    (home,) = (path.name for path in root.glob("tokenizer-*") if path.is_dir())
    dead = [f"{home}.tmp-1", f"{home}.tmp-77", "examples-0123456789abcdef.tmp-5"]
    for name in dead:
        (root / name / "files").mkdir(parents=True)
        (root / name / "files" / "tokens").write_text("gigabytes")
    prepare("a b.")
    assert not list(root.glob("*.tmp-*"))


def test_what_another_process_makes_right_now_is_left_alone(tmp_path):
    making = tmp_path / "examples-0123456789abcdef.tmp-5"
    making.mkdir()
    with disk_cache.lock(tmp_path / "examples-0123456789abcdef.lock", print, lambda: None):
        disk_cache.remove_leftovers(tmp_path)
        assert making.is_dir()
    disk_cache.remove_leftovers(tmp_path)
    assert not making.exists()


# ---- a user without a home ----


def test_a_user_that_the_system_does_not_know(tmp_path, monkeypatch):
    """As in containers that run with any user id."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "FMJAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    for folder in ("", "~/mine", "~nobody-of-this-name/x"):
        with pytest.raises(DataError, match=r"no home folder.*config\.data\.cache or .FMJAX_CACHE"):
            disk_cache.root(folder)
    with pytest.raises(ConfigError, match="no such file"):
        benchmarks.items("choices", "~/questions.jsonl")
    with pytest.raises(ConfigError, match="no such file"):
        translate.read("~/texts.jsonl", "source", "target")
    assert not list(tmp_path.iterdir())
    assert disk_cache.root(str(tmp_path / "cache")).is_dir()
