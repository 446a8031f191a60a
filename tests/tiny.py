"""One tiny model and its batches, shared by tests so that programs are compiled once."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import adapters, build, objectives
from fmjax.models import bert, gpt2, llama, param_init, t5
from fmjax.params import groups as parameter_groups
from fmjax.params import sharding
from fmjax.training import optim, setup, state
from fmjax.training.step import make_train_step

V, T = 64, 16
VOCAB = SimpleNamespace(
    size=V,
    pad_id=0,
    start_id=None,
    mask_id=4,
    first=(2,),
    last=(3,),
    special=np.arange(V) < 5,
    word_start=np.arange(V) % 3 > 0,
    sentinels=tuple(range(V - 1, V - 9, -1)),
    bytes=None,
)
SIZES = dict(vocab_size=V, width=32, depth=3, heads=4, mlp=64, max_len=T)
# {family: (its file, its own sizes, what it is trained to do)}: a test of what holds for any model
# is asked of each of them.
FAMILIES = {
    "bert": (bert, {}, {"mlm": {"rate": 0.3}}),
    "gpt2": (gpt2, {}, {"clm": {}}),
    "llama": (llama, dict(kv_heads=2, tied=False), {"clm": {}}),
    "t5": (
        t5,
        dict(encoder_depth=1, head_size=8, buckets=8, far=12),
        {"span_corruption": {"denoisers": ((3.0, 0.3),)}},
    ),
}
# Adam divides by the gradient's size: a gradient that is zero on paper (the key bias) is then
# rounding noise of size lr. A large eps keeps noise small, so that parameters can be compared.
OPTIM = dict(
    name="adamw",
    args={"eps": 1e-3},
    lr=1e-2,
    schedule="constant",
    warmup=0,
    cooldown=0,
    delay=0,
    end=0.0,
    clip=1.0,
) | dict(weight_decay=0.01, decay=".*kernel", layer_decay=1.0, ema=0.0, skip_spikes=0.0)


def batch(rows: int, seed: int = 0) -> dict[str, jax.Array]:
    """Two documents a row and padding, in different amounts."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(3, T // 2, (2, rows))
    place = np.arange(T)[None]
    segment_ids = np.where(
        place < first[:, None], 1, np.where(place < (first + second)[:, None], 2, 0)
    )
    positions = np.where(segment_ids == 2, place - first[:, None], np.where(segment_ids, place, 0))
    ids = np.where(segment_ids > 0, rng.integers(5, V, (rows, T)), 0)
    out = {
        "input_ids": ids,
        "segment_ids": segment_ids,
        "positions": positions,
        "token_types": np.zeros_like(ids),
        "index": np.arange(rows) + 1000 * seed,
        "units": np.sum(segment_ids > 0, axis=1),
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in out.items()}


def mesh(**sizes: int) -> jax.sharding.Mesh:
    """Over the first devices, as many as the sizes of axes need: one where none are given."""
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    types = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(
        shape, sharding.AXES, devices=jax.devices()[: math.prod(shape)], axis_types=types
    )


def by_family(kinds, *always, encoder=None):
    """(kind, family) of all for pytest; of decoders `always` these, of the encoder the kinds
    `encoder` (None: all), the others with slow tests."""
    pairs = [(kind, family) for family in FAMILIES for kind in kinds]
    encoder = kinds if encoder is None else encoder
    quick = lambda pair: pair in always or pair[1] == "bert" and pair[0] in encoder
    return [pytest.param(*x, marks=[] if quick(x) else pytest.mark.slow) for x in pairs]


PARAMS = {}  # {(model, mesh, seed): its parameters}


def families(*always):
    """All for pytest; those that are not `always` tested with slow tests."""
    return [
        pytest.param(family, marks=[] if family in always else pytest.mark.slow)
        for family in FAMILIES
    ]


def model(family: str = "bert", **changes):
    """A tiny one of the family."""
    module, own, _ = FAMILIES[family]
    return module.Model(**{"variant": "tiny"} | SIZES | own | changes)


def make(
    groups=((".*", "train"),),
    accumulate=1,
    losses=None,
    mesh=None,
    changes=None,
    adapter=None,
    quantise=None,
    group_optim=None,
    family="bert",
    target="nsp",
    **sizes,
) -> SimpleNamespace:
    """Model, loss, optimizer, a fresh state and the jitted step, put together as `setup`
    does."""
    group_optim = group_optim or {}
    net = adapters.wrap(model(family, **sizes), dict(adapter=adapter, quantise=quantise))
    net, assigned = setup.grouped(net, groups, OPTIM | (changes or {}), group_optim)
    split = functools.partial(parameter_groups.split, assigned=assigned)
    goals = objectives.build(losses or FAMILIES[family][2], dict(vocab=VOCAB, target=target))
    made = optim.make(
        split(param_init.abstract_params(net))[0],
        assigned,
        steps=lambda duration: {"100%": 100}.get(duration, duration),
        depths={"": net.cfg.depth},
        optim=OPTIM | (changes or {}),
        group_optim=group_optim,
    )
    mesh = mesh or sharding.make_mesh()
    abstract = state.abstract(net, made.tx, split, mesh)
    step = make_train_step(build.apply(net), goals, made.tx, split, accumulate)

    def fresh(seed=0, params=None):
        known = (net, mesh, seed) if params is None else None
        if known in PARAMS:  # compiled once; copied, as a step may be given them to keep
            params = jax.tree.map(jnp.copy, PARAMS[known])
        made_state = state.create(abstract, net, made.tx, split, seed, params)
        if known and known not in PARAMS:
            PARAMS[known] = jax.tree.map(jnp.copy, made_state.params)
        return made_state

    return SimpleNamespace(
        model=net,
        assigned=assigned,
        split=split,
        objectives=goals,
        optimizer=made,
        tx=made.tx,
        abstract=abstract,
        mesh=mesh,
        raw_step=step,
        step=jax.jit(step),
        state=fresh,
    )
