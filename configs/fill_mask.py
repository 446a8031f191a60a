"""What a model puts in the place of masked words.

    python run.py --config=configs/fill_mask.py --config.folder=runs/mlm-1a2b3c4d \\
        --config.text="The [MASK] of a function."

The folder is a run's, one in Hugging Face format, or a hub id (id@commit). Some models write the
mask differently (RoBERTa: <mask>). Each line of the text is a sentence of its own.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "fill_mask"
    config.folder = ""
    config.step = placeholder(int)  # of a run; None: its newest
    config.text = ""
    config.top_k = 5
    config.precision = placeholder(str)  # None: as the run was trained, else float32
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
