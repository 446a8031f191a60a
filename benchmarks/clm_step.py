"""One causal-language-model training step of ours against transformers and nanoGPT on torch: same
weights, batch and optimizer.

    python benchmarks/clm_step.py --variant=gpt2 --batch=4 --seq=256 --nanogpt=<its folder>

Needs torch (`pip install torch`), and peft with `--method=lora`, which is rank 8 beside every
linear layer of the blocks: there query, key and value are one layer and have one adapter, here
three. Before anything is timed, all losses must agree. Rounds have two steps of each side, of which
the second is timed; ratios are of neighbours: theirs / ours, so above 1 we are faster. `--compile`
compiles the peers. `--memory` runs each side in a process of its own instead, three steps, and
prints the peaks. nanoGPT has its GELU replaced by GPT-2's, and fused AdamW.
"""

import argparse
import functools
import importlib.util
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import sides

from fmjax.objectives import clm

# In nanoGPT a Linear, whose weight is (out, in), where transformers has (in, out).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TARGETS = (("block_.*/(attn|mlp)/.*", None),)


def main() -> None:
    parser = sides.arguments(__doc__, ["tiny", "gpt2", "medium"])
    parser.set_defaults(batch=4, seq=256, dropout=0.0)
    parser.add_argument("--method", choices=["full", "lora"], default="full")
    parser.add_argument("--nanogpt", help="folder of its model.py: a peer beside transformers")
    parser.add_argument("--memory", action="store_true", help="peaks instead of seconds")
    flags = parser.parse_args()
    names = ["transformers", *["nanogpt"] * bool(flags.nanogpt), "ours"]
    packages = ("jax", "torch", "transformers", "peft")
    print(
        f"{flags.variant} {flags.batch} x {flags.seq} {flags.precision}, {flags.method}, "
        f"dropout {flags.dropout}, remat {flags.remat}, {flags.runs} rounds on "
        f"{jax.devices()[0].device_kind}\n"
        + ", ".join(f"{name} {version(name)}" for name in packages)
        + " compiled" * flags.compile,
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        apart(write, flags, folder)
        if flags.memory:
            peaks = {name: apart(peak_gib, name, flags, folder) for name in names}
            for name, peak in peaks.items():
                print(f"{name:12} peak {peak:6.2f} GiB, ours / this {peaks['ours'] / peak:.2f}")
            return
        made = {name: side_of(name, flags, folder) for name in names}
    losses = {name: side.loss(arrays) for name, (side, arrays) in made.items()}
    print("loss before the first update, without dropout:", losses)
    allowed = 1e-4 if flags.precision == "float32" else 2e-2
    assert max(losses.values()) - min(losses.values()) < allowed, "sides do not compute the same"

    seconds = {name: [] for name in names}
    for side, arrays in made.values():
        side.step(arrays), side.step(arrays)
    for _ in range(flags.runs):
        for name, (side, arrays) in made.items():
            side.step(arrays)  # what the others left cold
            start = time.perf_counter()
            side.step(arrays)
            seconds[name].append(time.perf_counter() - start)
    print(f"{'':12} {'median s':>9} {'min':>7} {'max':>7} {'tok/s':>7}  this / ours")
    for name, found in seconds.items():
        each = [a / b for a, b in zip(found, seconds["ours"], strict=True)]
        middle = statistics.median(found)
        print(
            f"{name:12} {middle:9.3f} {min(found):7.3f} {max(found):7.3f} "
            f"{flags.batch * flags.seq / middle:7.0f}  {statistics.median(each):.2f} "
            f"({min(each):.2f} … {max(each):.2f}), "
            f"of minima {min(found) / min(seconds['ours']):.2f}"
        )


def apart(function: Any, *args: Any) -> Any:
    """What `function` gives in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def write(flags: argparse.Namespace, folder: str) -> None:
    """The weights that all sides start from."""
    sides.decoder(flags, folder)


def peak_gib(name: str, flags: argparse.Namespace, folder: str) -> float:
    """Most memory of this process in three steps; a peer's without what this file imports."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    side, arrays = side_of(name, flags, folder)
    for _ in range(3):
        side.step(arrays)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak - before * (name != "ours")) / 2**20


def side_of(name: str, flags: argparse.Namespace, folder: str) -> tuple[sides.Side, dict]:
    """(side, its arrays): full rows of random tokens, all but the first of each targets."""
    ids = np.random.default_rng(0).integers(0, 50257, (flags.batch, flags.seq))
    if name != "ours":
        model = theirs(name, flags, folder)
        return sides.theirs(model, flags), {"input_ids": ids, "labels": ids}
    ids = ids.astype(np.int32)
    places = np.broadcast_to(np.arange(flags.seq, dtype=np.int32), ids.shape)
    arrays = {"input_ids": ids, "segment_ids": np.ones_like(ids), "positions": places}
    arrays |= {"token_types": np.zeros_like(ids), "index": np.arange(len(ids), dtype=np.int32)}
    lora = flags.method == "lora"
    side = sides.ours(
        folder,
        flags,
        "clm",
        functools.partial(clm.loss_fn, vocab=SimpleNamespace(bytes=None)),
        patterns=((".*/lora_.", "train"), (".*", "freeze")) if lora else ((".*", "train"),),
        adapter=dict(name="lora", targets=TARGETS, rank=8, alpha=16.0) if lora else None,
    )
    return side, arrays


def theirs(name: str, flags: argparse.Namespace, folder: str) -> Any:
    """The peer with the weights of `folder`, called as those of transformers are."""
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa")
    if name == "nanogpt":
        return _nanogpt(model, flags)
    if flags.method == "lora":
        import peft

        every = ["c_attn", "c_proj", "c_fc"]
        how = dict(r=8, lora_alpha=16, target_modules=every, fan_in_fan_out=True)
        model = peft.get_peft_model(model, peft.LoraConfig(**how))
    return model


def _nanogpt(model: Any, flags: argparse.Namespace) -> Any:
    import torch

    if flags.method != "full":
        raise SystemExit("nanoGPT has no LoRA: leave --nanogpt out")
    spec = importlib.util.spec_from_file_location("nanogpt", Path(flags.nanogpt, "model.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module  # where torch.compile looks for its classes
    spec.loader.exec_module(module)
    cfg = model.config
    sizes = dict(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd)
    sizes |= dict(block_size=cfg.n_positions, vocab_size=cfg.vocab_size, bias=True)
    peer = module.GPT(module.GPTConfig(dropout=flags.dropout, **sizes))
    weights = {k: v.T if k.endswith(TRANSPOSED) else v for k, v in model.state_dict().items()}
    peer.load_state_dict(weights, strict=False)
    for block in peer.transformer.h:
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = peer

        def forward(self, input_ids, labels):
            ahead = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-1)
            return SimpleNamespace(loss=self.model(input_ids, ahead)[1])

    return Called()


if __name__ == "__main__":
    main()
