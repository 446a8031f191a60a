"""One fine-tuning step of a classifier against transformers + peft on torch: same weights, batch,
optimizer and dropout.

    python benchmarks/finetune_step.py --variant=base --batch=16 --seq=128

Needs torch and peft (`pip install torch peft`). For each method both losses must agree before
anything is timed. Steps are timed in turn; the ratio is theirs / ours for neighbours, so above 1 we
are faster. The methods:

    full   everything trains
    lora   rank 8 beside every linear layer of the blocks; and pooler and classifier
    last2  the last two layers, pooler and classifier
    head   pooler and classifier

`--method` picks one, `--memory=ours` or `theirs` runs one side alone and prints its peak memory.
"""

import argparse
import resource
import statistics
import tempfile
import time

import jax
import numpy as np
import peft
import sides
import torch
import transformers

from fmjax.objectives import classify

METHODS = ("full", "lora", "last2", "head")
TARGETS = (("block_.*/(attn|mlp)/.*", None),)
LINEAR = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--memory", choices=["ours", "theirs"])
    flags = parser.parse_args()
    rng = np.random.default_rng(0)
    print(
        f"{flags.variant} {flags.batch} x {flags.seq} {flags.precision}, dropout {flags.dropout}, "
        f"{flags.runs} alternated runs on {jax.devices()[0].device_kind}\n"
        f"jax {jax.__version__}, torch {torch.__version__}{' compiled' * flags.compile}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}\n"
        f"{'':6} {'torch s':>9} {'ours s':>9}  torch / ours: median (min … max)   full / this",
        flush=True,
    )
    full = None
    for method in [flags.method] if flags.method else METHODS:
        seconds = measured(method, flags, batch(rng, flags))
        if flags.memory:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{method}: {flags.memory}: peak {peak:.2f} GiB")
            return
        middle = {side: statistics.median(values) for side, values in seconds.items()}
        full = full or middle["ours"]
        pairs = zip(seconds["theirs"], seconds["ours"], strict=True)
        ratios = sorted(theirs / ours for theirs, ours in pairs)
        print(
            f"{method:6} {middle['theirs']:9.3f} {middle['ours']:9.3f}  "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})"
            f"{'':14}{full / middle['ours']:.2f}",
            flush=True,
        )


def measured(method: str, flags: argparse.Namespace, arrays: dict) -> dict[str, list[float]]:
    """{side: seconds of each step}."""
    with tempfile.TemporaryDirectory() as folder:
        reference = sides.peer(flags, folder, transformers.BertForSequenceClassification)
        dense = reference.classifier
        head = {"kernel": dense.weight.detach().numpy().T, "bias": dense.bias.detach().numpy()}
        runs = {}
        if flags.memory != "theirs":
            moving = {"full": ".*", "lora": ".*/lora_.|head/.*", "head": "head/.*"}
            moving["last2"] = "block_-[12]/.*|head/.*"
            patterns = [(moving[method], "train"), (".*", "freeze")][: 1 + (method != "full")]
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
        if flags.memory != "ours":
            runs["theirs"] = sides.theirs(frozen(reference, method, flags), flags)
    given = {"ours": arrays}
    keys = {"input_ids": "input_ids", "attention_mask": "segment_ids", "labels": "labels"}
    given["theirs"] = {name: arrays[key].astype(np.int64) for name, key in keys.items()}
    found = [side.loss(given[name]) for name, side in runs.items()]
    allowed = 1e-4 if flags.precision == "float32" else 2e-2
    assert max(found) - min(found) < allowed, f"the sides do not compute the same: {found}"
    for name, side in runs.items():
        side.step(given[name]), side.step(given[name])
    seconds = {name: [] for name in runs}
    for _ in range(flags.runs):
        for name, side in runs.items():
            start = time.perf_counter()
            side.step(given[name])
            seconds[name].append(time.perf_counter() - start)
    return seconds


def frozen(model, method: str, flags: argparse.Namespace):
    """The peer with what the method trains."""
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
