"""A quantised base: making a matrix whole, ours and qwix's; and a LoRA step over it.

    python benchmarks/quantised.py --variant=base --batch=16 --seq=128

Needs qwix for the first table (`pip install qwix`). One matrix of the MLP: the product of the rows
of a batch with it, and what making it of its codes takes. Then steps of the classifier of
`finetune_step.py` with rank 8 beside every linear layer of the blocks, in rounds of one step of
each, of which every other one is timed; ratios are of neighbours: quantised / whole. Last what
reading the model from a folder in Hugging Face format takes of the host's memory, each in a process
of its own (Linux): the most that it had beyond what it began with, mapped files apart.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import finetune_step
import jax
import jax.numpy as jnp
import numpy as np
import sides

from fmjax import adapters, convert
from fmjax.adapters import quantise
from fmjax.models import bert, param_init
from fmjax.objectives import classify
from fmjax.params import paths

TARGETS = r"block_.*/(attn|mlp)/.*"


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--only", default="matrix,steps,loading", help="which parts")
    parser.add_argument("--load", nargs=2, help="a scheme and a folder: what `loading` starts")
    flags = parser.parse_args()
    if flags.load:
        load(*flags.load, flags)
        return
    print(
        f"{flags.variant} {flags.batch} x {flags.seq} {flags.precision}, {flags.runs} rounds on "
        f"{jax.devices()[0].device_kind}, jax {version('jax')}, qwix {version('qwix')}"
    )
    model = bert.Model(flags.variant, lm_head=False, classes={"classify": 2})
    parts = flags.only.split(",")
    if "matrix" in parts:
        matrix(model.cfg, flags)
    with tempfile.TemporaryDirectory() as folder:
        convert.export(folder + "/hf", model, param_init.init_params(model, jax.random.key(0)))
        if "steps" in parts:
            steps(folder + "/hf", flags)
        for name in ("whole", *quantise.SCHEMES) if "loading" in parts else ():
            words = [f"--variant={flags.variant}", "--load", name, folder + "/hf"]
            subprocess.run([sys.executable, __file__, *words], check=True)


def matrix(cfg, flags) -> None:
    """Milliseconds of the product, and of each way to the whole matrix."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((cfg.width, cfg.mlp), np.float32))
    x = jnp.asarray(rng.standard_normal((flags.batch * flags.seq, cfg.width), np.float32))
    ways = {"product": (jax.jit(jnp.dot), (x, weight))}
    for name, scheme in quantise.SCHEMES.items():
        ways[name] = jax.jit(scheme.unpack), (jax.jit(scheme.pack)(weight),)
    from qwix._src.core import qarray

    tiles = dict(channelwise_axes=[1], tiled_axes={0: quantise.BLOCK})
    how = qarray.HowToQuantize(qtype="nf4", **tiles)
    ways["nf4, qwix"] = (
        jax.jit(qarray.dequantize),
        (jax.jit(lambda w: qarray.quantize(w, how))(weight),),
    )
    seconds = alternated(
        {name: lambda f=f, a=a: f(*a) for name, (f, a) in ways.items()}, flags.runs
    )
    for name, times in seconds.items():
        leaves = jax.tree.leaves(ways[name][1])
        # jax counts a byte for half of one.
        size = sum(x.nbytes / (2 if x.dtype == jnp.uint4 else 1) for x in leaves) / weight.size
        held = "" if name == "product" else f"{size:6.3f} bytes a weight"
        print(f"{name:10} {1e3 * statistics.median(times):8.2f} ms  {held}")


def steps(folder, flags) -> None:
    """Seconds a step, and bytes of the frozen part."""
    arrays = finetune_step.batch(np.random.default_rng(0), flags)
    lora = dict(name="lora", targets=finetune_step.TARGETS, rank=8, alpha=16.0)
    runs = {}
    for name in ("whole", *quantise.SCHEMES):
        runs[name] = sides.ours(
            folder, flags, "classify", classify.loss_fn,
            patterns=[(".*/lora_.|head/.*", "train"), (".*", "freeze")],
            adapter=lora, quantise=None if name == "whole" else dict(name=name, targets=TARGETS),
            classes={"classify": 2}, lm_head=False,
        )  # fmt: skip
    seconds = alternated(
        {name: lambda side=side: side.step(arrays) for name, side in runs.items()}, flags.runs
    )
    for name, times in seconds.items():
        print(
            f"{name:6} {statistics.median(times):8.3f} s  "
            f"{finetune_step.ratios(times, seconds['whole'])} x  loss {runs[name].loss(arrays):.4f}"
        )
    bare = bert.Model(flags.variant, lm_head=False).clone(stacks=None)
    blocks = {
        n: x for n, x in paths.unstack(param_init.abstract_params(bare)).items()
        if n.startswith("block_") and n.endswith("/kernel")
    }  # fmt: skip
    print(f"{sum(x.size for x in blocks.values()):,} weights in the matrices of the blocks")


def load(name, folder, flags) -> None:
    """Prints what reading the model with its base as `name` says takes."""
    model = bert.Model(flags.variant, lm_head=False, classes={"classify": 2})
    if name != "whole":
        model = quantise.wrap(model, name=name, targets=TARGETS)
    model = model.clone(stacks=paths.runs(model.kinds))
    abstract, packings = param_init.abstract_params(model), adapters.packings(model)
    jax.block_until_ready(jnp.zeros(1))
    most, done = [anonymous()], threading.Event()

    def watch():
        while not done.wait(0.002):
            most.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    params, _ = convert.load(Path(folder), abstract, packings=packings)
    jax.block_until_ready(params)
    done.set()
    thread.join()
    mib = [(max(most) - most[0]) / 2**20, paths.nbytes(params) / 2**20]
    print(f"{name:6} reading takes {mib[0]:,.0f} MiB at most, the model has {mib[1]:,.0f} MiB")


def anonymous() -> int:
    """Bytes of this process that are no mapped file's."""
    told = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", told)[1])


def alternated(ways, runs) -> dict[str, list[float]]:
    """Seconds of each, in rounds; each timed call follows one that is not."""
    seconds = {name: [] for name in ways}
    for _ in range(runs + 1):
        for name, call in ways.items():
            jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


if __name__ == "__main__":
    main()
