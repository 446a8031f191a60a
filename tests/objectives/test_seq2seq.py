"""Targets of encoder–decoders: from pairs, and from spans that are taken out of a text."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.config import rules
from fmjax.errors import ConfigError
from fmjax.objectives import seq2seq, span_corruption
from fmjax.params import randomness

V, END, SENTINELS = 300, 1, tuple(range(299, 199, -1))
VOCAB = SimpleNamespace(
    size=V,
    pad_id=0,
    start_id=None,
    last=(END,),
    first=(),
    sentinels=SENTINELS,
)
SHORT = ((3.0, 0.15),)
UL2 = ((3.0, 0.15), (8.0, 0.15), (3.0, 0.5), (8.0, 0.5), (64.0, 0.15), (64.0, 0.5), (0.0, 0.25))


def rows(*documents, time=64):
    """A batch of rows of documents of the given lengths, each token another, each with its end."""
    ids, segments = np.zeros((2, len(documents), time), np.int32)
    for row, lengths in enumerate(documents):
        start = 0
        for segment, length in enumerate(lengths, 1):
            place = np.arange(start, start + length)
            ids[row, place], segments[row, place] = 10 + place, segment
            start += length
            ids[row, start - 1] = END
    arrays = dict(input_ids=ids, segment_ids=segments, positions=0 * ids, token_types=0 * ids)
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def corrupted(batch, denoisers=SHORT, seed=0):
    seeds = randomness.seeds(jax.random.key(seed), jnp.arange(len(batch["input_ids"])))
    prepare = lambda batch, seeds: span_corruption.prepare(
        batch, seeds, vocab=VOCAB, denoisers=denoisers
    )
    return {name: np.asarray(x) for name, x in jax.jit(prepare)(batch, seeds).items()}


def documents(ids, segments):
    """[{segment: its tokens}, …]"""
    return [
        {int(s): [int(i) for i in row[own == s]] for s in np.unique(own) if s}
        for row, own in zip(ids, segments, strict=True)
    ]


def filled(source, target):
    """A source with the spans of its target in the place of their sentinels."""
    spans, current = {}, None
    for token in target:
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        elif token != END:
            current.append(token)
    return [x for token in source for x in spans.get(token, [token])]


@pytest.mark.parametrize(
    "denoisers",
    [SHORT, ((3.0, 0.5),), ((64.0, 0.5),), ((0.0, 0.25),), ((0.0, 0.02),), UL2],
    ids=lambda x: str(x[:1]),
)
def test_source_and_target_together_are_the_text_and_nothing_else(denoisers):
    batch = rows((64,), (30, 20), (9,), (3, 40), (2, 2, 2), (), (8,) * 8, (6,) * 10, (9,) * 7)
    found = corrupted(batch, denoisers)
    texts = documents(np.asarray(batch["input_ids"]), np.asarray(batch["segment_ids"]))
    sources = documents(found["input_ids"], found["segment_ids"])
    targets = documents(found["target_ids"], found["target_segment_ids"])
    assert any(targets)
    for text, source, target in zip(texts, sources, targets, strict=True):
        assert source.keys() == text.keys()
        for segment, tokens in text.items():
            assert filled(source[segment], target.get(segment, [])) == tokens
            if segment in target:
                said = target[segment]
                named = [token for token in said if token in SENTINELS]
                assert named == list(SENTINELS[: len(named)]), "each from the first on"
                assert said[0] == SENTINELS[0] and said[-1] == END and said.count(END) == 1


def test_share_and_length_are_those_asked_for():
    batch = rows(*[(64,)] * 200)
    gone, spans = [], []
    for seed in range(3):
        found = corrupted(batch, SHORT, seed)
        real = found["target_segment_ids"] > 0
        named = np.isin(found["target_ids"], SENTINELS) & real
        gone.append(real.sum(1) - named.sum(1) - 1)
        spans.append(named.sum(1))
    # 63 tokens that may go (not the one that ends the text): 9 of them, in 3 spans, in each row.
    assert (np.stack(gone) == 9).all() and (np.stack(spans) == 3).all()
    of_half = corrupted(batch, ((0.0, 0.25),))
    share = ((of_half["target_segment_ids"] > 0).sum(1) - 2) / 63
    assert abs(share.mean() - 0.25) < 0.03 and share.max() <= 0.5


def test_lengths_are_each_sum_as_often():
    seeds = randomness.seeds(jax.random.key(0), jnp.arange(3000))
    total, number = jnp.full(3000, 5), jnp.full(3000, 3)
    found = span_corruption._composed(total, number, 4, randomness.named(seeds, "goes"), 16)
    sums, often = np.unique(np.asarray(found), axis=0, return_counts=True)
    assert {tuple(x) for x in sums.tolist()} == {
        (1, 1, 3, 0), (1, 2, 2, 0), (1, 3, 1, 0), (2, 1, 2, 0), (2, 2, 1, 0), (3, 1, 1, 0)
    }  # fmt: skip
    assert abs(often / 3000 - 1 / 6).max() < 0.03


def test_positions_count_in_each_document():
    found = corrupted(rows((30, 20)), ((3.0, 0.3),))
    for before in ("", "target_"):
        segments, places = found[f"{before}segment_ids"][0], found[f"{before}positions"][0]
        for segment in (1, 2):
            own = places[segments == segment]
            assert own.tolist() == list(range(len(own)))


def test_another_row_changes_nothing():
    whole = corrupted(rows((64,), (30, 20)))
    alone = corrupted(rows((64,)))
    for name in ("input_ids", "target_ids"):
        np.testing.assert_array_equal(whole[name][:1], alone[name])


def test_more_spans_than_sentinels_are_refused():
    few = SimpleNamespace(**{**vars(VOCAB), "sentinels": SENTINELS[:20]})
    seeds = randomness.seeds(jax.random.key(0), jnp.arange(1))
    said = "up to 60 spans of a row of 64 tokens, but the tokenizer has 20 sentinels"
    with pytest.raises(ConfigError, match=said):
        span_corruption.prepare(rows((64,)), seeds, vocab=few, denoisers=((1.0, 0.9),))


@pytest.mark.parametrize("pair", [(3.0, 1.5), (0.5, 0.2), (3.0,), (-1, 0.5), ("a", 0.5), (3, 0)])
def test_a_denoiser_that_cannot_be_is_refused(pair):
    with pytest.raises(ConfigError, match="denoisers: got .*mean length of a span"):
        rules.check({"objectives": {"span_corruption": {"denoisers": (pair,)}}})


@pytest.mark.parametrize(
    "name, said", [("target_ids", "pairs of.*seq2seq"), ("loss_mask", "conversations.*clm")]
)
def test_what_says_its_targets_itself_is_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        corrupted(rows((64,)) | {name: jnp.ones((1, 64), jnp.int32)})


def test_a_target_is_predicted_from_what_is_before_it():
    ids = jnp.array([[5, 6, 7, 8, 9, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0]])
    assert seq2seq.shifted(ids, positions, 3).tolist() == [[3, 5, 6, 3, 8, 3]]
