"""Texts to vectors, in a .npy file.

    python run.py --config=configs/embed.py --config.folder=<run, Hugging Face folder or hub id> \\
        --config.data.train=texts.jsonl --config.data.columns=text --config.output=texts.npy

Of a folder of sentence-transformers the modules (pooling, dense layers, normalisation), the longest
text and the default prompt are followed; what is said here goes before.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "embed"
    config.folder = ""
    config.step = placeholder(int)  # of a run; None: its newest
    config.output = ""  # empty: embeddings.npy in the workdir
    config.pool = ""  # first, last or mean of the tokens; empty: as the folder says, else mean
    config.normalize = True  # to length one
    config.batch_size = 64
    config.precision = placeholder(str)
    config.data = {key: placeholder(type(value)) for key, value in mlm.data.items()}
    config.data.source_prefix = placeholder(str)  # before each text; None: the folder's prompt
    for key in ("skip", "examples", "label", "classes", "pair"):  # have no meaning here
        del config.data[key]
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
