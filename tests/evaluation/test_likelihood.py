"""How likely models find texts: by hand, and whatever else is asked beside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import made

from fmjax.errors import ConfigError
from fmjax.evaluation import loglikelihood
from fmjax.evaluation.loglikelihood import Piece, Scorer

PAIRS = [([7, 9, 11], [20, 8]), ([], [33, 12, 40]), ([5], [6]), ([9] * 6, [10, 11])]


@functools.partial(jax.jit, static_argnums=0)
def states(model, params, ids):
    ids = ids[None]
    places = jnp.arange(ids.shape[1])[None]
    arrays = ids, jnp.ones_like(ids), places, jnp.zeros_like(ids)
    return model.apply({"params": params}, *arrays, method="encode")[0]


def log_p(model, params, hidden):
    return jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_token_is_judged_by_those_before_it(family):
    model, params = made(family)
    score = Scorer(model, params, first=(2,), batch_size=3)
    found = score(PAIRS)
    for (context, said), one in zip(PAIRS, found, strict=True):
        text = [2, *context, *said]
        table = log_p(model, params, states(model, params, jnp.asarray(text)))
        n = len(said)
        judged = [float(table[i - 1, text[i]]) for i in range(len(text) - n, len(text))]
        assert one.nats == pytest.approx(-sum(judged), abs=1e-4) and one.tokens == n
        likeliest = [int(jnp.argmax(table[i - 1])) for i in range(len(text) - n, len(text))]
        assert one.greedy == (likeliest == said)
    alone = [Scorer(model, params, first=(2,), batch_size=1)([pair])[0] for pair in PAIRS]
    for one, other in zip(found, alone, strict=True):
        assert one.nats == pytest.approx(other.nats, abs=1e-4)


def test_a_greedy_text_is_found_greedy():
    from fmjax.generation import decoder
    from fmjax.generation.sampling import Sampling

    model, params = made("llama")
    (row,) = decoder.Generator(model, params)([[7, 9]], 5, Sampling(temperature=0))
    score = Scorer(model, params)
    changed = [*row[:3], (row[3] + 1) % 64, row[4]]
    assert [x.greedy for x in score([([7, 9], row), ([7, 9], changed)])] == [True, False]


def test_a_long_context_loses_its_beginning_and_a_long_text_is_read_in_windows():
    model, params = made("gpt2")
    score = Scorer(model, params, first=(2,), trained=8)
    rng = np.random.default_rng(0)
    context, said = rng.integers(5, 60, 20).tolist(), rng.integers(5, 60, 3).tolist()
    cut = Scorer(model, params)([((context + said)[-9:-3], said)])
    assert score([(context, said)])[0].nats == pytest.approx(cut[0].nats, abs=1e-4)
    # 20 tokens behind the first: 8, 8 and 4, of which the last sees the 4 before.
    text = [2, *context]
    parts = [(text[:1], text[1:9]), (text[8:9], text[9:17]), (text[12:17], text[17:21])]
    total = sum(x.nats for x in Scorer(model, params)(parts))
    assert score([([], context)])[0].nats == pytest.approx(total, abs=1e-3)
    pieces = list(score.pieces(0, [], context))
    assert [len(p.targets) for p in pieces] == [8, 8, 4] and max(len(p.ids) for p in pieces) == 8


def test_an_encoder_judges_each_token_with_itself_alone_masked():
    model, params = made("bert")
    score = Scorer(model, params, first=(2,), last=(3,), mask_id=4)
    for context, said in PAIRS[:2]:
        text, total = context + said, 0.0
        for i in range(len(context), len(text)):
            row = [2, *text[:i], 4, *text[i + 1 :], 3]
            hidden = states(model, params, jnp.asarray(row))
            total -= float(log_p(model, params, hidden)[i + 1, text[i]])
        (found,) = score([(context, said)])
        assert found.nats == pytest.approx(total, abs=1e-4) and found.tokens == len(said)


def test_by_word_what_follows_in_the_word_is_masked_too():
    model, params = made("bert")
    starts = np.arange(64) % 3 > 0  # 9 and 33 go on with a word
    score = Scorer(model, params, mask_id=4, word_start=starts, way="word")
    rows = [piece.ids for piece in score.pieces(0, [10], [11, 9, 33, 13])]
    assert rows == [
        [10, 4, 4, 4, 13],
        [10, 11, 4, 4, 13],
        [10, 11, 9, 4, 13],
        [10, 11, 9, 33, 4],
    ]


@pytest.mark.slow
def test_of_an_encoder_decoder_the_source_is_the_context():
    model, params = made("t5")
    score = Scorer(model, params, last=(1,), start=0)
    context, said = PAIRS[0]
    source = jnp.asarray([[*context, 1]])
    given = jnp.asarray([[0, *said[:-1]]])
    ones = jnp.ones_like
    hidden = model.apply(
        {"params": params},
        *(given, ones(given), jnp.arange(2)[None]),
        states(model, params, source[0])[None],
        ones(source),
        method="decode",
    )
    table = log_p(model, params, hidden[0])
    total = sum(float(table[i, token]) for i, token in enumerate(said))
    assert score([(context, said)])[0].nats == pytest.approx(-total, abs=1e-4)


def test_what_cannot_be_judged_is_refused():
    model, params = made("gpt2")
    with pytest.raises(ConfigError, match="no token that begins"):
        Scorer(model, params)([([], [5])])
    with pytest.raises(ConfigError, match="text 1 has no tokens"):
        Scorer(model, params)([([7], [5]), ([7], [])])
    encoder, params = made("bert")
    with pytest.raises(ConfigError, match="has no mask"):
        Scorer(encoder, params)


def test_choices_of_one_token_share_the_row_of_their_context():
    pieces = [
        Piece(0, [1, 2], [1], [5], []),
        Piece(1, [1, 2], [1], [6], []),
        Piece(2, [1, 2, 6], [1, 2], [6, 7], []),
        Piece(3, [1, 2], [0], [5], [9]),
    ]
    assert [[p.request for p in row] for row in loglikelihood._shared(pieces)] == [[0, 1], [2], [3]]
    many = [Piece(i, [1, 2], [1], [i], []) for i in range(40)]
    assert [len(row) for row in loglikelihood._shared(many)] == [32, 8]


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_what_shares_a_row_is_judged_as_if_it_did_not(family):
    model, params = made(family)
    score = Scorer(model, params, first=[2], mask_id=3, batch_size=4)
    pairs = [([5, 6, 7], [i]) for i in range(8, 13)] + [([5, 6, 7], [9, 10]), ([5], [6])]
    together = score(pairs)
    for pair, one in zip(pairs, together, strict=True):
        (alone,) = score([pair])
        assert one.nats == pytest.approx(alone.nats, abs=1e-4) and one[1:] == alone[1:]
