"""A run as a folder that transformers loads: weights, config and tokenizer.

    python run.py --config=configs/export.py --config.folder=runs/mlm-1a2b3c4d \\
        --config.output=my-bert

What was written is read back and compared before the task says so. With `--config.merge=False` a
run with an adapter gives that alone, with the heads that it trained, as a folder for PEFT.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "export"
    config.folder = ""
    config.step = placeholder(int)  # of a run; None: its newest
    config.output = ""  # empty: export/ in the run folder; never one that holds files
    config.merge = True  # an adapter into its base; False: write it alone, in PEFT's format
    config.max_kl = 1e-4  # nats: refuses a merged adapter whose outputs differ by more
    config.limit = 64  # batches of its validation that a merged adapter is measured on; 0: none
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
