"""How fast batches are read from the store, on one core: packed rows and sentence pairs.

    python benchmarks/input_pipeline.py

Twenty million random tokens in a temporary folder, read through Grain as training does; a warm
median of seven. The bar is 1 M tokens/s (300 k for pairs): an accelerator must never wait for data.
What was measured is in RESULTS.md.
"""

import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from fmjax import data
from fmjax.data import packing, pairs, store

TOKENS, VOCABULARY, SEQ_LEN, BATCH = 20_000_000, 30_522, 512, 64
BARS = {"packed": 1e6, "pairs": 3e5}


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    none = np.zeros(VOCABULARY, bool)
    vocab = data.Vocab(VOCABULARY, 0, 3, (1,), (2,), none, ~none)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_shards(folder)
        for form, split in make_splits(folder, vocab).items():
            rates = measure(split)
            print(
                f"{form:7} {statistics.median(rates) / 1e6:6.2f} M tokens/s "
                f"({min(rates) / 1e6:.2f} to {max(rates) / 1e6:.2f}), "
                f"bar {BARS[form] / 1e6:.1f}: {len(split):,} rows of {split.seq_len}, batch {BATCH}"
            )


def write_shards(folder: Path) -> None:
    """One shard of random tokens: sentences of 5 to 40 tokens, documents of 30 sentences."""
    rng = np.random.default_rng(0)
    sentences = np.cumsum(np.append(0, rng.integers(5, 41, TOKENS // 22)))
    tokens = rng.integers(4, VOCABULARY, sentences[-1], dtype=np.uint16)
    documents = np.append(sentences[:-1:30], sentences[-1])
    (folder / "00000").mkdir()
    for split, used in (("train", True), ("validation", False)):
        parts = store.Shard(tokens, documents, sentences) if used else [np.zeros(1, np.int64)] * 3
        for part, array in zip(store.Shard._fields, parts, strict=True):
            np.save(folder / "00000" / f"{split}.{part}.npy", array)


def make_splits(folder: Path, vocab: data.Vocab) -> dict:
    settings = {"seq_len": SEQ_LEN, "poll": lambda: None}
    for form in BARS:
        (folder / form).mkdir()
    packed = packing.write(
        folder / "packed", folder, 1, vocab, long="split", padded=False, **settings
    )["train"]
    paired = pairs.write(folder / "pairs", folder, 1, vocab, **settings)["train"]
    paired["documents"] = paired["anchored_documents"] + paired["dropped_documents"]
    return {
        "packed": packing.PackedSplit(folder / "packed", "train", SEQ_LEN, vocab, packed),
        "pairs": pairs.PairSplit(folder / "pairs", "train", SEQ_LEN, vocab, paired, "nsp"),
    }


def measure(split) -> list[float]:
    """Tokens a second (padding not counted as tokens) of seven passes of 200 batches."""
    batches = data.batches(split, batch_size=BATCH, seeds=[0])
    per_batch = BATCH * split.tokens / len(split)
    list(itertools.islice(batches, 200))
    rates = []
    for _ in range(7):
        start = time.perf_counter()
        list(itertools.islice(batches, 200))
        rates.append(200 * per_batch / (time.perf_counter() - start))
    batches.close()
    return rates


if __name__ == "__main__":
    main()
