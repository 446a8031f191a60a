"""Extractive questions: windows and their labels worked out by hand, the way back, bad inputs."""

import gzip
import json

import numpy as np
import pytest

from fmjax.data import spans
from fmjax.errors import ConfigError, DataError

CLS, SEP = 2, 3
SPANS = dict(format="spans", columns="question,context", label="answers", long="split", stride=2)


@pytest.fixture
def asked(prepare, tmp_path):
    """asked(qas, context, **config.data): a SQuAD file of one context, prepared; rows of 9."""

    def asked(qas, context="abcd efgh", name="a.json", **settings):
        squad = {"version": "2", "data": [{"paragraphs": [{"context": context, "qas": qas}]}]}
        content = json.dumps(squad).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        return prepare(path, **SPANS | dict(seq_len=9) | settings)

    return asked


def question(text="z", *answers, **more):
    found = [{"text": word, "answer_start": start} for start, word in answers]
    return {"id": "q1", "question": text, "answers": found} | more


def rows(dataset):
    split = dataset.splits["train"]
    return split, split.rows(np.arange(len(split)))


def test_a_long_context_is_cut_into_windows_that_share_tokens(asked):
    """Five tokens of context fit beside [CLS] z [SEP] … [SEP]; two of them come again."""
    split, batch = rows(asked([question("z", (3, "d ef"))]))
    expected = [
        [CLS, 30, SEP, 5, 6, 7, 8, 9, SEP],  # abcd e
        [CLS, 30, SEP, 8, 9, 10, 11, 12, SEP],  # d efgh
    ]
    np.testing.assert_array_equal(batch["input_ids"], expected)
    np.testing.assert_array_equal(batch["token_types"][0], [0, 0, 0, 1, 1, 1, 1, 1, 1])
    # Of "d ef" the first window has a part, which is no answer; the second all.
    np.testing.assert_array_equal(batch["labels"], [[0, 0], [3, 5]])
    assert batch["labels"].dtype == np.int32 and len(split.questions) == 1
    offsets = split.questions.offsets(1)
    np.testing.assert_array_equal(offsets[2:5], [[-1, -1], [3, 4], [5, 6]])
    assert offsets[5][1] == 7 and split.questions.read([0])[0].context[3:7] == "d ef"


def test_the_first_answer_is_learned_and_all_are_kept(asked):
    split, batch = rows(asked([question("z", (0, "a"), (2, "c")), question("y", (1, "b"))], "abc"))
    np.testing.assert_array_equal(batch["labels"], [[3, 3], [4, 4]])
    assert [split.questions.of(row) for row in (0, 1)] == [0, 1]
    found = split.questions.read([1, 0])
    assert found[0].answers == ["a", "c"] and found[1].answers == ["b"]
    assert found[0].where.endswith("a.json:q1")


def test_without_an_answer_the_label_is_cls(asked):
    plausible = question("z", (0, "a"), is_impossible=True)
    _, batch = rows(asked([plausible, question("z", (0, "a"))], "abc"))
    np.testing.assert_array_equal(batch["labels"], [[0, 0], [3, 3]])
    split, batch = rows(asked([{"question": "z"}], "abc", label=""))
    assert "labels" not in batch and split.questions.read([0])[0].answers == []
    assert split.questions.read([0])[0].where.endswith("a.json:question 1")


def test_gzipped_and_as_jsonl(asked, prepare, tmp_path):
    qas = [question("z", (3, "d ef"))]
    record = {"question": "z", "context": "abcd efgh", "answers": qas[0]["answers"]}
    hub = {"answers": {"text": ["d ef"], "answer_start": [3]}}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record | hub) + "\n")
    _, first = rows(asked(qas, name="a.json.gz"))
    _, second = rows(prepare(tmp_path / "a.jsonl", **SPANS, seq_len=9))
    for key in first:
        np.testing.assert_array_equal(np.tile(first[key], (2, 1)), second[key])


def test_several_tokens_of_one_character():
    """Pieces of a byte-level tokenizer: the answer is all of them."""
    offsets = np.array([[-1, -1], [0, 1], [1, 2], [1, 2], [2, 3]])
    assert spans.labels((1, "é"), [offsets]) == [(2, 3)]
    assert spans.labels((3, "x"), [offsets]) == [(0, 0)]


def test_a_long_context_may_be_cut_or_left_out(asked):
    qas, record = [question("z", (6, "f"))], question("z", (0, "a"))
    dataset = asked(qas, long="truncate")
    _, batch = rows(dataset)
    np.testing.assert_array_equal(batch["labels"], [[0, 0]])
    assert dataset.counts["train"]["truncated_documents"] == 1
    with pytest.raises(DataError, match="no rows: 0 documents.*1 dropped documents"):
        asked(qas, long="drop")
    assert len(rows(asked([record], "abc", long="drop"))[1]["labels"]) == 1


def test_all_questions_of_a_context_are_in_one_split(prepare, tmp_path):
    paragraphs = [
        {
            "context": chr(97 + i) * 3,
            "qas": [question(chr(97 + k), (0, chr(97 + i))) for k in range(4)],
        }
        for i in range(20)
    ]
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    found = prepare(tmp_path / "a.json", **SPANS, validation_fraction=0.5).splits
    contexts = [
        {q.context for q in split.questions.read(range(len(split.questions))).values()}
        for split in (found["train"], found["validation"])
    ]
    assert not contexts[0] & contexts[1] and all(contexts)


@pytest.mark.parametrize(
    "qas, settings, said",
    [
        (
            [question("z", (1, "a"))],
            {},
            "a.json:q1: the answer 'a' does not stand at character 1.*'b'",
        ),
        ([question("z", (90, "a"))], {}, "'a' does not stand at character 90 .*'' is"),
        ([question("z", (0, ""))], {}, "the answer '' does not stand"),
        ([question("z", (0, "a"), (0, "x"))], {}, "the answer 'x' does not stand"),
        ([question("zyxw", (0, "a"))], {}, "a.json:q1: beside its question of 4 tokens.*stride=2"),
        ([question("z", (0, "a"))], dict(stride=5), "of 1 tokens.*seq_len=9.*stride=5"),
        ([question(7, (0, "a"))], {}, "column 'question': the value is int, not text"),
        ([{"question": "z", "answers": 3}], {}, "column 'answers': the value is not {'text'"),
        ([{"question": "z"}], {}, "no column 'answers'"),
        ([{"answers": []}], {}, r"nor SQuAD's JSON.*KeyError\('question'\)"),
        (3, {}, "no array, nor SQuAD's JSON.*TypeError"),
        ([question("z", (6, "f"))], dict(long="error"), "longer than config.data.seq_len"),
    ],
)
def test_bad_questions_name_their_place(asked, qas, settings, said):
    with pytest.raises(DataError, match=said):
        asked(qas, **settings)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"{", r"not JSON \("),
        (b"[" * 10**5, "not JSON"),
        (b"\xff", "byte 0xff at column 1 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_json(prepare, tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match="a.json:1: .*" + said):
        prepare(tmp_path / "a.json", **SPANS)


def test_a_json_file_without_questions(asked, prepare, tmp_path):
    with pytest.raises(DataError, match="the file holds no document"):
        asked([])
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="the file holds no document"):
        prepare(tmp_path / "a.json", **SPANS)


def test_a_bomb_is_refused(prepare, tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b" " * (1 << 25)))
    with pytest.raises(DataError, match="a decompression bomb"):
        prepare(tmp_path / "a.json.gz", **SPANS)


def test_spans_need_two_columns(asked):
    with pytest.raises(ConfigError, match="format='spans' needs 2 different columns"):
        asked([question()], columns="context")
