"""What a method costs, of models at full size and without memory: FLOPs, optimizer, checkpoint.

The numbers follow from the shapes. The compiler's own count of memory is in test_train.py.
"""

import functools

import jax
import pytest
from tiny import OPTIM, VOCAB

from fmjax import adapters, build, objectives
from fmjax.adapters import merge
from fmjax.models import bert, gpt2, param_init
from fmjax.params import groups, paths, sharding
from fmjax.training import flops, optim, setup, state
from fmjax.training.step import make_train_step

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
    step, abstract, moving, _ = assembled(model, METHODS[method], {"classify": {}})
    optimizer = paths.nbytes(abstract.opt_state)
    kept = paths.nbytes(abstract.replace(params=moving, rng=abstract.step))
    return flops.count(step, abstract, batch(BATCH)), paths.size(moving), optimizer, kept


def assembled(model, patterns, losses):
    """(the step, its abstract state, what trains in it, the model as it is stacked)."""
    net, assigned = setup.grouped(model, patterns, OPTIM, {})
    split = functools.partial(groups.split, assigned=assigned)
    moving = split(param_init.abstract_params(net))[0]
    tx = optim.make(
        moving,
        assigned,
        steps=lambda _: 100,
        depths={"": net.cfg.depth},
        optim=OPTIM,
        group_optim={},
    ).tx
    abstract = state.abstract(net, tx, split, sharding.make_mesh())
    goals = objectives.build(losses, dict(vocab=VOCAB, target="classes"))
    return make_train_step(build.apply(net), goals, tx, split), abstract, moving, net


def batch(rows):
    names = ("input_ids", "segment_ids", "positions", "token_types")
    found = dict.fromkeys(names, jax.ShapeDtypeStruct((rows, TIME), "int32"))
    found["units"] = jax.ShapeDtypeStruct((rows,), "int32")
    one = jax.ShapeDtypeStruct((rows,), "int32")
    return found | dict.fromkeys(("index", "labels"), one)


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


# --- GPT-3 with LoRA of rank 4 beside queries and values (Hu et al. 2021, section 4.2) ---

GPT3 = dict(width=12288, depth=96, heads=96, mlp=4 * 12288, max_len=2048)
QV = dict(name="lora", targets=(("block_.*/attn/(query|value)", 4),))


@functools.cache
def gpt3(method):
    model = gpt2.Model("gpt2", **GPT3, dropout=0.0, attention_dropout=0.0)
    if method == "full":
        return assembled(model, METHODS["full"], {"clm": {}})
    return assembled(
        adapters.wrap(model, dict(adapter=QV)),
        ((".*/lora_.", "train"), (".*", "freeze")),
        {"clm": {}},
    )


def test_of_gpt3_lora_trains_one_parameter_in_9251():
    """Which the paper rounds to 10,000. Of a layer 12 D² + 13 D, of the embeddings (V + T) D, of
    the last norm 2 D; of the adapter two pairs of 4 (D + D) a layer."""
    width, depth = GPT3["width"], GPT3["depth"]
    trained = depth * 2 * 4 * (width + width)
    whole = depth * (12 * width**2 + 13 * width) + (50257 + 2048) * width + 2 * width
    assert (trained, whole) == (18_874_368, 174_604_259_328)
    assert paths.size(gpt3("lora")[2]) == trained
    assert paths.size(gpt3("full")[2]) == whole
    assert paths.size(gpt3("lora")[1].params) == whole + trained
    assert round(whole / trained) == 9251


def test_of_gpt3_lora_saves_moments_and_gradients_by_the_compilers_count():
    """12 of 16 bytes a parameter, in float32, of a step of all 96 layers with a row a device: 0.76
    TB instead of 3.72."""

    def taken(method):
        step, abstract, *_ = gpt3(method)
        compiled = jax.jit(step, donate_argnums=0).lower(abstract, batch(8)).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes
        return memory.argument_size_in_bytes, memory.temp_size_in_bytes

    whole, trained = (paths.size(gpt3(method)[2]) for method in ("full", "lora"))
    (full, between), (lora, little) = taken("full"), taken("lora")
    assert full == pytest.approx(12 * whole, rel=1e-4)
    assert lora == pytest.approx(4 * whole + 12 * trained, rel=1e-4)
    assert between > 4 * whole > 10 * little
    assert full + between > 4.8 * (lora + little)


def test_merged_into_gpt3_lora_costs_nothing():
    """Where text is read the program is the base's, to the letter; unmerged it multiplies more."""
    _, abstract, _, model = gpt3("lora")
    merged = jax.eval_shape(lambda params: merge.merge(model, params), abstract.params)

    def program(model, params):
        rows = [batch(1)[name] for name in ("input_ids", "segment_ids", "positions", "token_types")]
        encode = lambda params, *rows: model.apply({"params": params}, *rows, method="encode")
        return jax.jit(encode).lower(params, *rows)

    base = program(model.model, param_init.abstract_params(model.model))
    assert program(model.model, merged).as_text() == base.as_text()
    assert program(model, abstract.params).as_text() != base.as_text()
