"""configs/finetune.py with nothing but biases and the head trained (BitFit, Zaken et al. 2022).

    python run.py --config=configs/finetune_bitfit.py

`:classify,norms` trains the scales and biases of the norms alone, and the head. A model without
biases, such as the default ModernBERT, has norms only.

50.5 ± 0.7 % with the first command, where configs/finetune_head.py has 52.1 ± 1.0 % (2026-12-01,
three seeds, a minute each on two cores): without biases the head alone is trained, at 3e-3 and not
at the 1e-2 that suits it best. MiniLM, which has biases: configs/compare.py.
"""

import runpy
from pathlib import Path

from fmjax.config.load import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, task="classify", norms=False, runlocal=False)
    parent = runpy.run_path(str(Path(__file__).with_name("finetune.py")))
    config = parent["get_config"](f"{arg.task},runlocal={arg.runlocal}")
    moves = ".*norm/.*" if arg.norms else ".*/bias"
    config.groups = ((f"head/.*|{moves}", "train"), (".*", "freeze"))
    config.optim.lr = 3e-3
    return config


def get_expected():
    return [
        dict(
            metric="validation/classify/accuracy",
            value=0.505,
            tolerance=0.03,
            seeds=(0, 1, 2),
            budget=10,
            source="three seeds on two cores, 2026-12-01",
        ),
    ]
