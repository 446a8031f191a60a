"""configs/finetune.py with the last k layers and the head trained, all below them frozen.

    python run.py --config=configs/finetune_last.py            # k = 1
    python run.py --config=configs/finetune_last.py:layers=2 --config.init=<a model of 6 layers>

The layers are counted in `config.init`, or given as `depth=6`.
"""

import runpy
from pathlib import Path

from fmjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, task="classify", layers=1, depth=2, runlocal=False)
    parent = runpy.run_path(str(Path(__file__).with_name("finetune.py")))
    config = parent["get_config"](f"{arg.task},runlocal={arg.runlocal}")
    last = "|".join(f"{i:02d}" for i in range(arg.depth - arg.layers, arg.depth))
    config.groups = ((f"block_({last})/.*|norm/.*|head/.*", "train"), (".*", "freeze"))
    return config
