"""What a fine-tuned model says of the records of a file.

    python run.py --config=configs/predict.py --config.folder=runs/finetune-1a2b3c4d \\
        --config.data.train=new.jsonl --config.output=new-labels.jsonl

The file has the columns that the run was trained on, and needs no labels. What is None is as the
run had it.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "predict"
    config.folder = ""
    config.step = placeholder(int)  # of a run; None: its newest
    config.output = ""  # empty: predictions.jsonl in the workdir
    config.batch_size = placeholder(int)
    config.precision = placeholder(str)
    config.data = {key: placeholder(type(value)) for key, value in mlm.data.items()}
    del config.data.skip  # concerns training alone
    config.objectives = placeholder(ConfigDict)
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
