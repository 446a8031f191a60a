"""A model on any split of any data: the loss, the accuracy, and what else its objectives measure.

    python run.py --config=configs/evaluate.py --config.folder=runs/mlm-1a2b3c4d
    python run.py --config=configs/evaluate.py --config.folder=google-bert/bert-base-uncased \\
        --config.data.train=my.txt --config.split=train --config.data.validation_fraction=0

The folder is a run's, one in Hugging Face format, or a hub id (id@commit). What is None here is as
the run had it; for other folders the data are pydocs in rows of 128, as in configs/mlm.py. The
second command measures on all of a file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "evaluate"
    config.folder = ""
    config.step = placeholder(int)  # of a run; None: its newest
    config.split = "validation"
    config.limit = 0  # batches, 0 = all
    config.batch_size = placeholder(int)
    config.precision = placeholder(str)
    config.data = {key: placeholder(type(value)) for key, value in mlm.data.items()}
    config.data.frame = placeholder(str)
    config.data.room = placeholder(int)
    config.data.template = placeholder(str)
    del config.data.skip, config.data.examples  # concern training alone
    config.objectives = placeholder(ConfigDict)
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
