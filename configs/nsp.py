"""BERT's pretraining recipe (Devlin et al. 2019, §3.1): masked tokens and next-sentence prediction.

    python run.py --config=configs/nsp.py --config.data.train='books/train-*.jsonl.gz'

Differs from configs/mlm.py in: rows are pairs of text segments, the second objective and its head,
and both layers see the whole row. `:sop` predicts the order of two consecutive segments instead
(ALBERT, Lan et al. 2020, §3.1).

No good number yet: 2,500 steps of 32 rows (26 minutes on two busy CPU cores, 2026-11-21) with the
last layer still local reached 58.6 % on training pairs of 207 books. BERT's 97 % was not
reproduced; see benchmarks/RESULTS.md for what is known about the pairs.
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
