"""A run as a folder that transformers loads: weights, config and tokenizer.

    python run.py --config=configs/export.py --config.folder=runs/mlm-1a2b3c4d \\
        --config.output=my-bert

What was written is read back and compared before the task says so.
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
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
