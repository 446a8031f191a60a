"""Fill in the middle: documents by hand, and that no token is lost or changes its document."""

import collections
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax import objectives
from fmjax.data import packing
from fmjax.errors import ConfigError
from fmjax.objectives import clm, fim
from fmjax.params import randomness

FIRST, LAST, PRE, MID, SUF, V = 1, 2, 3, 4, 5, 64
VOCAB = SimpleNamespace(special=np.arange(V) < 6, fim=(PRE, MID, SUF), bytes=None, mask_id=None)


def batch_of(documents, time, space=fim.ROOM, around=((FIRST,), (LAST,))):
    """Rows as fmjax.data packs them."""
    tokens = np.concatenate([np.array(x, np.uint16) for x in documents])
    lengths = np.array([len(x) for x in documents])
    how = (np.cumsum(lengths) - lengths, lengths, time, around)
    ids, segments = packing.pack(tokens, *how, 0, space=space)
    segments = segments.astype(np.int32)
    batch = dict(input_ids=ids.astype(np.int32), segment_ids=segments)
    batch |= dict(positions=packing.positions(segments), index=np.arange(len(ids)))
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


def prepared(batch, seed=0, **how):
    seeds = randomness.seeds(jax.random.key(seed), batch["index"])
    return fim.prepare(batch, seeds, vocab=VOCAB, **how)


def documents_of(batch):
    """{(row, segment): its tokens}, whose positions must count them."""
    ids, segments, places = (
        np.asarray(batch[name]) for name in ("input_ids", "segment_ids", "positions")
    )
    found = {}
    for row in range(len(ids)):
        for segment in range(1, segments[row].max() + 1):
            mine = np.flatnonzero(segments[row] == segment)
            assert (np.diff(mine) == 1).all()
            assert places[row, mine].tolist() == list(range(len(mine)))
            found[row, segment] = ids[row, mine].tolist()
    return found


def parts(document):
    """(before, between, behind) of a text in its new order."""
    pre, suf, mid = (document.index(mark) for mark in (PRE, SUF, MID))
    assert pre == 0 and pre < suf < mid
    return document[1:suf], document[mid + 1 :], document[suf + 1 : mid]


def test_the_five_texts_that_one_token_can_become():
    """[7] is cut at 0 or 1, twice: each side of both cuts, or between them."""
    batch = batch_of([[7]] * 200, 6)
    of = lambda **how: collections.Counter(
        map(tuple, documents_of(prepared(batch, **how)).values())
    )
    psm = of(rate=1.0, spm=0.0)
    behind, between, before = (
        (FIRST, PRE, SUF, 7, MID, LAST),
        (FIRST, PRE, SUF, MID, 7, LAST),
        (FIRST, PRE, 7, SUF, MID, LAST),
    )
    assert psm.keys() == {behind, between, before}
    assert psm[between] / 200 == pytest.approx(0.5, abs=0.15)  # four deviations
    assert of(rate=1.0, spm=1.0).keys() == {behind, between}
    assert of(rate=0.0) == {(FIRST, 7, LAST): 200}
    half = of(rate=0.5)
    assert half[FIRST, 7, LAST] / 200 == pytest.approx(0.5, abs=0.15)


def test_the_order_of_the_parts_by_hand():
    """Of [7 8] the cuts 1 and 2: 8 is between; cut at 1 and 1, nothing is."""
    batch = batch_of([[7, 8]] * 400, 7)
    psm = set(map(tuple, documents_of(prepared(batch, rate=1.0, spm=0.0)).values()))
    assert (FIRST, PRE, 7, SUF, MID, 8, LAST) in psm
    assert (FIRST, PRE, 7, SUF, 8, MID, LAST) in psm
    assert (FIRST, PRE, SUF, 8, MID, 7, LAST) in psm
    assert len(psm) == 6  # pairs of cuts at 0, 1 or 2
    spm = set(map(tuple, documents_of(prepared(batch, rate=1.0, spm=1.0)).values()))
    assert spm == {
        (FIRST, PRE, SUF, 7, 8, MID, LAST),
        (FIRST, PRE, SUF, 8, MID, 7, LAST),
        (FIRST, PRE, SUF, MID, 7, 8, LAST),
    }


AROUND = [((FIRST,), (LAST,)), ((), ()), ((FIRST,), ()), ((), (LAST,))]


@given(
    st.lists(st.lists(st.integers(6, V - 1), min_size=1, max_size=11), min_size=1, max_size=12),
    st.sampled_from(AROUND),
    st.integers(0, 3),
)
@settings(max_examples=5, derandomize=True)  # each compiles
def test_no_token_is_lost_and_none_leaves_its_document(documents, around, seed):
    batch = batch_of(documents, 16, around=around)
    before, after = documents_of(batch), documents_of(prepared(batch, seed, rate=0.7))
    first, last = around
    assert before.keys() == after.keys()
    for key, old in before.items():
        new = after[key]
        if new == old:
            continue
        assert new[: len(first)] == list(first) and new[len(new) - len(last) :] == list(last)
        inner = lambda x: x[len(first) : len(x) - len(last)]
        left, between, right = parts(inner(new))
        assert left + between + right == inner(old)


def test_a_document_without_room_stays_as_it_is():
    batch = batch_of([[7, 8, 9]] * 3, 10, space=0)
    assert np.asarray(batch["segment_ids"]).max() == 2  # two of five tokens in a row of ten
    after = prepared(batch, rate=1.0)
    full = np.asarray(batch["segment_ids"]).max(1) == 2
    for name in ("input_ids", "segment_ids", "positions"):
        np.testing.assert_array_equal(np.asarray(after[name])[full], np.asarray(batch[name])[full])
    assert PRE in np.asarray(after["input_ids"])[~full]


def test_what_is_cut_is_a_matter_of_the_example_and_the_marks_are_learnt():
    batch = batch_of([list(range(6, 6 + n)) for n in range(1, 12)] * 4, 24)
    whole = prepared(batch)
    part = prepared({name: x[2:5] for name, x in batch.items()})
    wide = prepared(
        {k: jnp.pad(x, ((0, 0), (0, 8))) if x.ndim > 1 else x for k, x in batch.items()}
    )
    for name in ("input_ids", "segment_ids", "positions"):
        np.testing.assert_array_equal(part[name], whole[name][2:5])
        np.testing.assert_array_equal(wide[name][:, :24], whole[name])
    assert (np.asarray(prepared(batch, 1)["input_ids"]) != np.asarray(whole["input_ids"])).any()
    _, weights = clm.targets(whole)
    sizes = [len(document) - 1 for document in documents_of(whole).values()]
    assert float(weights.sum()) == sum(sizes)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="config.data.format has conversations"):
        batch = batch_of([[7]], 8)
        prepared(batch | {"loss_mask": batch["segment_ids"]})
    without = SimpleNamespace(special=VOCAB.special, fim=None, mask_id=None, bytes=None)
    with pytest.raises(ConfigError, match="fim needs a tokenizer.*config.tokenizer.special=fim"):
        objectives.build({"fim": {}}, dict(vocab=without, target=""))
