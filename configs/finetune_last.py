"""configs/finetune.py with the last k layers and the head trained, all below them frozen.

    python run.py --config=configs/finetune_last.py              # k = 1
    python run.py --config=configs/finetune_last.py:layers=2 --config.init=<a deeper model>

72.2 ± 1.4 % with k = 1 where configs/finetune.py has 84.8 % (2026-12-01, three seeds, half a minute
each on two cores; of the learning rates 5e-4, 1e-3 and 3e-3 the best on the same docstrings, with a
linear head and a seed that is among the three). A model of BERT's size wants 1e-4: MiniLM on SST-2
has 81.9 ± 0.2 % with k = 2, and 82.7 ± 1.0 % where everything trains.
"""

import runpy
from pathlib import Path

from fmjax.config.load import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, task="classify", layers=1, runlocal=False)
    parent = runpy.run_path(str(Path(__file__).with_name("finetune.py")))
    config = parent["get_config"](f"{arg.task},runlocal={arg.runlocal}")
    last = "|".join(str(-i) for i in range(1, arg.layers + 1))
    config.groups = ((f"block_({last})/.*|norm/.*|head/.*", "train"), (".*", "freeze"))
    config.optim.lr = 3e-3
    return config


def get_expected():
    return [
        dict(
            metric="validation/classify/accuracy",
            value=0.722,
            tolerance=0.05,
            seeds=(0, 1, 2),
            budget=10,
            source="three seeds on two cores, 2026-12-01",
        ),
    ]
