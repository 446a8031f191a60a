"""Training steps compiled for TPU slices without a TPU: they fit, and move no more than they must.

Needs libtpu, the compiler (`pip install -e '.[tpu]'`), and a quarter of an hour on two cores. Each
case prints a row of the table in benchmarks/RESULTS.md (`-s` shows it).
"""

import importlib.util
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import ROOT, least_sent
from jax.experimental import topologies

from fmjax import build, data
from fmjax.config import load as configs
from fmjax.data.settings import DataSettings, read
from fmjax.data.texts import TextDataset
from fmjax.distributed import collective_bytes
from fmjax.params import paths, sharding
from fmjax.training import setup
from fmjax.training.step import make_train_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is missing: pip install -e '.[tpu]'",
    ),
]
GIB = 2**30
MEMORY = {
    "v5e:4x4": 16 * GIB,
    "v5e:4x8": 16 * GIB,
    "v5p:2x2x2": 95 * GIB,
}  # per chip: cloud.google.com/tpu/docs
# What libtpu calls the last pass before it writes collectives as the algorithms of its network.
PARTITIONED = "after_reduce-scatter-reassociate"
FLASH = dict(attention="tpu", attention_dropout=0.0)
PHASE_1 = dict(seq_len=128)  # as published, with dropout of attention probabilities
PHASE_2 = dict(seq_len=512) | FLASH
GPT2 = dict(name="gpt2", seq_len=1024, batch_size=32, remat="block") | FLASH
LLAMA = dict(name="llama", seq_len=2048, batch_size=32, remat="block") | FLASH
SIZES = dict(bert=30522, gpt2=50257, llama=128256)  # of the vocabularies
# Of what must be sent. Before libtpu moves it out of a loop, a decoder's table of tokens is brought
# together for each piece of the vocabulary's loss.
MOST = dict(bert=1.10, gpt2=1.25, llama=1.25)


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """libtpu asks no metadata server and locks no chips; every program is really compiled."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.parametrize(
    "variant, topology, layout, options",
    [
        ("base", "v5e:4x4", dict(data=16), PHASE_1),
        ("base", "v5e:4x4", dict(fsdp=16), PHASE_1),
        ("base", "v5p:2x2x2", dict(data=8), PHASE_2),
        ("base", "v5p:2x2x2", dict(data=2, fsdp=4), PHASE_2),
        ("large", "v5e:4x4", dict(data=16), PHASE_1),
        ("large", "v5e:4x4", dict(fsdp=16), PHASE_2 | dict(remat="dots")),
        ("large", "v5e:4x4", dict(data=4, fsdp=4), PHASE_1),
        ("large", "v5p:2x2x2", dict(data=8), PHASE_2),
        ("large", "v5p:2x2x2", dict(fsdp=8), PHASE_1),
        ("xl", "v5e:4x4", dict(fsdp=16), GPT2),
        ("xl", "v5p:2x2x2", dict(data=2, fsdp=4), GPT2),
        ("llama3_8b", "v5e:4x8", dict(fsdp=32), LLAMA),
        ("llama3_8b", "v5p:2x2x2", dict(fsdp=8), LLAMA),
    ],
    ids=lambda x: "".join(f"{k}{v}" for k, v in x.items()) if isinstance(x, dict) else x,
)
def test_step_fits_and_moves_no_more_than_it_must(variant, topology, layout, options, tmp_path):
    run = assemble(variant, topology, layout, **options)
    begin = time.monotonic()
    compiled = compile_step(run, tmp_path)
    seconds = time.monotonic() - begin

    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    total = arguments + memory.temp_size_in_bytes + memory.output_size_in_bytes
    total -= memory.alias_size_in_bytes
    sent = collective_bytes.sent(partitioned(tmp_path))
    itemsize = jnp.dtype(run.config.precision).itemsize
    least = least_sent(run.abstract.params, run.mesh, itemsize)
    ratio = sum(sent.values()) / least
    print(
        f"\n| {variant} | {topology} | {layout} | {run.config.data.seq_len} | "
        f"{arguments / GIB:.2f} | {total / GIB:.2f} | {sum(sent.values()) / 1e6:,.0f} | "
        f"{least / 1e6:,.0f} | {ratio:.3f} | {seconds:.0f} |"
        f"\n{sent}\nas libtpu writes it: {collective_bytes.sent(compiled.as_text())}"
    )
    assert total < MEMORY[topology]
    assert memory.alias_size_in_bytes > 0.99 * arguments, "the state is updated in place"
    # Parameters and two moments, in float32; the gradient, which makes it 16, is no argument.
    state = 12 * paths.size(run.abstract.params) / run.mesh.shape["fsdp"]
    assert arguments <= 1.05 * state
    assert ratio <= MOST[run.config.model.name], sent


def assemble(variant, topology, layout, *, seq_len, batch_size=256, name="bert", **model):
    """A run of configs/mlm.py:bert_base, or of configs/clm.py with the model `name`, on a slice,
    with a stand-in for its vocabulary."""
    sizes = {axis: layout.get(axis, 1) for axis in sharding.AXES}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = topologies.make_mesh(devices, tuple(sizes.values()), sharding.AXES)
    settings = {"data.seq_len": seq_len, "batch_size": batch_size, "precision": "bfloat16"}
    model |= dict(name=name, variant=variant)
    settings |= {f"model.{key}": value for key, value in model.items()}
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    file = "mlm.py:bert_base" if name == "bert" else "clm.py"
    config = configs.load(f"{ROOT}/configs/{file}", words)
    sharding.check_batch(mesh, config.batch_size)
    none = np.zeros(SIZES[name], bool)
    vocab = data.Vocab(len(none), 0, 1, (2,), (3,), none, none)
    settings = read(DataSettings, config.data.to_dict(), "data")
    dataset = TextDataset({}, "", "", {}, vocab=vocab, settings=settings)
    return setup.assemble(config, mesh, dataset, rows=10**8, units=10**8 * seq_len, flops=1)


def compile_step(run, folder):
    """The step of `train.compiled`, with the program written down after partitioning."""
    rows, time_ = run.config.batch_size, run.config.data.seq_len
    shapes = dict.fromkeys(
        ("input_ids", "segment_ids", "positions", "token_types"), (rows, time_)
    ) | {"index": (rows,)}
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=run.batch_sharding)
        for name, shape in shapes.items()
    }
    step = make_train_step(build.apply(run.model), run.objectives, run.optimizer.tx, run.split)
    with jax.set_mesh(run.mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(run.abstract, batch)
        return lowered.compile(
            {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": PARTITIONED.removeprefix("after_")}
        )


def partitioned(folder):
    """The program as it was handed to the network: partitioned, with sums of sums merged."""
    passes = sorted(folder.glob(f"*{PARTITIONED}*.txt"))
    assert passes, f"{sorted(os.listdir(folder))}: this libtpu has no pass {PARTITIONED}"
    return passes[-1].read_text()
