"""configs/finetune_lora.py over a base whose matrices are kept in 4 bits (Dettmers et al. 2023).

python run.py --config=configs/finetune_qlora.py
python run.py --config=configs/finetune_qlora.py --config.quantise.name=int8
"""

import runpy
from pathlib import Path


def get_config(arg=None):
    parent = runpy.run_path(str(Path(__file__).with_name("finetune_lora.py")))
    config = parent["get_config"](arg)
    config.quantise.name = "nf4"
    return config
