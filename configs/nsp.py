"""BERT's pretraining recipe (Devlin et al. 2019, §3.1): masked tokens and next-sentence prediction.

    python run.py --config=configs/nsp.py --config.data.train='books/train-*.jsonl.gz'

Differs from configs/mlm.py in: rows are pairs of text segments, the second objective and its head,
and both layers see the whole row. `:sop` predicts the order of two consecutive segments instead
(ALBERT, Lan et al. 2020, §3.1).

On two CPU cores (2026-11-21, 207 books, accuracy on 11 others) pairs are learned from a pretrained
encoder, not from nothing within an hour. MiniLM, its embeddings and two lowest layers frozen, the
head twenty times as fast, batches of 16: 67.7 % after 400 steps, 71.5 % after 985 (the last 503 at
lr 1e-4), rising still. At one rate for all (1e-4) it stayed at chance for 376 steps.

    M=<folder of all-MiniLM-L6-v2>
    python run.py --config=configs/nsp.py --config.data.train='books/train-*.jsonl.gz' \\
        --config.init=$M --config.tokenizer.name=$M --config.model.variant=base \\
        --config.model.depth=6 --config.model.width=384 --config.model.heads=12 \\
        --config.model.mlp=1536 --config.objectives="{'nsp': {}}" --config.batch_size=16 \\
        --config.groups="(('embed/.*|block_0[01]/.*', 'freeze'), \\
                          ('head/.*', 'head'), ('.*', 'train'))" \\
        --config.group_optim="{'head': {'lr': 1e-3}}" --config.optim.lr=5e-5 \\
        --config.optim.schedule=constant --config.optim.warmup='50 steps'

BERT's 97 % (rows of 512, a million steps) was not reproduced; benchmarks/RESULTS.md has more.
"""

import runpy
from pathlib import Path

from fmjax.config import parse_arg
from fmjax.errors import ConfigError, did_you_mean


def get_config(arg=None):
    arg = parse_arg(arg, pair="nsp", variant="small", runlocal=False)
    if arg.pair not in ("nsp", "sop"):
        raise ConfigError(f"unknown pair {arg.pair!r}.{did_you_mean(arg.pair, ('nsp', 'sop'))}")
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]
    config = mlm(f"{arg.variant},runlocal={arg.runlocal}")
    config.data.format = "pairs"
    config.data.pair = arg.pair
    config.objectives[arg.pair] = dict(weight=1.0)
    config.model.classes = {arg.pair: 2}
    if config.model.variant == "modernbert_tiny":
        # The first token answers for the pair: both of its layers must see all of it.
        config.model.full_every = 1
    return config
