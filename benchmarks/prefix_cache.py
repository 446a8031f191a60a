"""Epochs of the last layers alone, with their frozen prefix computed each time, and once.

    python benchmarks/prefix_cache.py --variant=base --layers=1

Needs nothing but fmjax. Both sides train the same random BERT on the same docstrings in the same
order, from the first step to the end of each epoch (batches read and cut, step, no evaluation);
their last losses must agree. Computing the prefix costs what the `once` line says; `0` layers is a
head on features.
"""

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from fmjax.config import load
from fmjax.distributed import signals
from fmjax.params import sharding
from fmjax.training import feature_cache, loop, setup, state
from fmjax.training.vmapped_runs import VmappedRuns

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--variant", default="base")
    parser.add_argument("--layers", type=int, default=1, help="that train, counted from the last")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=7)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        epochs = {name: side(flags, cache, name == "once") for name in ("always", "once")}
        seconds: dict[str, list[float]] = {name: [] for name in epochs}
        last = {name: epoch() for name, epoch in epochs.items()}  # compiles
        for _ in range(flags.epochs):
            for name, epoch in epochs.items():
                start = time.perf_counter()
                last[name] = epoch()
                seconds[name].append(time.perf_counter() - start)
    assert abs(last["always"] - last["once"]) < 1e-4, f"not the same training: {last}"
    pairs = zip(seconds["always"], seconds["once"], strict=True)
    ratios = sorted(always / once for always, once in pairs)
    for name, values in seconds.items():
        print(f"{name:7} {statistics.median(values):8.3f} s an epoch")
    print(f"ratio   {statistics.median(ratios):8.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})")


def side(flags: argparse.Namespace, cache: str, once: bool) -> Callable[[], float]:
    """Trains one epoch at each call, and gives the last loss."""
    moving = "|".join(["head/.*", *(f"block_-{i}/.*" for i in range(1, flags.layers + 1))])
    words = {
        "init": "",
        "batch_size": flags.batch,
        "groups": ((moving, "train"), (".*", "freeze")),
        "cache_prefix": once,
        "data.seq_len": flags.seq,
        "data.max_documents": flags.examples,
        "data.cache": cache,
        "tokenizer.name": "train",
        "model.name": "bert",
        "model.variant": flags.variant,
        "model.dropout": 0.0,
        "model.attention_dropout": 0.0,
    }
    given = load.load(
        str(ROOT / "configs/finetune.py"),
        [f"--config.{key}={value}" for key, value in words.items()],
    )
    run = setup.setup(given, sharding.make_mesh())
    create = functools.partial(state.create, run.abstract, run.model, run.optimizer.tx)
    holder: dict[str, Any] = {"state": create(run.split, given.seed, None)}
    start = time.perf_counter()
    vmapped = VmappedRuns((run,))
    if once:
        vmapped = VmappedRuns(feature_cache.cached([run], holder["state"].params))
    run = vmapped.padded_run
    if once:
        print(f"once    {time.perf_counter() - start:8.3f} s, compilation included, for the prefix")
    silent = lambda name: contextlib.nullcontext()
    nothing = SimpleNamespace(timed=silent, doing=silent, flops={})
    train_step, _ = loop.compiled(vmapped, [nothing], (), signals.Stop())
    batches = loop.train_batches(vmapped)
    steps = len(run.dataset.splits["train"]) // flags.batch

    def epoch() -> float:
        for _ in range(steps):
            batch = sharding.put(next(batches), run.batch_sharding)
            holder["state"], found = train_step(holder["state"], batch)
        return float(found["loss"])

    print(f"{steps} steps of {flags.batch} on {jax.devices()[0].device_kind}")
    return epoch


if __name__ == "__main__":
    main()
