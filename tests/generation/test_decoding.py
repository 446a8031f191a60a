"""Written token by token or found anew for each: the same, whatever stands around the model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
import tiny

from fmjax import adapters
from fmjax.errors import ConfigError
from fmjax.generation import beam_search, decoder
from fmjax.generation.sampling import Sampling
from fmjax.params import paths, sharding

GREEDY = Sampling(temperature=0)
PROMPTS = [[7, 9, 11, 20], [33], [5, 6, 40]]
LENGTH = 5
LORA = dict(name="lora", targets=((r"block_.*/(attn|mlp)/.*", None),), rank=2, alpha=8.0)
ADAPTERS = {
    "none": None,
    "lora": LORA,
    "prefix": dict(name="prefix", length=3),
    "prompt": dict(name="prompt", length=3),
}


def made(family, adapter=None, **changes):
    """(a model whose tokens differ, its parameters)."""
    model = adapters.wrap(tiny.model(family, max_len=64, **changes), dict(adapter=adapter))
    params = model.init(jax.random.key(0), *model.example())["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    louder = [x + 0.5 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return model, jax.tree.unflatten(tree, louder)


@functools.partial(jax.jit, static_argnums=0)
def likeliest(model, params, ids, known, source, both=0):
    """The token behind the first `known` of the row `ids` (1, T), found from all of it; of an
    encoder–decoder behind those of a target, of the row `source`. The first `both` are read in both
    directions."""
    apply = functools.partial(model.apply, {"params": params})

    def about(ids):
        real = (ids >= 0).astype(jnp.int32)
        return jnp.maximum(ids, 0), real, jnp.where(ids >= 0, jnp.arange(ids.shape[1])[None], 0)

    arrays = about(source if model.decodes else ids)
    types = (jnp.arange(arrays[0].shape[1]) < both).astype(jnp.int32)[None]
    hidden = apply(*arrays, types, method="encode")
    if model.decodes:
        hidden = apply(*about(ids), hidden, arrays[1], method="decode")
    return jnp.argmax(apply(hidden[:, known - 1], method="logits")[0])


def anew(model, params, prompt, length, prefix=False):
    """The likeliest tokens, each from the whole text before it, in a row of its own."""
    both = len(prompt) * prefix
    pad = lambda ids: jnp.asarray([ids + [-1] * (24 - len(ids))], jnp.int32)
    source, text = pad(prompt), [0] if model.decodes else list(prompt)
    for _ in range(length):
        text.append(int(likeliest(model, params, pad(text), len(text), source, both)))
    return text[-length:]


@pytest.mark.parametrize(
    "family, adapter",
    [
        pytest.param(*x, marks=[] if "none" in x else pytest.mark.slow)
        for x in itertools.product(("gpt2", "llama", "t5"), ADAPTERS)
    ],
)
def test_what_is_kept_changes_no_token(family, adapter):
    model, params = made(family, ADAPTERS[adapter], **(dict(tied=False) if family == "t5" else {}))
    expected = [anew(model, params, prompt, LENGTH) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) > 1
    writer = decoder.Generator(model, params)
    assert writer(PROMPTS, LENGTH, GREEDY) == expected


def test_what_is_known_is_a_prefix_to_who_learnt_with_one():
    model, params = made("llama", prefix=True)
    prompts = [[7, 9, 11, 20, 31], [33, 5, 6]]
    found = {}
    for prefix in (True, False):
        expected = [anew(model, params, prompt, LENGTH, prefix) for prompt in prompts]
        found[prefix] = decoder.Generator(model, params, prefix=prefix)(prompts, LENGTH, GREEDY)
        assert found[prefix] == expected
    assert found[True] != found[False]


def test_windows_and_experts_write_the_same_too():
    model, params = made("llama", window=3, full_every=2, experts=3, experts_per_token=2)
    expected = [anew(model, params, prompt, 12) for prompt in PROMPTS]
    assert decoder.Generator(model, params)(PROMPTS, 12, GREEDY) == expected


def test_a_row_says_the_same_whatever_is_beside_it():
    model, params = made("llama")
    writer, hot = decoder.Generator(model, params), Sampling(temperature=1.5, top_p=0.9)
    together = writer(PROMPTS, 9, hot, seed=3)
    apart = [writer([ids], 9, hot, seed=3, first=i)[0] for i, ids in enumerate(PROMPTS)]
    assert together == apart
    assert together != writer(PROMPTS, 9, hot, seed=4)
    looked = writer(PROMPTS, 9, hot, seed=3, ends_early=lambda rows: [False] * 3, every=2)
    assert looked == together


def test_a_text_ends_with_what_ends_it_and_the_others_go_on():
    model, params = made("gpt2")
    free = decoder.Generator(model, params)(PROMPTS, 8, GREEDY)
    end = free[0][2]
    ended = decoder.Generator(model, params, stop=(end,))(PROMPTS, 8, GREEDY)
    cut = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert ended == cut and len(ended[0]) <= 3


def test_tokens_that_nothing_stands_for_are_not_written():
    model, params = made("gpt2")
    hot = Sampling(temperature=50.0)
    rows = decoder.Generator(model, params, tokens=9)(PROMPTS, 20, hot)
    assert max(map(max, rows)) < 9 and min(map(min, rows)) >= 0


def test_a_penalty_keeps_tokens_from_coming_again():
    model, params = made("gpt2")
    never = Sampling(temperature=0, repetition_penalty=1e6)
    for prompt, row in zip(
        PROMPTS, decoder.Generator(model, params)(PROMPTS, 10, never), strict=True
    ):
        assert len({*prompt, *row}) == len(prompt) + len(row)


@pytest.mark.parametrize("axes", [dict(data=2, tensor=2), dict(fsdp=4, tensor=2)], ids=str)
def test_eight_devices_write_what_one_does(axes):
    model, params = made("llama", kv_heads=2)
    prompts = [*PROMPTS, [12, 13]]
    expected = decoder.Generator(model, params)(prompts, LENGTH, GREEDY)
    mesh = tiny.mesh(**axes)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, sharding.shardings(params, mesh))
        writer = decoder.Generator(model, spread)
        assert writer(prompts, LENGTH, GREEDY) == expected
        prompt_batch = writer.prompt_batch(prompts, LENGTH, 0)
        texts = decoder.first_token(model, writer.params, prompt_batch, writer.spec, GREEDY, 32, 4)
        keys = texts.cache["block_00"]["attn"]["memory"]["rows"][0]  # of 2 heads of keys
        parts = {shard.data.shape[:2] for shard in keys.addressable_shards}
        assert parts == {(4 // (axes.get("data", 1) * axes.get("fsdp", 1)), 1)}


def test_programs_are_few():
    assert [decoder.room(n) for n in (1, 32, 33, 48, 49, 64, 65, 97, 1000)] == [
        32, 32, 48, 48, 64, 64, 96, 128, 1024,
    ]  # fmt: skip
    model, params = made("gpt2")
    writer = decoder.Generator(model, params)
    writer([[5] * 3], 4, GREEDY)
    before = decoder.first_token._cache_size(), decoder.decode._cache_size()
    writer([[5] * 17], 9, GREEDY)
    assert (decoder.first_token._cache_size(), decoder.decode._cache_size()) == before


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("llama", "t5"))]
)
@pytest.mark.parametrize("bits", [dict(weights="int8"), dict(cache="int8")], ids=str)
def test_eight_bits_say_the_same_in_any_batch(family, bits):
    model, params = made(family)
    writer = decoder.Generator(model, params, **bits)
    together = writer(PROMPTS, LENGTH, GREEDY)
    assert together == [writer([ids], LENGTH, GREEDY)[0] for ids in PROMPTS]
    if bits.get("weights"):  # the same products, of all tokens at once
        assert together == [anew(writer.model, writer.params, ids, LENGTH) for ids in PROMPTS]


@pytest.mark.slow
def test_eight_bits_are_near_the_whole():
    model, params = made("llama", tied=True)
    writer = decoder.Generator(model, params, weights="int8", cache="int8")
    prompt_batch = writer.prompt_batch(PROMPTS, LENGTH, 0)
    states = {}
    sides = dict(whole=(model, params, ""), eight=(writer.model, writer.params, "int8"))
    for name, (model, params, bits) in sides.items():
        spec = writer.spec._replace(cache=bits)
        hidden, cache = decoder.prefill(model, params, prompt_batch, spec, 32)
        first = decoder.logits(model, params, hidden, spec)
        more, cache = decoder.extend(
            model, params, prompt_batch, cache, jnp.full((3, 1), 9, jnp.int32), jnp.int32(1)
        )
        states[name] = first, decoder.logits(model, params, more[:, 0], spec), cache
    for whole, eight in zip(*(states[name][:2] for name in ("whole", "eight")), strict=True):
        error = jnp.linalg.norm(eight - whole) / jnp.linalg.norm(whole)
        assert 0 < error < 0.05
    size = lambda cache: paths.nbytes({k: x for k, x in cache.items() if k != "seen"})
    heads = model.cfg.width // model.cfg.heads  # of a vector of so many there is one scale
    assert size(states["eight"][2]) / size(states["whole"][2]) == pytest.approx(
        (heads + 4) / (4 * heads), rel=0.01
    )


def test_bits_that_a_model_has_not_are_said():
    model, params = made("gpt2")
    for bits in (dict(weights="int4"), dict(cache="fp8")):
        with pytest.raises(ConfigError, match=f"config.{next(iter(bits))}=.*give 'int8'"):
            decoder.Generator(model, params, **bits)
    with pytest.raises(ConfigError, match="without adapters.*configs/export.py"):
        decoder.Generator(*made("gpt2", LORA), weights="int8")
    with pytest.raises(ConfigError, match="not for experts"):
        decoder.Generator(*made("llama", experts=3, experts_per_token=2), weights="int8")


def test_half_precision_says_the_same_in_any_batch():
    model, params = made("gpt2", dtype="bfloat16")
    writer = decoder.Generator(model, params)
    together = writer(PROMPTS, LENGTH, GREEDY)
    assert together == [writer([ids], LENGTH, GREEDY)[0] for ids in PROMPTS]
    assert together == [anew(writer.model, writer.params, ids, LENGTH) for ids in PROMPTS]


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
@pytest.mark.slow
def test_a_cache_in_eight_bits_goes_with_adapters_and_beams(adapter):
    model, params = made("gpt2", ADAPTERS[adapter])
    writer = decoder.Generator(model, params, cache="int8")
    together = writer(PROMPTS, LENGTH, GREEDY)
    assert together == [writer([ids], LENGTH, GREEDY)[0] for ids in PROMPTS]
    found = beam_search.search(writer, PROMPTS, LENGTH, beam_search.Beams(3))
    alone = [beam_search.search(writer, [ids], LENGTH, beam_search.Beams(3))[0] for ids in PROMPTS]
    assert [text for text, _ in found] == [text for text, _ in alone]
