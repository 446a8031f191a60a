"""A model of llama2.c (a .bin and the .bin of its vocabulary) as a folder that fmjax and
transformers load.

    python run.py --config=configs/llama2c.py --config.file=stories260K.bin \\
        --config.vocabulary=tok512.bin --config.output=stories260k
    python run.py --config=configs/generate.py --config.folder=stories260k \\
        --config.prompt="Once upon a time" --config.temperature=0
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "llama2c"
    config.file = ""
    config.vocabulary = ""
    config.output = ""  # never a folder that holds files
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
