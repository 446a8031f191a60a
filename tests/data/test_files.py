"""Files: what is read, and the answer to every bad input of RELIABILITY.md (rows 43 to 46)."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from fmjax.data import files, lines, readers, records, sources
from fmjax.data.settings import DataSettings
from fmjax.errors import ConfigError, DataError


@pytest.fixture
def read(tmp_path):
    """read(name, content, **config.data): the documents of one file, as (text, line) pairs."""

    def read(name, content, **settings):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        settings = {"name": "text", "train": str(path), "validation_fraction": 0.0} | settings
        found = sources.read(DataSettings(**settings), log=print).documents()
        cut = len(str(tmp_path)) + 1
        return [(d.text if d.split == "train" else d.bad, d.where[cut:]) for d in found]

    return read


def table(columns, path):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path.read_bytes()


# ---- what is read ----


def test_txt_by_document(read):
    text = "one\ntwo\n\n\n  \nthree\n"
    assert read("a.txt", text) == [("one\ntwo", "a.txt:1"), ("three", "a.txt:6")]
    by_line = [("one", "a.txt:1"), ("two", "a.txt:2"), ("three", "a.txt:6")]
    assert read("a.txt", text, document="line") == by_line
    assert read("a.txt", text, document="file") == [("one\ntwo\n\n\n  \nthree", "a.txt:1")]


def test_formats_agree(read, tmp_path):
    texts = ["one, two", 'quoted "three"', "fünf"]
    jsonl = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts)
    csv = 'n,text\n1,"one, two"\n1,"quoted ""three"""\n1,fünf\n'
    tsv = "n\ttext\n" + "".join(f"1\t{text}\n" for text in texts)
    parquet = table({"n": [1, 1, 1], "text": texts}, tmp_path / "t.parquet")
    found = {
        "a.jsonl": jsonl,
        "a.jsonl.gz": gzip.compress(jsonl.encode()),
        "a.csv": csv,
        "a.csv.gz": gzip.compress(csv.encode()),
        "a.tsv": tsv,
        "a.parquet": parquet,
    }
    for name, content in found.items():
        assert [text for text, _ in read(name, content)] == texts, name
    lines = csv.replace('three""', 'three""\nfour')
    assert [line for _, line in read("a.csv", lines)] == ["a.csv:2", "a.csv:3", "a.csv:5"]
    assert [line for _, line in read("a.parquet", parquet)][2] == "a.parquet:row 3"


def test_names_globs_and_lists(tmp_path):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text("x")

    def names(value):
        return [path.name for path in files.expand(value, "data.train")]

    both = f"{tmp_path}/b.txt, {tmp_path}/a.txt"
    assert names(f"{tmp_path}/*.txt") == ["a.txt", "b.txt"]
    assert names(both) == ["b.txt", "a.txt"]
    assert names((f"{tmp_path}/c.jsonl", f"{tmp_path}/*.txt")) == ["c.jsonl", "a.txt", "b.txt"]


def test_a_column_by_name_and_a_limit(read):
    lines = "".join(json.dumps({"body": str(i)}) + "\n" for i in range(5))
    assert [t for t, _ in read("a.jsonl", lines, columns="body", max_documents=2)] == ["0", "1"]


def test_equal_texts_fall_on_the_same_side():
    texts = [f"document {i}" for i in range(2000)]
    sides = [sources.split_of(text, 0.1) for text in texts]
    assert sides == [sources.split_of(text, 0.1) for text in texts]
    assert 0.07 < sides.count("validation") / 2000 < 0.13
    assert {sources.split_of(text, 0.0) for text in texts} == {"train"}


# ---- row 43: a broken line ----

BROKEN = '{"text": "a"}\n{"text": "b"\n{"text": "c"}\n'


def test_row43_a_broken_line_is_named(read):
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON .*config\.data\.on_bad_record"):
        read("a.jsonl", BROKEN)


def test_row43_skip_counts_and_quarantine_keeps(read, prepare, tmp_path):
    reason = "not JSON (Expecting ',' delimiter: line 1 column 13 (char 12))"
    assert read("a.jsonl", BROKEN, on_bad_record="skip") == [
        ("a", "a.jsonl:1"),
        (reason, "a.jsonl:2"),
        ("c", "a.jsonl:3"),
    ]
    lines = []
    path = tmp_path / "a.jsonl"
    dataset = prepare(path, on_bad_record="quarantine", log=lines.append)
    assert dataset.counts["bad_records"] == 1 and dataset.counts["train"]["documents"] == 2
    assert any("1 bad records left out" in line for line in lines)
    (kept,) = (tmp_path / "cache").glob("tokens-*/*/bad.jsonl")
    expected = {"where": f"{path}:2", "bad": reason, "text": '{"text": "b"'}
    assert json.loads(kept.read_text()) == expected
    skipped = prepare(path, on_bad_record="skip")
    assert skipped.counts["bad_records"] == 1


def test_row43_too_many_broken_lines_are_a_broken_file(read):
    content = '{"text": "a"}\n' + "oops\n" * (sources.MAX_BAD_RECORDS + 1)
    with pytest.raises(DataError, match=r"a\.jsonl:1002: .*bad record 1001.*broken"):
        read("a.jsonl", content, on_bad_record="skip")


@pytest.mark.parametrize(
    "line, reason",
    [
        ("[1]", "a JSON list, not an object"),
        ("[" * 100_000, "not JSON"),
        ('{"body": "x"}', "no column 'text' (config.data.columns, config.data.label), but 'body'"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_row43_other_broken_lines(read, line, reason):
    with pytest.raises(DataError) as error:
        read("a.jsonl", line + "\n")
    assert f"a.jsonl:1: {reason}" in str(error.value)


def test_row43_broken_csv(read):
    rows = "text,n\na,1\nb\nc,1,2\n"
    found = read("a.csv", rows, on_bad_record="skip")
    assert found == [
        ("a", "a.csv:2"),
        ("1 fields, the header has 2", "a.csv:3"),
        ("3 fields, the header has 2", "a.csv:4"),
    ]
    with pytest.raises(DataError, match=r"a\.csv:3: not CSV .*unexpected end"):
        read("a.csv", 'text\nfine\n"never closed\nmore\n')


# ---- row 44: missing things ----


def test_row44_a_missing_file_and_an_empty_pattern(read, tmp_path):
    (tmp_path / "train.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"config\.data\.train: there is no file.*'train\.txt'"):
        files.expand(f"{tmp_path}/trian.txt", "data.train")
    with pytest.raises(ConfigError, match=r"'.*\*\.jsonl' matches no file"):
        files.expand(f"{tmp_path}/*.jsonl", "data.train")
    with pytest.raises(ConfigError, match="is a folder. Give files, or a pattern"):
        files.expand(str(tmp_path), "data.train")
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ConfigError, match=r"unknown ending '\.docx'. Possible: \.txt"):
        files.expand(f"{tmp_path}/a.docx", "data.train")
    with pytest.raises(ConfigError, match="set config.data.train"):
        DataSettings(name="text")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("content", ["", "\n\n\r\n\n"])
def test_row44_an_empty_file_or_only_blank_lines(read, name, content):
    content = gzip.compress(content.encode()) if name.endswith(".gz") else content
    with pytest.raises(DataError, match="holds no document"):
        read(name, content)
    with pytest.raises(DataError, match="There is no text for the train split"):
        read(name, content, on_bad_record="skip")


def test_row44_only_empty_texts(read):
    with pytest.raises(DataError, match="no text for the train split.*3 documents"):
        read("a.jsonl", '{"text": ""}\n{"text": " "}\n{"text": "\\n"}\n')


def test_row44_empty_documents_are_counted(prepare, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n')
    assert prepare(path).counts["train"]["empty_documents"] == 1


def test_row44_a_missing_column(read, tmp_path):
    with pytest.raises(
        ConfigError, match="config.data.columns='text' is no column.*Possible: n, txt"
    ):
        read("a.csv", "txt,n\nx,1\n")
    with pytest.raises(ConfigError, match="config.data.columns='text' is no column.*'txt'"):
        read("a.parquet", table({"txt": ["x"]}, tmp_path / "t.parquet"))


def test_row44_null_and_other_values_are_not_text(read, tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:2: the value is null, not text"):
        read("a.jsonl", '{"text": "a"}\n{"text": null}\n')
    with pytest.raises(DataError, match=r"a\.parquet:row 2: the value is null, not text"):
        read("a.parquet", table({"text": ["x", None]}, tmp_path / "t.parquet"))


def test_row44_a_validation_file_needs_text_too(read, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no text for the validation split"):
        read("a.txt", "x", validation=str(tmp_path / "empty.jsonl"))


# ---- row 45: one row of another type ----


def test_row45_one_row_of_another_type(read, tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:3: the value is int, not text"):
        read("a.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": 3}\n')
    with pytest.raises(DataError, match="column 'text' .*holds int64, not text"):
        read("a.parquet", table({"text": [1, 2]}, tmp_path / "t.parquet"))


# ---- row 46: bytes ----


def test_row46_marks_and_line_ends_are_accepted(read):
    expected = [("one\ntwo", "a.txt:1"), ("three", "a.txt:4")]
    assert read("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n") == expected
    assert read("a.jsonl", b'\xef\xbb\xbf{"text": "x"}\r\n') == [("x", "a.jsonl:1")]
    assert read("a.csv", b"\xef\xbb\xbftext\r\nx\r\n") == [("x", "a.csv:2")]


def test_row46_only_a_line_feed_ends_a_line(read):
    text = "one\x0ctwo\u2028three\x85four\x0bfive"  # form feed, line separator, next line, tab
    assert read("a.txt", text, document="line") == [(text, "a.txt:1")]
    assert read("a.jsonl", json.dumps({"text": text}, ensure_ascii=False)) == [(text, "a.jsonl:1")]
    assert read("a.csv", "text\n" + text + "\n") == [(text, "a.csv:2")]


@pytest.mark.parametrize("name, head", [("a.txt", b""), ("a.jsonl", b""), ("a.csv", b"text\n")])
def test_row46_latin1_is_named_by_line_and_column(read, name, head):
    line = {"a.txt": b"caf\xe9", "a.jsonl": b'{"text": "caf\xe9"}', "a.csv": b"caf\xe9"}[name]
    number = head.count(b"\n") + 1
    with pytest.raises(
        DataError, match=rf"{name}:{number}: byte 0xe9 at column .* not UTF-8.*iconv"
    ):
        read(name, head + line + b"\n")
    good = {"a.txt": b"\nfine", "a.jsonl": b'{"text": "fine"}', "a.csv": b"fine"}[name]
    found = read(name, head + line + b"\n" + good + b"\n", on_bad_record="skip")
    assert [text for text, _ in found if text == "fine"] == ["fine"] and len(found) == 2


def test_row46_nul_and_lone_surrogates(read, tmp_path):
    with pytest.raises(DataError, match=r"a\.txt:2: NUL character"):
        read("a.txt", "fine\nnot\0fine\n")
    with pytest.raises(DataError, match=r"a\.txt:1: byte 0xff at column 1"):
        read("a.txt", "sixteen".encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.jsonl:1: lone surrogate at character 1"):
        read("a.jsonl", '{"text": "a\\ud800b"}\n')
    assert read("a.jsonl", '{"text": "\\ud83d\\ude00"}\n') == [("😀", "a.jsonl:1")]


def test_row46_a_line_beyond_the_limit(read, monkeypatch):
    for module in (lines, readers, records):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1000)
    long = '{"text": "' + "x" * 5000 + '"}\n'
    with pytest.raises(DataError, match=r"a\.jsonl:1: a line of 5,013 bytes, the limit is 1,000"):
        read("a.jsonl", long)
    found = read("a.jsonl", long + '{"text": "y"}\n', on_bad_record="skip")
    assert found[1] == ("y", "a.jsonl:2")
    text = ("x" * 99 + "\n") * 11
    with pytest.raises(DataError, match=r"a\.txt:1: a document of more than 1,000 bytes"):
        read("a.txt", text)
    assert len(read("a.txt", text, document="line")) == 11
    with pytest.raises(DataError, match="not CSV .*field larger than field limit"):
        read("a.csv", "text\n" + '"' + text + '"\n')


def test_row46_a_decompression_bomb_is_stopped_early(read, tmp_path):
    bomb = gzip.compress(b'{"text": "' + b"x" * 100_000_000 + b'"}')
    assert len(bomb) < 100_000
    with pytest.raises(DataError, match=r"bytes unpack to more than .* decompression bomb"):
        read("a.jsonl.gz", bomb, on_bad_record="skip")


CUT = gzip.compress(b"text" * 1000)[:-9]


@pytest.mark.parametrize("content", [b"plain", CUT], ids=["not gzip", "cut short"])
def test_row46_a_damaged_gzip_file(read, content):
    with pytest.raises(DataError, match=r"a\.txt\.gz: not a whole gzip file .*config\.data\.train"):
        read("a.txt.gz", content)


def test_row46_not_parquet(read):
    with pytest.raises(DataError, match="not readable as parquet"):
        read("a.parquet", b"PAR1 but no more")
