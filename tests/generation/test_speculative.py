"""A text that is guessed and read at once is the text that is written token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from test_decoding import ADAPTERS, GREEDY, PROMPTS, made

from fmjax.errors import ConfigError
from fmjax.generation import decoder, speculative
from fmjax.generation.sampling import Sampling
from fmjax.params import randomness

BFLOAT16 = dict(dtype="bfloat16")
MORE = ("gpt2", 1), ("llama", 3), ("t5", 1)
BFLOAT16 = dict(dtype="bfloat16")


def another(family, adapter=None, **changes):
    """The model of `made` with other parameters, which agrees with it here and there."""
    model, params = made(family, adapter, **changes)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noise = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return model, jax.tree.unflatten(tree, noise)


@pytest.mark.parametrize(
    "family, ahead",
    [
        ("gpt2", 3),
        ("llama", 1),
        ("t5", 3),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in MORE),
    ],
)
def test_the_likeliest_text_is_the_same(family, ahead):
    writer = decoder.Generator(*made(family))
    alone = [writer([ids], 20, GREEDY)[0] for ids in PROMPTS]
    for drafter in (decoder.Generator(*another(family)), writer):
        several = speculative.SpeculativeGenerator(writer, drafter, ahead)
        assert several(PROMPTS, 20, GREEDY) == alone
        assert several.written == 60
        if drafter is writer:  # every guess stands
            assert several.rounds == 3 * (1 + -(-19 // (ahead + 1)))


@pytest.mark.parametrize(
    "bits",
    [
        dict(weights="int8"),
        *(pytest.param(x, marks=pytest.mark.slow) for x in (dict(cache="int8"), BFLOAT16)),
    ],
    ids=str,
)
def test_the_likeliest_text_is_the_same_in_fewer_bits(bits):
    kind = {key: bits.pop(key) for key in tuple(bits) if key == "dtype"}
    writer = decoder.Generator(*made("llama", window=5, full_every=2, **kind), **bits)
    drafter = decoder.Generator(*another("llama", window=5, full_every=2, **kind), **bits)
    several = speculative.SpeculativeGenerator(writer, drafter, 3)
    assert several(PROMPTS, 12, GREEDY) == [writer([ids], 12, GREEDY)[0] for ids in PROMPTS]


@pytest.mark.parametrize(
    "adapter", ["prefix", *(pytest.param(x, marks=pytest.mark.slow) for x in ("lora", "prompt"))]
)
@pytest.mark.slow
def test_the_one_that_guesses_may_have_adapters(adapter):
    """Positions of its own that the model has not, and the other way round."""
    plain = decoder.Generator(*made("llama"))
    adapted = decoder.Generator(*another("llama", ADAPTERS[adapter]))
    for writer, drafter in ((plain, adapted), (adapted, plain)):
        expected = [writer([ids], 12, GREEDY)[0] for ids in PROMPTS]
        assert speculative.SpeculativeGenerator(writer, drafter, 3)(PROMPTS, 12, GREEDY) == expected
    same = speculative.SpeculativeGenerator(adapted, adapted, 3)
    same(PROMPTS, 12, GREEDY)
    assert same.rounds == 3 * (1 + 3)  # every guess stands


@pytest.mark.slow
def test_texts_end_where_they_end_and_look_up_on_the_way():
    writer = decoder.Generator(*made("gpt2"))
    free = writer(PROMPTS[:1], 12, GREEDY)[0]
    end = free[5]
    ended = decoder.Generator(*made("gpt2"), stop=(end,))
    several = speculative.SpeculativeGenerator(ended, writer, 4)
    assert several(PROMPTS[:1], 12, GREEDY)[0] == free[: free.index(end) + 1]
    seen = []

    def told(rows):
        seen.append([i for i in rows[0].tolist() if i >= 0])
        return [len(seen) == 2]

    several = speculative.SpeculativeGenerator(writer, decoder.Generator(*another("gpt2")), 2)
    found = several(PROMPTS[:1], 12, GREEDY, ends_early=told, every=3)[0]
    assert len(seen) == 2 and found == seen[-1] == free[: len(found)] and len(seen[0]) >= 4


@pytest.mark.slow
def test_as_far_as_the_last_place():
    """Guesses go on behind it, and are thrown away."""
    model, params = made("gpt2")
    writer, length = decoder.Generator(model, params), model.cfg.max_len - 4
    several = speculative.SpeculativeGenerator(writer, decoder.Generator(*another("gpt2")), 5)
    assert several(PROMPTS[:1], length, GREEDY) == writer(PROMPTS[:1], length, GREEDY)


@pytest.mark.slow
def test_a_text_is_as_probable_as_without_guesses():
    """The first token, and the second behind a guess that stood, by what the model says of them."""
    rng = np.random.default_rng(0)
    p, q = (jnp.asarray(rng.dirichlet([0.7] * 5, n), jnp.float32) for n in (2, 1))
    draws = 200_000
    numbers = jnp.arange(draws)
    seeds = randomness.seeds(jax.random.fold_in(jax.random.key(1), 0), numbers)
    guesses = jax.random.categorical(jax.random.key(2), jnp.log(q[0]), shape=(draws, 1))
    uniform = jax.random.uniform(jax.random.key(3), (draws, 1))
    each = jax.vmap(lambda g, u, s: speculative.verified(p, q, g, u, s[None]))
    count, token = each(guesses, uniform, seeds)
    first = np.where(count > 0, guesses[:, 0], token)
    error = lambda found, p: np.abs(np.bincount(found, minlength=5) / len(found) - p).max()
    assert error(first, p[0]) < 4 * (0.25 / draws) ** 0.5
    second = np.asarray(token)[np.asarray(count) > 0]
    assert error(second, p[1]) < 4 * (0.25 / len(second)) ** 0.5
    stood = float(jnp.minimum(p[0], q[0]).sum())  # the share that stands, by hand
    assert abs(float(jnp.mean(count)) - stood) < 4 * (0.25 / draws) ** 0.5


def shares(model, params, prompt, tokens, how):
    """Probabilities (tokens, tokens, tokens) of the next three, from rows of whole texts."""
    ways = [list(way) for way in np.ndindex(tokens, tokens)]
    rows = jnp.asarray([prompt + way for way in ways])
    ones = jnp.ones_like(rows)
    place = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    hidden = model.apply({"params": params}, rows, ones, place, ones - 1, method="encode")
    hidden = hidden[:, len(prompt) - 1 :]
    logits = model.apply({"params": params}, hidden, method="logits")[..., :tokens]
    p = np.asarray(jax.nn.softmax(logits / how.temperature, axis=-1), np.float64)
    p = p.reshape(tokens, tokens, 3, tokens)
    return p[0, 0, 0, :, None, None] * p[:, 0, 1, :, None] * p[:, :, 2]


@pytest.mark.slow
def test_whole_texts_are_as_probable_as_without_guesses():
    """Of three tokens, where one and the next is guessed at once, against the model's own."""
    hot, tokens, draws = Sampling(temperature=4.0), 4, 1500
    models = made("gpt2"), another("gpt2")
    writer, drafter = (decoder.Generator(*one, tokens=tokens) for one in models)
    texts = speculative.SpeculativeGenerator(writer, drafter, 2)(
        PROMPTS[:1] * draws, 3, hot, seed=1
    )
    counts = np.zeros((tokens,) * 3)
    np.add.at(counts, tuple(np.asarray(texts).T), 1)
    unlike = []
    for model, params in models:
        p = shares(model, params, PROMPTS[0], tokens, hot).ravel()
        many = draws * p >= 5  # the rest together, for the test's sake
        fold = lambda x, many=many: np.append(x[many], x[~many].sum())
        found, expected = fold(counts.ravel()), fold(draws * p)
        unlike.append(scipy.stats.chisquare(found, expected * draws / expected.sum()).pvalue)
    assert unlike[0] > 0.01 and unlike[1] < 1e-6


@pytest.mark.slow
def test_a_seed_decides_what_is_drawn():
    writer, drafter = decoder.Generator(*made("llama")), decoder.Generator(*another("llama"))
    several = speculative.SpeculativeGenerator(writer, drafter, 3)
    hot = Sampling(temperature=0.9, top_p=0.95)
    found = several(PROMPTS, 12, hot, seed=3)
    assert found == several(PROMPTS, 12, hot, seed=3) != several(PROMPTS, 12, hot, seed=4)
    assert several(PROMPTS[1:], 12, hot, seed=3, first=1) == found[1:]


def test_what_cannot_be_guessed_is_refused():
    writer = decoder.Generator(*made("gpt2"))
    with pytest.raises(ConfigError, match="config.ahead=0"):
        speculative.SpeculativeGenerator(writer, writer, 0)
    several = speculative.SpeculativeGenerator(writer, writer, 2)
    with pytest.raises(ConfigError, match="repetition_penalty does not go with config.draft"):
        several(PROMPTS, 4, Sampling(repetition_penalty=1.2))
    with pytest.raises(ConfigError, match="config.draft reads 64 tokens"):
        several([[5] * 10], 60, GREEDY)
