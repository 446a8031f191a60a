"""What a method costs, of models at full size and without memory: FLOPs, optimizer, checkpoint.

The numbers follow from the shapes. The compiler's own count of memory is in test_train.py.
"""

import functools

import jax
import pytest
from tiny import OPTIM

from fmjax import adapters, build, flops, groups, objectives, optim, setup, sharding, state, trees
from fmjax.models import bert
from fmjax.step import make_train_step

BATCH, TIME, CLASSES = 8, 128, 2
LORA = dict(name="lora", targets=((r"block_.*/(attn|mlp)/.*", None),), rank=8, alpha=16.0)
METHODS = {
    "full": ((".*", "train"),),
    "head": (("head/.*", "train"), (".*", "freeze")),
    "last2": (("block_-[12]/.*|head/.*", "train"), (".*", "freeze")),
    "lora": ((".*/lora_.|head/.*", "train"), (".*", "freeze")),
}


@functools.cache
def cost(variant, method):
    """(FLOPs of a step, elements that train, bytes of the optimizer, bytes of a checkpoint)."""
    model = bert.Model(variant, classes={"classify": CLASSES}, lm_head=False, dropout=0.0)
    model = adapters.wrap(model, dict(adapter=LORA) if method == "lora" else {})
    net, assigned = setup.grouped(model, METHODS[method], OPTIM, {})
    split = functools.partial(groups.split, assigned=assigned)
    moving = split(state.abstract_params(net))[0]
    tx = optim.make(
        moving, assigned, steps=lambda _: 100, depth=net.cfg.depth, optim=OPTIM, group_optim={}
    ).tx
    abstract = state.abstract(net, tx, split, sharding.make_mesh())
    goals = objectives.build({"classify": {}}, target="classes")
    step = make_train_step(build.apply(net), goals, tx, split)
    rows = jax.ShapeDtypeStruct((BATCH, TIME), "int32")
    names = ("input_ids", "segment_ids", "positions", "token_types")
    batch = dict.fromkeys(names, rows)
    batch |= dict.fromkeys(("index", "labels"), jax.ShapeDtypeStruct((BATCH,), "int32"))
    optimizer = trees.nbytes(abstract.opt_state)
    kept = trees.nbytes(abstract.replace(params=moving, rng=abstract.step))
    return flops.count(step, abstract, batch), trees.size(moving), optimizer, kept


def parts(variant):
    """(FLOPs of the products with weights, FLOPs of attention), of one layer's forward pass."""
    sizes = bert.VARIANTS[variant]
    width, mlp = sizes["width"], sizes["mlp"]
    weights = 2 * BATCH * TIME * (4 * width * width + 2 * width * mlp)
    return weights, 2 * 2 * BATCH * TIME * TIME * width


def adapter_size(variant, rank=8):
    sizes = bert.VARIANTS[variant]
    width, mlp = sizes["width"], sizes["mlp"]
    return sizes["depth"] * rank * (4 * 2 * width + 2 * (width + mlp))


@pytest.mark.parametrize("variant", ["base", "large"])
def test_only_what_trains_is_multiplied_backwards(variant):
    """Forward W; backward W for the input and W for the weight, attention twice its forward. What
    is frozen below all that trains has no backward pass at all."""
    depth = bert.VARIANTS[variant]["depth"]
    weights, attention = parts(variant)
    heads = cost(variant, "head")[0] - depth * (weights + attention)
    assert 0 < heads < 0.001 * depth * weights
    full = depth * 3 * (weights + attention) + heads
    assert abs(cost(variant, "full")[0] - full) <= 0.001 * full
    last = (depth - 2) * (weights + attention) + 2 * 3 * (weights + attention) + heads
    assert abs(cost(variant, "last2")[0] - last) <= 0.001 * last


@pytest.mark.parametrize("variant", ["base", "large"])
def test_lora_costs_two_thirds_of_full_training(variant):
    found, full = cost(variant, "lora")[0], cost(variant, "full")[0]
    assert 2 / 3 < found / full < 0.71


@pytest.mark.parametrize("variant", ["base", "large"])
@pytest.mark.parametrize("method", METHODS)
def test_optimizer_and_checkpoint_hold_only_what_trains(variant, method):
    _, number, optimizer, kept = cost(variant, method)
    counts = 8 * (bert.VARIANTS[variant]["depth"] + 8)  # of updates: two a layer
    assert 8 * number <= optimizer <= 8 * number + counts  # two moments in float32
    assert 12 * number <= kept <= 12 * number + 2 * counts


@pytest.mark.parametrize("variant", ["base", "large"])
def test_numbers_of_parameters(variant):
    width = bert.VARIANTS[variant]["width"]
    head = width * width + width + width * CLASSES + CLASSES
    assert cost(variant, "head")[1] == head
    assert cost(variant, "lora")[1] == head + adapter_size(variant)
    assert adapter_size("large") == 3_538_944
    share = cost(variant, "lora")[1] / cost(variant, "full")[1]
    assert share < 0.02
