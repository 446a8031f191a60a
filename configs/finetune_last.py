"""configs/finetune.py with the last k layers and the head trained, all below them frozen.

    python run.py --config=configs/finetune_last.py              # k = 1
    python run.py --config=configs/finetune_last.py:layers=2 --config.init=<a deeper model>

57.5 % with k = 1 and --config.optim.lr=5e-4, where configs/finetune.py has 85.6 % (2026-11-21, one
seed, the rate not tuned).
"""

import runpy
from pathlib import Path

from fmjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, task="classify", layers=1, runlocal=False)
    parent = runpy.run_path(str(Path(__file__).with_name("finetune.py")))
    config = parent["get_config"](f"{arg.task},runlocal={arg.runlocal}")
    last = "|".join(str(-i) for i in range(1, arg.layers + 1))
    config.groups = ((f"block_({last})/.*|norm/.*|head/.*", "train"), (".*", "freeze"))
    return config
