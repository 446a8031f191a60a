"""Text that a model writes, behind a prompt or from nothing.

    python run.py --config=configs/generate.py --config.folder=runs/clm-1a2b3c4d \\
        --config.prompt="Return the"

The folder is a run's, one in Hugging Face format, or a hub id (id@commit), of a decoder.
`temperature=0` takes the most probable token each time; `top_k` draws from so many.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "generate"
    config.folder = ""
    config.step = placeholder(int)  # of a run; None: its newest
    config.prompt = ""
    config.count = 3  # texts, each drawn by itself
    config.length = 100  # tokens at most, beside the prompt
    config.temperature = 0.8
    config.top_k = placeholder(int)  # the most probable to draw from; None: all
    config.seed = 0
    config.precision = placeholder(str)  # None: as the run was trained, else float32
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
