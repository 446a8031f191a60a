"""Sentence pairs: by hand, then that nothing but the text tells the label."""

import json

import numpy as np
import pytest

from fmjax.data import pairs
from fmjax.errors import DataError

CLS, SEP = 2, 3


def read(split, draws=20, seed=0):
    """Every anchor `draws` times."""
    index = np.tile(np.arange(len(split)), draws)
    return split.rows(index, np.arange(len(index)), seed)


def halves(batch):
    """(A, B) of every row, as tuples of ids."""
    for ids, types, real in zip(
        batch["input_ids"], batch["token_types"], batch["segment_ids"], strict=True
    ):
        used = int(real.sum())
        b = int(types.sum())
        a = used - b
        assert ids[0] == CLS and ids[a - 1] == SEP and ids[used - 1] == SEP
        assert (real[:used] == 1).all() and (types[:a] == 0).all() and not ids[used:].any()
        yield tuple(ids[1 : a - 1].tolist()), tuple(ids[a : used - 1].tolist())


def sentence(text):
    return tuple(31 if c == "." else ord(c) - ord("a") + 5 for c in text if not c.isspace())


def test_anchors_by_hand():
    # Sentences of 4, 4, 4 and 2 tokens, then a document of 3 and 3: at most 9 tokens an anchor.
    # The second document is filled from its end, which here makes no difference.
    sentences = np.array([0, 4, 8, 12, 14, 17, 20])
    first, number, document = pairs.anchors(sentences, np.array([0, 4, 6]), 9)
    assert first.tolist() == [0, 2, 4]
    assert number.tolist() == [2, 2, 2]
    assert document.tolist() == [0, 0, 1]


def test_every_other_document_is_filled_from_its_end():
    # Twice five sentences of 3 tokens, two to an anchor: one is left over, at the end or beginning.
    sentences = np.arange(11) * 3
    first, number, document = pairs.anchors(sentences, np.array([0, 5, 10]), 8)
    assert first.tolist() == [0, 2, 6, 8] and (number == 2).all()


@pytest.fixture
def two(prepare, tmp_path):
    """Two documents of two sentences of three tokens (an empty line ends a sentence)."""
    path = tmp_path / "two.jsonl"
    path.write_text('{"text": "ab.\\n\\ncd."}\n{"text": "xy.\\n\\nzw."}\n')
    return lambda **settings: prepare(path, format="pairs", seq_len=12, **settings)


def test_pairs_by_hand(two):
    # Each document gives one anchor with one cut, and a negative can only be the other's end.
    batch = read(two().splits["train"])
    expected = {
        0: [("ab.", "cd."), ("xy.", "zw.")],
        1: [("ab.", "zw."), ("xy.", "cd.")],
    }
    for i, half in enumerate(halves(batch)):
        a, b = expected[int(batch["labels"][i])][i % 2]
        assert half == (sentence(a), sentence(b))
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0]
    assert batch["token_types"][0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert two().format == "pairs-12-nsp" and two(pair="sop").format == "pairs-12-sop"


def test_sop_by_hand(two):
    batch = read(two(pair="sop").splits["train"])
    for i, half in enumerate(halves(batch)):
        a, b = [("ab.", "cd."), ("xy.", "zw.")][i % 2]
        ordered = (sentence(a), sentence(b))
        assert half == (ordered[::-1] if batch["labels"][i] else ordered)


@pytest.fixture
def books(prepare, tmp_path):
    """Forty documents of sentences whose letters name the document and the sentence."""
    path = tmp_path / "books.jsonl"
    rng = np.random.default_rng(0)
    lines, documents = [], {}
    for d in range(40):
        mark = chr(97 + d % 26) + ("a" if d < 26 else "b")
        found = []
        for s in range(rng.integers(3, 25)):
            found.append(mark + chr(97 + s) + "x" * int(rng.integers(0, 9)) + ".")
        documents[d] = [sentence(text) for text in found]
        lines.append(json.dumps({"text": "\n\n".join(found)}))
    path.write_text("\n".join(lines))

    def books(**settings):
        settings = {"format": "pairs", "seq_len": 48} | settings
        return prepare(path, **settings).splits["train"]

    return books, documents


def place(documents, tokens):
    """(document, first sentence, number of sentences) of a half made of whole sentences."""
    marks = [i for i, token in enumerate(tokens) if token == 31]
    assert marks[-1] == len(tokens) - 1, "a half ends where a sentence ends"
    parts, start = [], 0
    for mark in marks:
        parts.append(tokens[start : mark + 1])
        start = mark + 1
    for d, found in documents.items():
        if parts[0] in found:
            at = found.index(parts[0])
            assert found[at : at + len(parts)] == parts
            return d, at, len(parts)
    raise AssertionError("not a sentence of any document")


def test_nsp_positives_follow_and_negatives_come_from_another_document(books):
    make, documents = books
    batch = read(make())
    for (a, b), label in zip(halves(batch), batch["labels"], strict=True):
        (da, sa, na), (db, sb, _) = place(documents, a), place(documents, b)
        if label:
            assert da != db
        else:
            assert da == db and sb == sa + na


def test_sop_negatives_are_positives_swapped(books):
    make, documents = books
    batch = read(make(pair="sop"))
    for (a, b), label in zip(halves(batch), batch["labels"], strict=True):
        if label:
            a, b = b, a
        (da, sa, na), (db, sb, _) = place(documents, a), place(documents, b)
        assert da == db and sb == sa + na


@pytest.mark.parametrize("pair", ["nsp", "sop"])
def test_pairs_are_a_function_of_seed_and_example(books, pair):
    make, _ = books
    split = make(pair=pair)
    batch, again = read(split), read(split)
    alone = split.rows(np.array([3]), np.array([3]), 0)
    for key in batch:
        np.testing.assert_array_equal(batch[key], again[key])
        np.testing.assert_array_equal(batch[key][3], alone[key][0])
    other = read(split, seed=1)
    assert 0.4 < batch["labels"].mean() < 0.6
    assert not np.array_equal(batch["labels"], other["labels"])


def test_sentences_too_long_are_cut_not_lost(prepare):
    text = "a" * 50 + ".\n\n" + "b" * 3 + "."
    counts = prepare(text, document="file", format="pairs", pair="sop").counts["train"]
    assert counts["source_tokens"] == 55
    assert counts["sentences"] == 10  # 51 tokens in pieces of at most (16 - 3) // 2 = 6, and one
    assert counts["tokens"] - 3 * counts["rows"] + counts["dropped_tokens"] == 55


def test_nsp_needs_two_documents(prepare):
    with pytest.raises(DataError, match="two documents.*config.data.document.*pair='sop'"):
        prepare("ab.\n\ncd.\n\nef.", document="file", format="pairs")


# What a reader sees of lengths and last tokens must not tell the label: a table of the label's
# mean for each value, learnt on half of the anchors, is asked about the other half.
FEATURES = {
    "lengths": lambda a, b, batch, n: a // 8 * 100 + b // 8,
    "total": lambda a, b, batch, n: a + b,
    "first half": lambda a, b, batch, n: a,
    "second half": lambda a, b, batch, n: b,
    "last token of A": lambda a, b, batch, n: batch["input_ids"][np.arange(n), a - 2],
    "last token of B": lambda a, b, batch, n: batch["input_ids"][np.arange(n), a + b - 2],
}


@pytest.mark.parametrize("pair", ["nsp", "sop"])
def test_lengths_and_last_tokens_do_not_tell_the_label(pydocs, pair):
    split = pydocs(format="pairs", pair=pair).splits["train"]
    draws = 12
    batch = read(split, draws)
    label = batch["labels"]
    b = batch["token_types"].sum(1)
    a = batch["segment_ids"].sum(1) - b
    held_out = np.tile(np.arange(len(split)) % 2 == 1, draws)
    for name, feature in FEATURES.items():
        value = feature(a, b, batch, len(label))
        votes = np.bincount(value[~held_out], 2 * label[~held_out] - 1, value.max() + 1)
        accuracy = ((votes[value] > 0) == label)[held_out].mean()
        # 29,000 draws of 2,400 anchors: 0.5 ± 0.01 by chance alone.
        assert accuracy < 0.525, name


def test_nsp_lengths_are_equal_in_distribution(pydocs):
    split = pydocs(format="pairs").splits["train"]
    batch = read(split, 12)
    b = batch["token_types"].sum(1)
    negative = batch["labels"] == 1
    quantiles = np.linspace(0.05, 0.95, 10)
    difference = np.quantile(b[negative], quantiles) - np.quantile(b[~negative], quantiles)
    assert np.abs(difference).max() <= 2
