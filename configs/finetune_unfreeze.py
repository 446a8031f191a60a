"""configs/finetune.py with layers that start to move one after the other, the last one first.

    python run.py --config=configs/finetune_unfreeze.py

Gradual unfreezing (Howard and Ruder 2018, section 3.3): the head moves from the start, the last of
`layers` layers after the first of equal parts of the run, and so on; what is below, and the
embeddings, with the last part. Every group has a warm-up of its own.

80.9 ± 0.6 % where configs/finetune.py, which moves everything from the start, has 84.8 ± 0.5 %
(2026-12-01, three seeds, two minutes each on two cores beside other work).
"""

import runpy
from pathlib import Path

from fmjax.config.load import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, task="classify", layers=2, runlocal=False)
    parent = runpy.run_path(str(Path(__file__).with_name("finetune.py")))
    config = parent["get_config"](f"{arg.task},runlocal={arg.runlocal}")
    names = [f"layer_{i}" for i in range(1, arg.layers + 1)]
    behind = [(f"block_-{i}/.*", name) for i, name in enumerate(names, 1)]
    config.groups = (("head/.*|norm/.*", "train"), *behind, (".*", "rest"))
    part = 100 / (arg.layers + 2)
    delays = [f"{part * i:.0f}%" for i in range(1, arg.layers + 2)]
    config.group_optim = {
        name: {"delay": delay} for name, delay in zip([*names, "rest"], delays, strict=True)
    }
    return config


def get_expected():
    return [
        dict(
            metric="validation/classify/accuracy",
            value=0.809,
            tolerance=0.03,
            seeds=(0, 1, 2),
            budget=10,
            source="three seeds on two cores, 2026-12-01",
        ),
    ]
