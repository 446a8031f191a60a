"""configs/finetune.py with IA³: keys, values and the MLP's inner units scaled (Liu et al. 2022).

    python run.py --config=configs/finetune_ia3.py

MiniLM on 3,200 sentences of SST-2 at 3e-2 on two cores (2026-11-22, three seeds, 1.3 minutes each):
81.5 ± 0.9 % with 13,824 parameters beside head and pooler, where everything has 82.7 ± 1.0 % and
the head alone 70.0 ± 0.9 %. No other rate was tried. The command above has 56.1 ± 0.8 %
(2026-12-01, three seeds), where everything has 84.8 % and the head alone 52.1 %.
"""

import runpy
from pathlib import Path

from fmjax.config.load import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, task="classify", runlocal=False)
    parent = runpy.run_path(str(Path(__file__).with_name("finetune.py")))
    config = parent["get_config"](f"{arg.task},runlocal={arg.runlocal}")
    config.adapter = dict(
        name="ia3",
        targets=(("block_.*/attn/(key|value)", "output"), ("block_.*/mlp/down", "input")),
    )
    config.groups = ((".*/ia3_scale|head/.*", "train"), (".*", "freeze"))
    config.optim.lr = 1e-2
    return config


def get_expected():
    return [
        dict(
            metric="validation/classify/accuracy",
            value=0.561,
            tolerance=0.04,
            seeds=(0, 1, 2),
            budget=10,
            source="three seeds on two cores, 2026-12-01",
        ),
    ]
