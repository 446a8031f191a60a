"""Order: a batch is a function of (seed, step), whoever reads it and from wherever one starts."""

import itertools
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fmjax import data
from fmjax.data import order
from fmjax.errors import ConfigError, DataError

TEXT = "\n\n".join(a + b + "x" * 10 for a in "abcdefg" for b in "abc")  # 21 documents, a row each


@pytest.fixture
def split(prepare):
    split = prepare(TEXT, seq_len=14).splits["train"]
    assert len(split) == 21
    return split


def take(split, count, **settings):
    batches = data.batches(split, **{"batch_size": 4, "seeds": [0]} | settings)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@hypothesis.given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 1000))
def test_permuted_is_a_permutation(size, seed, epoch):
    found = order.permuted(np.arange(size), size, seed, epoch)
    assert (np.sort(found) == np.arange(size)).all()


def test_permuted_is_scattered_and_its_keys_differ():
    size = 10_000
    found = np.stack([order.permuted(np.arange(size), size, seed, 0) for seed in range(20)])
    fixed = (found == np.arange(size)).sum(1).mean()  # one is expected
    neighbours = (np.abs(np.diff(found, axis=1)) == 1).sum(1).mean()  # two are expected
    correlation = np.abs(np.corrcoef(np.concatenate([found, [np.arange(size)]]))[-1, :-1]).max()
    assert fixed < 3 and 0.5 < neighbours < 5 and correlation < 0.05


def test_batches_have_the_promised_keys_and_shapes(split):
    (batch,) = take(split, 1)
    shapes = {key: (array.shape, array.dtype) for key, array in batch.items()}
    names = ("input_ids", "segment_ids", "positions", "token_types")
    rows = {name: ((4, 14), np.dtype(np.int32)) for name in names}
    assert shapes == rows | dict.fromkeys(("index", "units"), ((4,), np.dtype(np.int32)))
    assert batch["units"].tolist() == np.count_nonzero(batch["segment_ids"], axis=1).tolist()
    assert batch["index"].tolist() == [0, 1, 2, 3]


def test_a_batch_is_a_function_of_seed_and_step(split):
    straight = take(split, 12)
    for start in (1, 5, 11):
        same(take(split, 1, start=start)[0], straight[start])
    assert not np.array_equal(take(split, 1, seeds=[1])[0]["input_ids"], straight[0]["input_ids"])


def test_batches_of_several_seeds_are_those_of_each(split):
    together = take(split, 5, seeds=[0, 3, 1])
    for place, seed in enumerate((0, 3, 1)):
        alone = take(split, 5, seeds=[seed])
        for mine, its in zip(together, alone, strict=True):
            width = its["segment_ids"].shape[-1]
            for name in its:
                found = mine[name][place]
                np.testing.assert_array_equal(
                    found[:, :width] if found.ndim > 1 else found, its[name]
                )
            assert not mine["segment_ids"][place][:, width:].any()


def test_a_seed_draws_the_examples_that_it_sees(split):
    def seen(drawn, seed=0, steps=12):
        found = take(split, steps, drawn=drawn, seeds=[seed])
        return [tuple(row) for batch in found for row in batch["input_ids"]]

    six = seen(6)
    assert len(set(six)) == 6 and all(six.count(row) == 8 for row in six)  # 48 rows, 8 epochs
    assert six[:6] != six[6:12]  # each in its own order
    assert set(seen(4)) < set(six) < set(seen(0)) and len(set(seen(0))) == 21
    assert set(seen(6, seed=1)) != set(six)
    every = set(seen(6)).union(*(seen(6, seed) for seed in range(1, 20)))
    assert len(every) == 21  # any of them may be drawn
    assert seen(21) == seen(0)
    together = take(split, 3, drawn=6, seeds=[0, 1])
    rows = np.concatenate([batch["input_ids"][1] for batch in together])
    assert [tuple(row) for row in rows] == seen(6, seed=1, steps=3)
    with pytest.raises(DataError, match="examples=22, but the training split has 21"):
        data.batches(split, batch_size=2, seeds=[0], drawn=22)
    with pytest.raises(DataError, match="has 3 rows, fewer than one batch"):
        data.batches(split, batch_size=4, seeds=[0], drawn=3)


def test_a_restored_position_goes_on_as_the_straight_run(split):
    straight = take(split, 9)
    batches = data.batches(split, batch_size=4, seeds=[0])
    list(itertools.islice(batches, 4))
    state = json.loads(json.dumps(batches.state()))
    assert state == {"next_index": 4, "skip": []}
    list(itertools.islice(batches, 3))
    batches.restore(state)
    for expected in straight[4:]:
        same(next(batches), expected)
    batches.close()


def test_outside_by_hand():
    ranges = ((0, 2), (4, 5), (7, 10))  # what is left: 2 3 5 6 10 11
    assert order.outside(np.arange(6), ranges).tolist() == [2, 3, 5, 6, 10, 11]
    assert order.outside(3, ()) == 3


@hypothesis.given(st.lists(st.integers(0, 60), unique=True, max_size=12))
def test_outside_is_what_the_ranges_leave(ends):
    ends = sorted(ends)[: len(ends) // 2 * 2]
    ranges = list(zip(ends[::2], ends[1::2], strict=True))
    left = [i for i in range(200) if not any(first <= i < end for first, end in ranges)]
    assert order.outside(np.arange(100), ranges).tolist() == left[:100]


def test_row36_skipped_examples_are_passed_over_and_all_others_come(split):
    skip = ((5, 7), (8, 12))
    straight, skipping = take(split, 6), take(split, 4, skip=skip)
    assert [batch["index"].tolist() for batch in skipping] == [
        [0, 1, 2, 3], [4, 7, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21],
    ]  # fmt: skip
    rows = {i: row for b in straight for i, row in zip(b["index"], b["input_ids"], strict=True)}
    for batch in skipping:
        for i, row in zip(batch["index"], batch["input_ids"], strict=True):
            np.testing.assert_array_equal(row, rows[i])
    ranges = [data.examples(step, batch_size=4, skip=skip) for step in range(3)]
    assert ranges == [(0, 4), (4, 14), (14, 18)]
    assert data.examples(2**40, batch_size=4) == (2**42, 2**42 + 4)


def test_row36_what_is_skipped_may_change_for_what_is_to_come(split):
    def go_on(saved, skip):
        batches = data.batches(split, batch_size=4, seeds=[0], skip=skip)
        try:
            batches.restore(saved)
            return next(batches)["index"].tolist()
        finally:
            batches.close()

    batches = data.batches(split, batch_size=4, seeds=[0], skip=((5, 7),))
    list(itertools.islice(batches, 2))  # 0 1 2 3, 4 7 8 9
    saved = json.loads(json.dumps(batches.state()))
    batches.close()
    assert saved == {"next_index": 2, "skip": [[5, 7]]}
    assert go_on(saved, ((5, 7),)) == [10, 11, 12, 13]
    assert go_on(saved, ((5, 7), (10, 13))) == [13, 14, 15, 16]
    for skip in ((), ((5, 6),), ((4, 7),), ((5, 7), (9, 11))):
        with pytest.raises(
            DataError, match=r"of the 10 examples before step 2 .*skipped \[\(5, 7\)\]"
        ):
            go_on(saved, skip)
    # A range that no batch had reached may be taken back; and a checkpoint from before skipping.
    assert go_on({"next_index": 2, "skip": [[8, 30]]}, ((8, 20),)) == [20, 21, 22, 23]
    assert go_on({"next_index": 2}, ((8, 20),)) == [20, 21, 22, 23]
    assert go_on({"next_index": 0}, ((0, 3),)) == [3, 4, 5, 6]


def test_every_epoch_visits_every_row_once_in_its_own_order(split):
    batches = take(split, 21)  # 84 examples: four epochs, some batches span two
    rows = np.concatenate([batch["input_ids"] for batch in batches])
    epochs = [[row.tobytes() for row in rows[i : i + 21]] for i in range(0, 84, 21)]
    assert all(len(set(epoch)) == 21 for epoch in epochs)
    assert all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert np.concatenate([batch["index"] for batch in batches]).tolist() == list(range(84))


@pytest.mark.parametrize("form", ["packed", "pairs"])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_hold_the_batch_of_one(prepare, form, count):
    text = "\n\n".join(f"{a}bc. {a}def. {a}. {a}gh." for a in "abcdefghijkl")
    split = prepare(text, format=form).splits["train"]
    whole = take(split, 3)
    parts = [take(split, 3, process_index=i, process_count=count) for i in range(count)]
    for step, expected in enumerate(whole):
        union = {key: np.concatenate([part[step][key] for part in parts]) for key in expected}
        same(union, expected)


def test_a_batch_that_processes_cannot_share_is_refused(split):
    with pytest.raises(ConfigError, match="batch_size=4 must be a multiple of the 3"):
        take(split, 1, process_count=3)


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_sees_every_row_once(split, count):
    seen = []
    for i in range(count):
        batches = list(data.eval_batches(split, batch_size=8, process_index=i, process_count=count))
        assert len(batches) == 3  # 21 rows in batches of 8, the last one filled up
        for batch in batches:
            real = batch["segment_ids"].any(1)
            assert not any(array[~real].any() for array in batch.values())
            seen += batch["index"][real].tolist()
            expected = split.rows(batch["index"][real])
            np.testing.assert_array_equal(batch["input_ids"][real], expected["input_ids"])
    assert sorted(seen) == list(range(21))


def test_evaluation_can_be_limited(split):
    full = list(data.eval_batches(split, batch_size=8))
    (first,) = data.eval_batches(split, batch_size=8, limit=1)
    assert data.eval_steps(split, 8) == len(full) and data.eval_steps(split, 8, limit=1) == 1
    same(first, full[0])


def test_row47_fewer_rows_than_a_batch(split):
    with pytest.raises(DataError, match="21 rows, fewer than one batch.*at most 21"):
        data.batches(split, batch_size=22, seeds=[0])


def test_row51_a_run_does_not_resume_on_other_data(prepare):
    dataset = prepare(TEXT, seq_len=14)
    saved = json.loads(json.dumps(data.fingerprint(dataset, seed=0, batch_size=4)))
    data.check_fingerprint(saved, data.fingerprint(dataset, seed=0, batch_size=4))

    def differing(now):
        with pytest.raises(DataError, match="(?s)cannot resume.*--fresh") as error:
            data.check_fingerprint(saved, now)
        lines = str(error.value).splitlines()
        return {line.split(":")[0].strip() for line in lines if line.startswith("  ")}

    def fingerprint(text=TEXT, seed=0, batch_size=4, **settings):
        now = prepare(text, **{"seq_len": 14} | settings)
        return data.fingerprint(now, seed=seed, batch_size=batch_size)

    assert differing(fingerprint(seed=1)) == {"seed"}
    assert differing(fingerprint(batch_size=8)) == {"batch_size"}
    assert differing(fingerprint(seq_len=28)) == {"seq_len", "format", "rows"}
    assert differing(fingerprint(format="padded")) == {"format"}
    assert differing(fingerprint(text=TEXT.replace("x", "y"))) == {"data"}


def test_row52_an_error_while_reading_names_the_step(split):
    split.rows = lambda *arguments: 1 / 0
    with pytest.raises(DataError, match="batch of step 7 .*division by zero"):
        take(split, 1, start=7)
