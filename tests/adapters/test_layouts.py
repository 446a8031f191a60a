"""Training of an adapter does not depend on how arrays lie over devices, nor much on the dtype."""

import functools

import jax
import numpy as np
import pytest
import tiny

from fmjax.params import paths, sharding

TRAIN = ((r".*/lora_.", "train"), (".*", "freeze"))
LORA = dict(name="lora", targets=((r"block_.*/(attn|mlp)/.*|embed/token", 4),), rank=4, alpha=8.0)
KINDS = {"lora": dict(dropout=0.1), "dora": dict(dora=True, dropout=0.1)}


def two_steps(kind, mesh, family="bert", **model):
    """(parameters, losses, the adapter's parameters before)."""
    with jax.set_mesh(mesh):
        adapter = LORA | KINDS[kind]
        model |= dict(family=family, dropout=0.1, attention_dropout=0.1)
        made = tiny.make(TRAIN, mesh=mesh, adapter=adapter, **model)
        place = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        current, losses = made.state(), []
        before = {name: x for name, x in flat(current.params).items() if "/lora_" in name}
        for seed in (0, 1):
            batch = {name: jax.device_put(x, place) for name, x in tiny.batch(8, seed).items()}
            current, found = made.step(current, batch)
            assert float(found["skipped"]) == 0
            losses.append(float(found["loss"]))
    return flat(current.params), losses, before


def flat(params):
    return paths.flatten(jax.device_get(params))


@functools.cache
def single_device(kind, family="bert"):
    return two_steps(kind, tiny.mesh(), family)


@pytest.mark.parametrize(
    "layout, kind, family",
    [
        pytest.param(dict(fsdp=8), "lora", "bert", marks=pytest.mark.slow),
        (dict(data=2, fsdp=2, tensor=2), "dora", "bert"),
        pytest.param(dict(fsdp=2, tensor=4), "lora", "llama", marks=pytest.mark.slow),
        pytest.param(dict(fsdp=8), "dora", "bert", marks=pytest.mark.slow),
        pytest.param(dict(data=2, fsdp=2, tensor=2), "lora", "bert", marks=pytest.mark.slow),
        pytest.param(dict(data=2, fsdp=2, tensor=2), "dora", "gpt2", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_any_layout_gives_the_same_numbers(layout, kind, family):
    params, losses, _ = two_steps(kind, sharding.make_mesh(**{"data": 1, **layout}), family)
    wanted, wanted_losses, _ = single_device(kind, family)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-6)
    for path, leaf in params.items():
        np.testing.assert_allclose(leaf, wanted[path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
@pytest.mark.slow
def test_bfloat16_stays_near_float32(kind):
    params, losses, before = two_steps(kind, sharding.make_mesh(), dtype="bfloat16")
    wanted, wanted_losses, _ = single_device(kind)
    np.testing.assert_allclose(losses, wanted_losses, rtol=5e-3)
    norm = lambda leaves: np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves))
    moved = norm(wanted[name] - x for name, x in before.items())
    assert norm(params[name] - wanted[name] for name in before) < 0.1 * moved
