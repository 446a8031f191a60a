"""configs/finetune_lora.py over a base whose matrices are kept in 4 bits (Dettmers et al. 2023).

    python run.py --config=configs/finetune_qlora.py
    python run.py --config=configs/finetune_qlora.py --config.quantise.name=int8

MiniLM on 3,200 sentences of SST-2 at 5e-4 on two cores (2026-11-22, three seeds, 1.6 minutes each):
82.6 ± 0.4 %, where LoRA over the whole base has 82.3 ± 0.5 %. A step takes 1.02 of LoRA's time, and
a weight 0.516 bytes: benchmarks/RESULTS.md, which has the commands. The first command above has
72.1 ± 0.9 % (2026-12-01, three seeds), where LoRA has 72.5 ± 0.3 %.
"""

import runpy
from pathlib import Path


def get_config(arg=None):
    parent = runpy.run_path(str(Path(__file__).with_name("finetune_lora.py")))
    config = parent["get_config"](arg)
    config.quantise.name = "nf4"
    return config


def get_expected():
    return [
        dict(
            metric="validation/classify/accuracy",
            value=0.721,
            tolerance=0.03,
            seeds=(0, 1, 2),
            budget=10,
            source="three seeds on two cores, 2026-12-01",
        ),
    ]
