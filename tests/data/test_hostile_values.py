"""Values that others wrote: each fault is a bad record with its place, in one line."""

import json

import numpy as np
import pytest

from fmjax.data import files, json_files, lines, sources
from fmjax.data.settings import DataSettings
from fmjax.errors import DataError, quoted
from fmjax.evaluation import benchmarks, prompt_templates
from fmjax.tasks import translate


@pytest.fixture
def documents(tmp_path):
    """documents(name, content, **config.data): of a file, with the bad records left out as told."""

    def documents(name, content, **settings):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        settings = {"name": "text", "train": str(path), "validation_fraction": 0.0} | settings
        return list(sources.read(DataSettings(**settings), log=print).documents())

    return documents


def one_line(error, most=800):
    message = str(error.value)
    return "\n" not in message and len(message) < most


# ---- numbers ----

VALUES = dict(format="values", long="truncate")
NOT_OF_32_BITS = {
    "1 and 400 zeros": "1" + "0" * 400,
    "the same negative": "-1" + "0" * 400,
    "a text of 5,000 digits": json.dumps("1" + "0" * 5000),
    "1e39": "1e39",
    "1e400": "1e400",
    "a text 1e39": '"1e39"',
    "NaN": "NaN",
    "Infinity": "Infinity",
    "true": "true",
    "deep": "[" * 900 + "]" * 900,
}


@pytest.mark.parametrize("number", NOT_OF_32_BITS.values(), ids=NOT_OF_32_BITS)
def test_row43_a_number_that_32_bits_do_not_hold(documents, number):
    rows = ['{"text": "a", "label": 1.5}', f'{{"text": "b", "label": {number}}}']
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 'label': .* finite number of 32") as e:
        documents("a.jsonl", "\n".join(rows), **VALUES)
    assert one_line(e)
    found = documents("a.jsonl", "\n".join(rows), on_bad_record="skip", **VALUES)
    assert [d.split for d in found] == ["train", "bad"]


def test_the_largest_numbers_of_32_bits_are_kept(documents):
    largest = np.finfo(np.float32).max
    beyond = float(np.nextafter(2.0**128 - 2.0**103, 0))  # rounds to the largest, not to infinity
    rows = [json.dumps({"text": "a", "label": x}) for x in (float(largest), beyond, -beyond, 1e-50)]
    labels = [d.fields["label"] for d in documents("a.jsonl", "\n".join(rows), **VALUES)]
    stored = np.array(labels, np.float32)
    np.testing.assert_array_equal(stored, np.float32([largest, largest, -largest, 0]))
    with pytest.raises(DataError, match="a finite number of 32 bits"):
        documents("a.jsonl", json.dumps({"text": "a", "label": 2.0**128 - 2.0**103}), **VALUES)


def test_labels_of_thousands_of_digits(prepare, tmp_path):
    """Python's int() refuses more than 4,300 digits; messages repeat none of them in full."""
    path = tmp_path / "a.jsonl"
    settings = dict(format="classes", long="truncate", columns="text")
    write = lambda labels: path.write_text(
        "".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels)
    )
    long = ["1" + "0" * 5000, "2" + "0" * 5000]
    write([*long, "3"])
    assert prepare(path, **settings).labels == (*sorted([*long, "3"]),)
    with pytest.raises(DataError, match=r"a\.jsonl:1: the label '1000.*config\.data\.classes") as e:
        prepare(path, classes=("3", "4"), **settings)
    assert one_line(e, 1500)
    write(long[:1])
    with pytest.raises(DataError, match="All examples have the label") as e:
        prepare(path, **settings)
    assert one_line(e)
    path.write_text(json.dumps({"text": "a", "ends": ["x", "y"], "label": "1" * 5000}))
    with pytest.raises(DataError, match=r"a\.jsonl:1: the label '111.* is no number of a") as e:
        prepare(path, **settings | {"format": "choices", "columns": "text,ends"})
    assert one_line(e)


def test_errors_quote_what_cannot_be_shown():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert quoted(deep) == "a list too large to be shown"
    assert "too large to be shown" in quoted(10**5000)


# ---- other encodings ----


@pytest.mark.parametrize("encoding", ["big5", "gb18030", "cp1251", "shift_jis", "euc_kr", "cp1252"])
def test_bytes_of_another_encoding_are_not_called_latin1(documents, encoding):
    text = {"cp1251": "русский", "cp1252": "é", "euc_kr": "한국어"}.get(encoding, "春眠")
    with pytest.raises(DataError, match=r"a\.txt:1: byte 0x.. at .* is not UTF-8 .*iconv") as e:
        documents("a.txt", text.encode(encoding))
    assert "latin1" not in str(e.value) and "-f ENCODING" in str(e.value)
    assert encoding.replace("_", "-" if encoding == "euc_kr" else "_") in str(e.value)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.json", "a.conll"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_mark_at_the_beginning_names_the_encoding(documents, name, encoding):
    content = f"\ufeff{json.dumps({'text': 'words'})}\n".encode(encoding)
    more = {"format": "tags", "long": "truncate"} if name == "a.conll" else {}
    general = encoding[:6]
    with pytest.raises(DataError, match=rf"UTF-8: the file begins .*iconv -f {general} -t utf-8"):
        documents(name, content, **more)


# ---- JSON ----


def test_a_json_file_with_one_record_a_line_is_read(documents):
    """As `datasets` and pandas call such a file."""
    texts = lambda found: [d.text for d in found]
    rows = [json.dumps({"text": f"row {i}", "data": i}) for i in range(3)]
    assert texts(documents("a.json", "\n".join(rows))) == ["row 0", "row 1", "row 2"]
    assert texts(documents("a.json", "\n\n" + "\r\n".join(rows) + "\n")) == texts(
        documents("a.jsonl", "\n".join(rows))
    )
    assert texts(documents("a.json", '{"text": "alone"}\n')) == ["alone"]
    assert texts(documents("a.json", '[{"text": "a"},\n{"text": "b"}]')) == ["a", "b"]
    with pytest.raises(DataError, match=r"a\.json:2: not JSON"):
        documents("a.json", '{"text": "a"}\n{"text":\n')


def test_lines_of_a_json_file_have_no_limit_together(documents, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 100)
    rows = [json.dumps({"text": f"row {i}"}) for i in range(50)]
    assert len(documents("a.json", "\n".join(rows))) == 50
    with pytest.raises(DataError, match="more than 100 bytes of JSON"):
        documents("a.json", f"[{','.join(rows)}]")


SPANS = dict(format="spans", columns="question,context", label="answers", long="split", stride=4)
QUESTION = {"question": "x", "answers": []}


def squad(*asked, context="a"):
    return {"data": [{"paragraphs": [{"context": context, "qas": list(asked)}]}]}


ODD = {
    "a question a text": squad("x"),
    "a question null": squad(None),
    "a question a list": squad([1, 2]),
    "questions an object": {"data": [{"paragraphs": [{"context": "a", "qas": QUESTION}]}]},
    "answers a number": squad(QUESTION | {"answers": 5}),
    "a context a number": squad(QUESTION, context=7),
    "an article a list": {"data": [[]]},
    "data an object": {"data": {"paragraphs": []}},
    "data a text": {"data": "x"},
    "data null": {"data": None},
    "null": None,
    "a number": 5,
    "a text": "x",
    "a list of numbers": [5],
    "a list of lists": [[]],
}


@pytest.mark.parametrize("shape", ODD.values(), ids=ODD)
def test_files_of_questions_of_another_shape(documents, shape):
    with pytest.raises(DataError, match=r"a\.json:[^ ]") as error:
        documents("a.json", json.dumps(shape), **SPANS)
    assert one_line(error)


def test_a_question_whose_id_is_no_text(documents):
    found = documents("a.json", json.dumps(squad(QUESTION | {"id": {"a": 1}})), **SPANS)
    assert found[0].where.endswith("a.json:question 1")


@pytest.mark.parametrize("start", [True, -1, 1.0, "0", None])
def test_the_place_of_an_answer_is_a_whole_number(documents, start):
    answers = {"text": ["b"], "answer_start": [start]}
    row = {"question": "x", "context": "ab", "answers": answers}
    with pytest.raises(DataError, match=r"a\.jsonl:1: column 'answers': the value is not {'text'"):
        documents("a.jsonl", json.dumps(row), **SPANS)


DEEP = {
    "unclosed": "[" * 100_000,
    "closed": "[" * 100_000 + "]" * 100_000,
    "in a field": '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "not too deep for the parser": '{"text": ' + "[" * 950 + "]" * 950 + "}",
    "objects": '{"a": ' * 50_000,
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_deep_nesting_is_a_bad_record(documents, name, text):
    content = f'{{"text": "fine"}}\n{text}\n' if name == "a.jsonl" else f"[{text}]"
    with pytest.raises(DataError, match=rf"{name}:") as error:
        documents(name, content)
    assert one_line(error)
    if name == "a.jsonl":
        found = documents(name, content, on_bad_record="quarantine")
        assert [d.split for d in found] == ["train", "bad"] and len(found[1].text) <= 1000


@pytest.mark.parametrize(
    "row",
    [
        json.dumps({"x" * 3_000_000: 1}),
        json.dumps({f"k{i}": i for i in range(50_000)}),
        json.dumps({"x" * 100_000 + str(i): i for i in range(10)}),
    ],
    ids=["a long key", "many keys", "long keys"],
)
def test_messages_about_keys_are_bounded(documents, row):
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column 'text'") as error:
        documents("a.jsonl", row)
    assert one_line(error, 2500)


@pytest.mark.parametrize(
    "message",
    [{"x" * 10_000: 1}, {"role": "x" * 10_000, "content": "a"}, {"role": ["user"], "content": "a"}],
)
def test_messages_about_messages_are_bounded(documents, message):
    row = json.dumps({"messages": [message]})
    with pytest.raises(DataError, match=r"a\.jsonl:1: message 1: ") as error:
        documents("a.jsonl", row, format="chat", columns="messages", long="drop")
    assert one_line(error)


# ---- benchmarks and sources of other tasks ----

CHOICES = '{"context": "a", "choices": ["x", "y"], "label": %s}'


@pytest.mark.parametrize(
    "row",
    [
        CHOICES % "1e400",
        CHOICES % "Infinity",
        CHOICES % "NaN",
        CHOICES % ("1" + "0" * 4000),
        CHOICES % ("[" * 100_000),
        '{"context": "a", "context": "b", "choices": ["x", "y"], "label": 0}',
        "[1]",
        "\0",
        '"' + "x" * 100_000 + '"',
    ],
)
def test_a_row_that_is_no_question(tmp_path, row):
    (tmp_path / "a.jsonl").write_text((CHOICES % 0) + "\n" + row + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2") as error:
        benchmarks.items("choices", tmp_path / "a.jsonl")
    assert one_line(error)


@pytest.mark.parametrize(
    "row",
    [
        '{"s": [1], "t": "a"}',
        '{"s": "a", "t": null}',
        '{"s": "a", "s": "b", "t": "c"}',
        "[" * 10**5,
    ],
)
def test_a_row_that_cannot_be_translated(tmp_path, row):
    (tmp_path / "a.jsonl").write_text('{"s": "a", "t": "b"}\n' + row + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2") as error:
        translate.read(str(tmp_path / "a.jsonl"), "s", "t")
    assert one_line(error)


def test_a_glue_file_with_a_column_twice_or_a_long_field(tmp_path):
    path = tmp_path / "sst2.tsv"
    path.write_text("sentence\tlabel\tsentence\na\t1\tb\n")
    with pytest.raises(DataError, match="'sentence' twice"):
        list(prompt_templates.glue("sst2", path))
    path.write_text("sentence\tlabel\n" + "x" * 200_000 + "\t1\n")  # csv's own limit is 131,072
    (row,) = prompt_templates.glue("sst2", path)
    assert len(row.columns["sentence"]) == 200_000


def test_files_of_other_tasks_that_cannot_be_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"not a whole gzip file .*config\.benchmark\.path"):
        benchmarks.items("choices", tmp_path / "a.jsonl.gz")
    with pytest.raises(DataError, match=r"not a whole gzip file .*config\.file"):
        translate.read(str(tmp_path / "a.jsonl.gz"), "s", "t")
    with pytest.raises(DataError, match=r"cannot be read \(No such file.*config\.benchmark\.path"):
        list(prompt_templates.glue("sst2", tmp_path / "none.tsv"))


def test_a_file_that_goes_away(tmp_path):
    settings = DataSettings(name="text", train="x")
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read \(No such file"):
        list(files.records([tmp_path / "gone.txt"], settings, "data.train"))
    assert lines.mark_of(b"words") == ""
