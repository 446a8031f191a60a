"""What decides speed and can be counted: the same on a busy machine, so it gates changes.

Operands of the bfloat16 products and FLOPs by hand are in test_train.py, programs of full size in
test_tpu.py.
"""

import collections
import functools
import logging
import re

import jax
import pytest
import tiny
from common import least_sent
from runs import run_here

from fmjax.distributed import collective_bytes
from fmjax.params import paths, sharding
from fmjax.training import flops
from fmjax.training.monitor import Monitor

pytest_plugins = ["runs"]
MIB = 2**20


def on_one_device(depth, **model):
    return tiny.make(mesh=tiny.mesh(), depth=depth, dropout=0.1, attention_dropout=0.1, **model)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_program_is_as_long_for_24_layers_as_for_12(remat):
    """So is the time it takes to compile. (Two layers save some broadcasts.)"""

    def lines(depth):
        made = on_one_device(depth, remat=remat)
        return len(jax.jit(made.raw_step).lower(made.abstract, tiny.batch(8)).as_text().split("\n"))

    two, twelve, more = map(lines, (2, 12, 24))
    assert twelve == more
    assert two == pytest.approx(twelve, rel=0.01)


@functools.cache
def compiled():
    """BERT-mini (width 256, 4 layers, 4 heads), batch 16 x 128, with its state donated."""
    made = on_one_device(4, width=256, mlp=1024, max_len=128, losses={"mlm": {"rate": 0.15}})
    step = jax.jit(made.raw_step, donate_argnums=0)
    return step.lower(made.abstract, long_batch(16)).compile(), made


def long_batch(rows):
    return {
        name: jax.ShapeDtypeStruct((rows, 128)[: x.ndim], x.dtype)
        for name, x in tiny.batch(rows).items()
    }


@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize("share", ["mesh", "one device"])
def test_no_product_of_the_compiled_bfloat16_step_has_float32_operands(remat, share):
    """The program asks for it (test_train.py); this is what XLA made of it. Sums over rows, which
    are products with a vector of ones, are float32."""
    if share == "mesh":
        made = tiny.make(dtype="bfloat16", remat=remat, dropout=0.1, attention_dropout=0.1)
    else:
        made = on_one_device(3, dtype="bfloat16", remat=remat)
    text = jax.jit(made.raw_step).lower(made.abstract, tiny.batch(8)).compile().as_text()
    found = collections.Counter()
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        types = dict(re.findall(r"%([\w.-]+) = (\w+\[[\d,]*\])", computation))
        for pair in re.findall(r" dot\(%([\w.-]+), %([\w.-]+)\)", computation):
            operands = [types[name] for name in pair]
            if not any(re.search(r"\[(1,\d+|\d+,1)\]", shape) for shape in operands):
                found[tuple(shape.split("[")[0] for shape in operands)] += 1
    assert set(found) == {("bf16", "bf16")} and found.total() >= 24, found


def test_a_step_reads_the_state_once_and_writes_it_in_place():
    program, made = compiled()
    memory = program.memory_analysis()
    state = paths.nbytes(made.abstract)
    assert state == pytest.approx(12 * paths.size(made.abstract.params), rel=1e-4)
    assert memory.argument_size_in_bytes == state + paths.nbytes(long_batch(16))
    assert memory.alias_size_in_bytes == state


def test_a_step_copies_nothing_of_its_state():
    """All of it is written over at once (see `step._written`)."""
    program, _ = compiled()
    text = program.as_text()
    assert "%state_opt_state" in text
    found = re.findall(r"= f32\[[\d,]+\]\S* copy\(%state_\w*", text)
    assert not found


def test_a_step_keeps_no_more_than_it_did():
    """190 MiB when recorded, on x86 with jaxlib 0.10.2, 64 of them the attention's probabilities,
    which are the largest array: one more like them is out of bounds."""
    program, _ = compiled()
    assert program.memory_analysis().temp_size_in_bytes < 238 * MIB


def test_the_compiler_adds_no_products():
    """Its count has everything element-wise too, and the body of the scan once: one layer of 4."""
    program, _ = compiled()
    one = on_one_device(1, width=256, mlp=1024, max_len=128, losses={"mlm": {"rate": 0.15}})
    products = flops.count(one.raw_step, one.abstract, long_batch(16))
    assert products <= program.cost_analysis()["flops"] <= 1.10 * products


def test_flops_count_all_devices():
    """Work that is written for one device (`sharding.sum_rows`) counts for each of them."""
    alone = on_one_device(2)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        spread = tiny.make(mesh=mesh, depth=2)
        products = flops.count(spread.raw_step, spread.abstract, tiny.batch(8))
    assert products == flops.count(alone.raw_step, alone.abstract, tiny.batch(8))


@pytest.mark.parametrize("layout", [dict(data=8), dict(data=1, fsdp=8), dict(data=2, fsdp=4)])
def test_devices_send_each_other_no_more_than_they_must(layout):
    """Every weight twice and every gradient once; no activation, and no gradient whole."""
    mesh = sharding.make_mesh(**layout)
    with jax.set_mesh(mesh):
        made = tiny.make(mesh=mesh, depth=4, width=128, mlp=512, max_len=128, dropout=0.1)
        place = jax.NamedSharding(mesh, sharding.BATCH)
        batch = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
            for name, x in long_batch(32).items()
        }
        program = jax.jit(made.raw_step, donate_argnums=0).lower(made.abstract, batch).compile()
    sent = collective_bytes.sent(program.as_text())
    assert sum(sent.values()) <= 1.10 * least_sent(made.abstract.params, mesh, 4), sent


def test_a_run_compiles_each_step_once(home, tmp_path, monkeypatch, caplog):
    """20 steps with two evaluations and four saves, and nothing new in the second half."""
    original = Monitor.log

    def log(self, step):
        logging.getLogger("fmjax").warning("step %d", step)
        original(self, step)

    monkeypatch.setattr(Monitor, "log", log)
    with jax.log_compiles():
        flags = ("--config.total=20 steps", "--config.eval_every=10")
        run_here(home, tmp_path / "run", *flags, monkeypatch=monkeypatch)
    seen = [record.getMessage() for record in caplog.records]
    names = [re.match(r"Compiling (\S+)|(step \d+)", message) for message in seen]
    order = [match[1] or match[2] for match in names if match]
    counts = collections.Counter(order)
    assert counts["jit(train_step)"] == counts["jit(eval_step)"] == 1, counts
    assert order[order.index("step 15") :] == ["step 15", "step 20"]
