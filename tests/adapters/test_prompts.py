"""Soft prompts and prefixes: that they are what tokens in front would be, and what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fmjax import adapters, build
from fmjax.adapters import prefix, prompt
from fmjax.errors import ConfigError
from fmjax.models import bert, param_init
from fmjax.params import paths, randomness, sharding

P = 3
KINDS = {
    "prompt": dict(name="prompt", length=P),
    "mlp": dict(name="prompt", length=P, encoder="mlp", hidden=8),
    "lstm": dict(name="prompt", length=P, encoder="lstm", hidden=8),
    "prefix": dict(name="prefix", length=P),
    "projected": dict(name="prefix", length=P, hidden=8),
}
TRAIN = ((adapters.LEAVES, "train"), (".*", "freeze"))
ROOM = dict(max_len=tiny.T + P)
FAMILIES = (*tiny.FAMILIES, "modern")


def alone(rows=2):
    """One sequence a row, and padding."""
    batch = tiny.batch(rows)
    real = (batch["segment_ids"] > 0).astype(jnp.int32)
    positions = jnp.arange(tiny.T)[None] * real
    return [batch["input_ids"], real, positions, jnp.zeros_like(real)]


def model_of(family, **sizes):
    if family == "modern":
        del (sizes_ := dict(tiny.SIZES))["max_len"]
        return bert.Model("modernbert_tiny", **sizes_ | sizes)
    return tiny.model(family, **ROOM | sizes)


def fresh(model, seed=0):
    """Of the base larger than it starts, for outputs that differ."""
    larger = lambda path, x: x if path.endswith("scale") else 4 * x
    return paths.map_names(larger, param_init.init_params(model, jax.random.key(seed)))


@functools.cache
def program(model):
    encode = lambda params, arrays, seeds: model.apply(
        {"params": params}, *arrays, seeds, method="encode"
    )
    return jax.jit(encode)


def encode(model, params, arrays, seeds=None):
    return np.asarray(program(model)(params, arrays, seeds))


def in_front(arrays, ids):
    """The rows with the tokens `ids` before them."""
    rows, count = len(arrays[0]), len(ids)
    front = lambda values, x: jnp.concatenate([jnp.tile(jnp.asarray(values), (rows, 1)), x], 1)
    zeros = np.zeros(count, int)
    positions = front(np.arange(count), (arrays[2] + count) * arrays[1])
    return [front(ids, arrays[0]), front(zeros + 1, arrays[1]), positions, front(zeros, arrays[3])]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "t5"])
def test_vectors_of_the_table_are_those_tokens(family):
    base = model_of(family)
    params, arrays, ids = fresh(base), alone(), np.array([7, 9, 11])
    model = prompt.wrap(base, length=P)
    given = model.add(params, jax.random.key(1))
    assert set(paths.unstack(given)) - set(paths.unstack(params)) == {"embed/token/prompt_tokens"}
    table = given["embed"]["token"]
    table["prompt_tokens"] = table["embedding"][ids]
    wanted = encode(base, params, in_front(arrays, ids))
    real = np.asarray(arrays[1]) > 0
    np.testing.assert_allclose(encode(model, given, arrays)[real], wanted[:, P:][real], atol=1e-5)
    first = prompt.wrap(base, length=P, whole="prompt")
    got = encode(first, given, arrays)
    np.testing.assert_allclose(got[:, 0], wanted[:, 0], atol=1e-5)
    np.testing.assert_allclose(got[:, 1:][real[:, 1:]], wanted[:, P + 1 :][real[:, 1:]], atol=1e-5)


def test_a_decoder_sees_what_is_before_its_source_and_heads_do_not():
    base = model_of("t5", classes={"classify": 2})
    params, arrays, ids = fresh(base), alone(), np.array([7, 9, 11])
    model = prompt.wrap(base, length=P)
    given = model.add(params, jax.random.key(1))
    table = given["embed"]["token"]
    table["prompt_tokens"] = table["embedding"][ids]

    def run(model, params, source):
        apply = build.apply(model)
        hidden = apply(params, *source, method="encode")
        target = arrays[:3]  # of the same segments as the tokens of the source
        seen = (source if model is base else arrays)[1]
        return apply(params, *target, hidden, seen, method="decode"), hidden

    wanted, hidden = run(base, params, in_front(arrays, ids))
    real = np.asarray(arrays[1]) > 0
    got, longer = run(model, given, arrays)
    np.testing.assert_allclose(got[real], wanted[real], atol=1e-5)
    of_tokens = build.apply(base)(params, hidden[:, P:], arrays[1], "classify", method="classify")
    judged = build.apply(model)(given, longer, arrays[1], "classify", method="classify")
    np.testing.assert_allclose(judged, of_tokens, atol=1e-5)


# Of T5's tokens attention knows how far they are apart, which a prefix is from none of them.
@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "t5"])
def test_keys_and_values_of_tokens_are_those_tokens(family):
    """In a model of one layer, whose other tokens see nothing else of them."""
    base = model_of(family, depth=1)
    params, arrays, ids = fresh(base), alone(), np.array([7, 9, 11])
    longer, caught = in_front(arrays, ids), {}

    def catch(call, args, options, context):
        if context.module.path and context.module.path[-1] == "memory":
            caught["kv"] = args[:2]
        return call(*args, **options)

    with bert.nn.intercept_methods(catch):
        wanted = base.apply({"params": params}, *longer, method="encode")
    rows = [x[0].swapaxes(0, 1).reshape(x.shape[2], -1)[:P] for x in caught["kv"]]
    model = prefix.wrap(base, length=P)
    given = model.add(params, jax.random.key(1))
    given["block_00"]["attn"]["memory"]["prefix_values"] = jnp.stack(rows)
    real = np.asarray(arrays[1]) > 0
    got = encode(model, given, arrays)
    np.testing.assert_allclose(got[real], np.asarray(wanted)[:, P:][real], atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_projected_prefix_is_a_plain_one(family):
    base = model_of(family).clone(stacks=(3,))
    model = prefix.wrap(base, length=P, hidden=8)
    plain = prefix.wrap(base, length=P)
    params = moved(model.add(fresh(base), jax.random.key(1)))
    shared = params["embed"]
    hidden = jnp.tanh(
        shared["prefix_tokens"] @ shared["prefix_up_kernel"] + shared["prefix_up_bias"][None]
    )
    layers = params["blocks_00_02"]["attn"]["memory"]
    both = (
        jnp.einsum("pe,leo->lpo", hidden, layers["prefix_kernel"]) + layers["prefix_bias"][:, None]
    )
    given = plain.add(adapters.merge.separate(params)[0], jax.random.key(1))
    values = both.reshape(3, P, 2, -1).swapaxes(1, 2)
    given["blocks_00_02"]["attn"]["memory"]["prefix_values"] = values
    got, wanted = (encode(m, p, alone()) for m, p in ((model, params), (plain, given)))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_all_documents_of_a_row_see_a_prefix(family):
    base = model_of(family)
    batch = tiny.batch(2)
    arrays = [batch[n] for n in ("input_ids", "segment_ids", "positions", "token_types")]
    model = prefix.wrap(base, length=P)
    one = moved(model.add(fresh(base), jax.random.key(1)))
    two = moved(one)
    changed = np.abs(encode(model, one, arrays) - encode(model, two, arrays)).max(-1)
    real = np.asarray(arrays[1]) > 0
    assert (changed[real] > 1e-3).all() and set(np.unique(arrays[1])) == {0, 1, 2}


def moved(params):
    rng = np.random.default_rng(0)
    noise = lambda x: 0.5 * rng.standard_normal(x.shape).astype(np.float32)
    own = lambda name: adapters.wrapper.re.fullmatch(adapters.LEAVES, name)
    return paths.map_names(lambda name, x: x + noise(x) if own(name) else x, params)


@functools.cache
def made(kind, family="bert", **options):
    return tiny.make(TRAIN, adapter=KINDS[kind], family=family, **ROOM, **options)


@pytest.mark.parametrize("kind, family", tiny.by_family(KINDS, ("prompt", "gpt2")))
def test_two_steps_move_all_of_it_and_nothing_else(kind, family):
    run = made(kind, family)
    current = run.state()
    before = paths.unstack(jax.device_get(current.params))
    for seed in (0, 1):
        batch = tiny.batch(4, seed)
        batch["segment_ids"] = jnp.minimum(batch["segment_ids"], 1)
        current, found = run.step(current, batch)
        assert float(found["skipped"]) == 0
    after = paths.unstack(jax.device_get(current.params))
    moving = {name for name in after if not np.array_equal(before[name], after[name])}
    assert moving == {
        name for name in after if adapters.wrapper.re.fullmatch(adapters.LEAVES, name)
    }


@pytest.mark.parametrize("kind, family", tiny.by_family(KINDS))
@pytest.mark.parametrize("change", ["unrolled", "block"])
def test_layouts_give_the_same_numbers(kind, family, change):
    base = model_of(family, dropout=0.1)
    stacks = paths.runs(base.kinds)
    model = adapters.wrap(base, dict(adapter=KINDS[kind])).clone(stacks=stacks)
    params = moved(fresh(model))
    wanted = encode(model, params, alone())
    if change == "unrolled":
        model, params = model.clone(stacks=None), paths.restack(params, None)
    else:
        inner = model_of(family, dropout=0.1, remat="block").clone(stacks=stacks)
        model = adapters.Adapted(inner, model.adapter)
    np.testing.assert_allclose(encode(model, params, alone()), wanted, atol=1e-5)
    seeds = randomness.seeds(jax.random.key(1), jnp.arange(2))
    assert np.abs(encode(model, params, alone(), seeds) - wanted).max() > 0.05  # the model's own


@pytest.mark.parametrize(
    "kind, family",
    [
        ("lstm", "bert"),
        ("prefix", "llama"),
        pytest.param("projected", "bert", marks=pytest.mark.slow),
        pytest.param("prompt", "gpt2", marks=pytest.mark.slow),
    ],
)
def test_any_layout_of_devices_gives_the_same_numbers(kind, family):
    def two_steps(mesh):
        with jax.set_mesh(mesh):
            run = made(kind, family, mesh=mesh, dropout=0.0, attention_dropout=0.0)
            place = jax.sharding.NamedSharding(mesh, sharding.BATCH)
            current = run.state()
            for seed in (0, 1):
                batch = {name: jax.device_put(x, place) for name, x in tiny.batch(8, seed).items()}
                current, _ = run.step(current, batch)
        return paths.flatten(jax.device_get(current.params))

    wanted = two_steps(tiny.mesh())
    for path, leaf in two_steps(sharding.make_mesh(data=2, fsdp=2, tensor=2)).items():
        np.testing.assert_allclose(leaf, wanted[path], atol=1e-6, err_msg=path)


def test_the_lstm_is_torchs():
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    theirs = torch.nn.LSTM(5, 4, bidirectional=True, batch_first=True)
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    given = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    halves = []
    for end, rows in (("", x), ("_reverse", x[::-1])):
        bias = given[f"bias_ih_l0{end}"] + given[f"bias_hh_l0{end}"]
        inputs = rows @ given[f"weight_ih_l0{end}"].T + bias
        h = prompt._lstm(jnp.asarray(inputs), jnp.asarray(given[f"weight_hh_l0{end}"].T))
        halves.append(np.asarray(h)[:: -1 if end else 1])
    wanted = theirs(torch.tensor(x)[None])[0][0].detach().numpy()
    np.testing.assert_allclose(np.concatenate(halves, -1), wanted, atol=1e-6)


@pytest.mark.parametrize("init", ("vocabulary", "text", "random"))
def test_vectors_start_as_the_table_has_them(init):
    base = model_of("bert")
    model = prompt.wrap(base, length=P, init=init, text="any" * (init == "text"))
    params = model.add(fresh(base), jax.random.key(1))
    names = {"embed/token/prompt_tokens"}
    begin = lambda names, ids: adapters.start(
        model, params, names, lambda _: ids, {}.__getitem__, 0
    )
    begun = begin(names, [5, 6])
    table, found = (np.asarray(begun["embed"]["token"][n]) for n in ("embedding", "prompt_tokens"))
    if init == "random":
        assert np.std(found) == pytest.approx(np.std(table), rel=0.25)
    elif init == "text":
        np.testing.assert_array_equal(found, table[[5, 6, 5]])
    else:
        assert all((row == table).all(-1).any() for row in found)
    assert begin(set(), []) is params  # it was loaded
    if init == "text":
        with pytest.raises(ConfigError, match="starts from the tokens of config.adapter.text"):
            begin(names, [])


@pytest.mark.parametrize(
    "adapter, message",
    [
        (dict(name="prompt", length=19), "config.adapter.length=19 leaves no room"),
        (dict(name="prefix", length=19), "config.adapter.length=19 leaves no room"),
        (dict(name="prompt"), "config.adapter.name='prompt' needs config.adapter.length"),
        (dict(name="prompt", length=2, encoder="lstm", hidden=0), "needs config.adapter.hidden"),
        (dict(name="prompt", length=2, text="a"), "text='a' with config.adapter.init='vocabulary'"),
        (dict(name="prompt", length=2, init="zeros"), "init='zeros' is not known"),
        (dict(name="prompt", length=2, targets=()), "config.adapter.targets is not known"),
    ],
)
def test_what_cannot_be_meant_is_refused(adapter, message):
    with pytest.raises(ConfigError, match=message):
        tiny.make(TRAIN, adapter=adapter, **ROOM)


@pytest.mark.parametrize("kind", ["prompt", "projected"])
def test_text_and_prompt_have_to_fit_and_nothing_is_merged(kind):
    model = adapters.wrap(model_of("bert"), dict(adapter=KINDS[kind]))
    rows = dict(seq_len=tiny.T, format="padded")
    build.check_rows(model, rows)
    if kind == "prompt":
        with pytest.raises(ConfigError, match="'packed' has several documents in one"):
            build.check_rows(model, rows | dict(format="packed"))
    with pytest.raises(ConfigError, match="seq_len=17, with 3 of config.adapter.length before it"):
        build.check_rows(model, rows | dict(seq_len=tiny.T + 1))
    params = fresh(model.clone(stacks=(3,)))
    with pytest.raises(ConfigError, match="cannot be merged"):
        adapters.merged(model.clone(stacks=(3,)), params)
