"""Texts of very different lengths: our packed rows against the peer's padded batches.

    python benchmarks/packed_text.py --variant=mini --precision=float32

Needs torch (`pip install torch`). The same texts, random tokens of lengths uniform up to `--seq`
(half of a row on average), with 15 % of each as targets. Transformers' collator pads every batch
of `--batch` texts to its longest; we pack them, best fit, into full rows and keep them apart by
segment ids. Steps are timed in turn and counted in useful tokens, those of texts, a second; the
ratio is ours / theirs for neighbours, so above 1 we are faster.
"""

import math
import statistics
import tempfile
import time

import jax
import numpy as np
import sides
import torch
import transformers

from fmjax.data import packing
from fmjax.objectives import mlm

RATE = 0.15
PAD, CLS, SEP, FIRST = 0, 1, 2, 5  # ids; texts are drawn from FIRST on
BATCHES = 8  # of the peer; we need fewer for the same texts


def main() -> None:
    flags = sides.arguments(__doc__).parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        reference = sides.peer(flags, folder)
        lengths = rng.integers(3, flags.seq + 1, BATCHES * flags.batch) - 2  # beside [CLS], [SEP]
        tokens = rng.integers(FIRST, reference.config.vocab_size, lengths.sum()).astype(np.uint16)
        starts = np.cumsum(lengths) - lengths
        rows = {
            name: packing.pack(
                tokens, starts, lengths, flags.seq, ((CLS,), (SEP,)), PAD,
                padded=name == "padded",
            )
            for name in ("padded", "packed")
        }  # fmt: skip
        runs = {
            "padded": (sides.theirs(reference, flags), padded(rng, *rows["padded"], flags.batch)),
            "packed": (
                sides.ours(folder, flags, "mlm", mlm.loss_fn),
                packed(rng, *rows["packed"], flags.batch),
            ),
        }  # fmt: skip

    for side, batches in runs.values():
        for _, arrays in batches:  # every shape is seen once before anything is timed
            side.step(arrays)
    rates = {name: [] for name in runs}
    for i in range(flags.runs):
        for name, (side, batches) in runs.items():
            useful, arrays = batches[i % len(batches)]
            start = time.perf_counter()
            side.step(arrays)
            rates[name].append(useful / (time.perf_counter() - start))
    show(flags, rates, {name: segments for name, (_, segments) in rows.items()})


def padded(rng, ids: np.ndarray, segments: np.ndarray, size: int) -> list[tuple[int, dict]]:
    """[(useful tokens, arrays)], each batch cut to its longest text, as the collator pads it."""
    batches = []
    for first in range(0, len(ids), size):
        real = segments[first : first + size] > 0
        width = real.sum(1).max()
        real, words = real[:, :width], ids[first : first + size, :width].astype(np.int64)
        labels = np.full_like(words, -100)
        places, weights = targets(rng, words)
        rows, columns = np.nonzero(weights)
        chosen = places[rows, columns]
        labels[rows, chosen] = words[rows, chosen]
        arrays = {"input_ids": words, "attention_mask": real.astype(np.int64), "labels": labels}
        batches.append((int(real.sum()), arrays))
    return batches


def packed(rng, ids: np.ndarray, segments: np.ndarray, size: int) -> list[tuple[int, dict]]:
    """[(useful tokens, arrays)] of full batches; the remainder of the rows is left out."""
    batches = []
    for first in range(0, len(ids) - size + 1, size):
        words = ids[first : first + size].astype(np.int32)
        marks = segments[first : first + size].astype(np.int32)
        places, weights = targets(rng, words)
        arrays = {
            "input_ids": words,
            "segment_ids": marks,
            "positions": packing.positions(marks),
            "token_types": np.zeros_like(words),
            "index": np.arange(size, dtype=np.int32),
            "mlm_positions": places.astype(np.int32),
            "mlm_labels": np.take_along_axis(words, places, axis=1),
            "mlm_weights": weights.astype(np.float32),
        }
        batches.append((int((marks > 0).sum()), arrays))
    return batches


def targets(rng, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions [B, K], whether each is one): RATE of the words of each row [B, T]."""
    words = ids >= FIRST
    order = np.argsort(rng.random(ids.shape) + ~words, axis=1)[:, : math.ceil(RATE * ids.shape[1])]
    count = np.round(RATE * words.sum(1)).astype(int)
    return order, np.arange(order.shape[1])[None] < count[:, None]


def show(flags, rates: dict[str, list[float]], marks: dict[str, np.ndarray]) -> None:
    fill = {name: (segments > 0).mean() for name, segments in marks.items()}
    how = " compiled" if flags.compile else ""
    print(
        f"\n{flags.variant} {flags.batch} x {flags.seq} {flags.precision}, "
        f"dropout {flags.dropout}, remat {flags.remat}, {flags.runs} alternated runs on "
        f"{jax.devices()[0].device_kind}; jax {jax.__version__}, torch {torch.__version__}{how}, "
        f"transformers {transformers.__version__}\n"
        f"texts fill {fill['padded']:.0%} of a row, packed rows are {fill['packed']:.1%} full"
    )
    for name, values in rates.items():
        print(
            f"{name:8} {statistics.median(values):9.0f} useful tokens/s "
            f"({min(values):.0f} … {max(values):.0f})"
        )
    ratios = [ours / theirs for theirs, ours in zip(*rates.values(), strict=True)]
    print(f"ours / theirs {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})")


if __name__ == "__main__":
    main()
