"""One fine-tuning step of a classifier against transformers + peft on torch: same weights, batch,
optimizer and dropout.

    python benchmarks/finetune_step.py --variant=base --batch=16 --seq=128

Needs torch and peft (`pip install torch peft`). For each method both losses must agree before
anything is timed. Rounds have two steps of each method on each side, of which the second is timed;
the ratios are of neighbours: theirs / ours, and our full step / this. The methods:

    full   everything trains
    lora   rank 8 beside every linear layer of the blocks; and pooler and classifier
    last2  the last two layers, pooler and classifier
    head   pooler and classifier

`--method` picks one, `--memory=ours` or `theirs` runs one side alone and prints its peak memory.
"""

import argparse
import functools
import multiprocessing
import resource
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import sides
from safetensors import safe_open

from fmjax.objectives import classify

METHODS = ("full", "lora", "last2", "head")
TARGETS = (("block_.*/(attn|mlp)/.*", None),)
LINEAR = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--memory", choices=["ours", "theirs"])
    flags = parser.parse_args()
    if flags.memory and not flags.method:
        parser.error("--memory wants a --method")
    print(
        f"{flags.variant} {flags.batch} x {flags.seq} {flags.precision}, dropout {flags.dropout}, "
        f"{flags.runs} rounds on {jax.devices()[0].device_kind}\n"
        + ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers", "peft"))
        + " compiled" * flags.compile,
        flush=True,
    )
    before = peak_gib()
    arrays = batch(np.random.default_rng(0), flags)
    keys = {"input_ids": "input_ids", "attention_mask": "segment_ids", "labels": "labels"}
    given = {"theirs": {name: arrays[key].astype(np.int64) for name, key in keys.items()}}
    given["ours"] = arrays
    methods = [flags.method] if flags.method else METHODS
    steps = {}
    for method in methods:
        runs = sides_of(method, flags)
        found = [side.loss(given[name]) for name, side in runs.items()]
        allowed = 1e-4 if flags.precision == "float32" else 2e-2
        assert max(found) - min(found) < allowed, f"the sides do not compute the same: {found}"
        for name, side in runs.items():
            steps[method, name] = functools.partial(side.step, given[name])
            steps[method, name](), steps[method, name]()
    if flags.memory:
        # Theirs without what the imports of this file took before it began.
        peak = peak_gib() - (before if flags.memory == "theirs" else 0)
        print(f"{methods[0]}: {flags.memory}: peak {peak:.2f} GiB")
        return
    seconds = {key: [] for key in steps}
    for _ in range(flags.runs):
        for key, step in steps.items():
            step()  # A virtual machine may have given away the memory that others did not use.
            start = time.perf_counter()
            step()
            seconds[key].append(time.perf_counter() - start)
    print(f"{'':6} {'torch s':>9} {'ours s':>9}  {'torch / ours':20} our {methods[0]} / this")
    for method in methods:
        theirs, ours = seconds[method, "theirs"], seconds[method, "ours"]
        print(
            f"{method:6} {statistics.median(theirs):9.3f} {statistics.median(ours):9.3f}  "
            f"{ratios(theirs, ours):20} {ratios(seconds[methods[0], 'ours'], ours)}"
        )


def peak_gib() -> float:
    """Most memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ratios(slow: list[float], fast: list[float]) -> str:
    """The median (min … max) of the rounds."""
    each = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return f"{statistics.median(each):.2f} ({each[0]:.2f} … {each[-1]:.2f})"


def sides_of(method: str, flags: argparse.Namespace) -> dict[str, sides.Side]:
    """{"ours", "theirs": side}, or the one that `--memory` asks for."""
    runs, kind = {}, "BertForSequenceClassification"
    with tempfile.TemporaryDirectory() as folder:
        if flags.memory == "ours":  # without torch in this process
            spawned = multiprocessing.get_context("spawn")
            child = spawned.Process(target=sides.peer, args=(flags, folder, kind))
            child.start(), child.join()
        else:
            reference = sides.peer(flags, folder, kind)
            runs["theirs"] = sides.theirs(frozen(reference, method, flags), flags)
        if flags.memory != "theirs":
            moving = {"full": ".*", "lora": ".*/lora_.|head/.*", "head": "head/.*"}
            moving["last2"] = "block_-[12]/.*|head/.*"
            patterns = [(moving[method], "train"), (".*", "freeze")][: 1 + (method != "full")]
            with safe_open(Path(folder, "model.safetensors"), "numpy") as file:
                kernel, bias = (file.get_tensor(f"classifier.{k}") for k in ("weight", "bias"))
            head = {"kernel": kernel.T, "bias": bias}
            lora = dict(name="lora", targets=TARGETS, rank=8, alpha=16.0)
            runs["ours"] = sides.ours(
                folder,
                flags,
                "classify",
                classify.loss_fn,
                patterns=patterns,
                adapter=lora if method == "lora" else None,
                heads={"classify": {k: jax.numpy.asarray(v) for k, v in head.items()}},
                classes={"classify": 2},
                lm_head=False,
            )
    return runs


def frozen(model, method: str, flags: argparse.Namespace):
    """The peer with what the method trains."""
    import peft

    if method == "lora":
        adapter = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=LINEAR, modules_to_save=["classifier", "pooler"]
        )
        return peft.get_peft_model(model, adapter)
    last = [f"encoder.layer.{model.config.num_hidden_layers - i}." for i in (1, 2)]
    moving = ["classifier", "pooler", *(last if method == "last2" else [])]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = method == "full" or any(part in name for part in moving)
    return model


def batch(rng: np.random.Generator, flags: argparse.Namespace) -> dict[str, np.ndarray]:
    """Full rows of random words and classes."""
    ids = rng.integers(5, 30000, (flags.batch, flags.seq))
    arrays = {
        "input_ids": ids,
        "segment_ids": np.ones_like(ids),
        "positions": np.broadcast_to(np.arange(flags.seq), ids.shape),
        "token_types": np.zeros_like(ids),
        "index": np.arange(len(ids)),
        "labels": rng.integers(0, 2, len(ids)),
    }
    return {name: x.astype(np.int32) for name, x in arrays.items()}


if __name__ == "__main__":
    main()
