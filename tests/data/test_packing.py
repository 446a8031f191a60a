"""Cutting and packing: by hand, then what must hold whatever the documents."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fmjax.data import packing
from fmjax.errors import DataError

A, B, C, D = 5, 6, 7, 8  # ids of the letters
PAD, CLS, SEP = 0, 2, 3


def test_two_documents_share_a_row_by_hand(prepare):
    split = prepare("abc\n\ndd", seq_len=10).splits["train"]
    rows = split.rows(np.array([0]))
    assert len(split) == 1 and split.tokens == 9
    assert rows["input_ids"].tolist() == [[CLS, A, B, C, SEP, CLS, D, D, SEP, PAD]]
    assert rows["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]]
    assert rows["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]]
    assert not rows["token_types"].any()
    assert {array.dtype for array in rows.values()} == {np.dtype(np.int32)}


def test_padded_puts_one_piece_in_a_row(prepare):
    split = prepare("abc\n\ndd", seq_len=8, format="padded").splits["train"]
    rows = split.rows(np.arange(2))
    assert rows["input_ids"].tolist() == [
        [CLS, A, B, C, SEP, PAD, PAD, PAD],
        [CLS, D, D, SEP, PAD, PAD, PAD, PAD],
    ]


def test_room_is_left_behind_each_piece(prepare):
    """Rows of 11: of each piece three columns more, and 11 - 2 - 3 tokens at most."""
    split = prepare("abcdefg\n\nd", seq_len=11, room=3).splits["train"]
    rows = split.rows(np.arange(len(split)))
    assert rows["input_ids"].tolist() == [
        [CLS, A, B, C, D, 9, 10, SEP, PAD, PAD, PAD],
        [CLS, 11, SEP, PAD, PAD, PAD, PAD, PAD, PAD, PAD, PAD],
        [CLS, D, SEP, PAD, PAD, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert prepare("ab\n\nd", seq_len=13, room=3).splits["train"].rows(np.array([0]))[
        "segment_ids"
    ].tolist() == [[1] * 4 + [0] * 3 + [2] * 3 + [0] * 3]


def test_best_fit_decreasing_by_hand():
    # 6 and 4 fill row 0; 5, 3 and 2 fill row 1: longest first, each where the least room is left.
    assert packing.best_fit_decreasing(np.array([2, 3, 4, 5, 6]), 10).tolist() == [1, 1, 0, 1, 0]


def naive_best_fit_decreasing(lengths, capacity):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@hypothesis.given(st.lists(st.integers(1, 20), min_size=1, max_size=80))
def test_best_fit_decreasing_equals_the_search_piece_by_piece(lengths):
    rows = packing.best_fit_decreasing(np.array(lengths), 20)
    loads = np.bincount(rows, lengths)
    assert loads.max() <= 20 and loads.min() > 0
    assert len(loads) == naive_best_fit_decreasing(lengths, 20)


LETTERS = st.text("abcdefgh", min_size=1, max_size=60)


@hypothesis.given(st.lists(LETTERS, min_size=1, max_size=30), st.integers(8, 24))
def test_packed_pieces_reconstruct_the_documents(documents, seq_len):
    tokens = np.array([ord(c) for document in documents for c in document], np.uint16)
    ends = np.cumsum([0] + [len(document) for document in documents])
    starts, lengths, lost = packing.pieces(ends, seq_len - 2, "split", seq_len)
    rows, segments = packing.pack(tokens, starts, lengths, seq_len, ((2,), (3,)), 0)
    found = []
    for row, marks in zip(rows, segments, strict=True):
        assert (row[marks == 0] == 0).all() and (np.diff(marks[marks > 0].astype(int)) >= 0).all()
        for segment in range(1, marks.max() + 1):
            piece = row[marks == segment]
            assert piece[0] == 2 and piece[-1] == 3
            found.append("".join(map(chr, piece[1:-1])))
    limit = seq_len - 2
    cut = [d[i : i + limit] for d in documents for i in range(0, len(d), limit)]
    assert sorted(found) == sorted(cut) and not lost


def test_positions_count_from_each_segment():
    segments = np.array([[1, 1, 2, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    assert packing.positions(segments).tolist() == [[0, 1, 0, 1, 2, 0, 0, 0], list(range(8))]


def test_row49_a_document_longer_than_the_context_is_split_truncated_dropped_or_refused(prepare):
    text = "abcdefghij\n\nabc"  # ten and three tokens; six fit
    counts = {
        long: prepare(text, seq_len=8, long=long).counts["train"]
        for long in ("split", "truncate", "drop")
    }
    lost = ("tokens", "truncated_tokens", "dropped_documents", "dropped_tokens")
    assert [counts["split"][key] for key in lost] == [10 + 3 + 3 * 2, 0, 0, 0]
    assert [counts["truncate"][key] for key in lost] == [6 + 3 + 2 * 2, 4, 0, 0]
    assert [counts["drop"][key] for key in lost] == [3 + 2, 0, 1, 10]
    with pytest.raises(
        DataError, match="1 documents are longer than the 6 tokens.*config.data.long"
    ):
        prepare(text, seq_len=8, long="error")


def test_row49_what_was_lost_is_logged(prepare):
    lines = []
    prepare("abcdefghij\n\nabc", seq_len=8, long="truncate", log=lines.append)
    assert any("4 truncated tokens" in line for line in lines)


def test_pydocs_rows_are_nearly_full(pydocs):
    counts = pydocs().counts["train"]
    assert counts["fill"] > 0.97
    assert counts["tokens"] == counts["fill"] * counts["rows"] * 128
