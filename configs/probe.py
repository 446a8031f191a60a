"""A classifier of scikit-learn on the features of a frozen encoder.

    python run.py --config=configs/probe.py --config.folder=<run, Hugging Face folder or hub id>
    python run.py --config=configs/probe.py --config.folder=… --config.classifier=mlp \\
        --config.data.train=train.tsv --config.data.validation=dev.tsv \\
        --config.data.columns=sentence

Without files the data are the docstrings of configs/finetune.py. The features of a layer are kept,
so that a second classifier on them starts at once.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "probe"
    config.folder = ""
    config.classifier = "logistic"  # or mlp
    config.args = {}  # of the classifier: {"C": 0.1}, {"hidden_layer_sizes": (256,)}
    config.features = "states"  # or words: how often each token is there, without the model
    config.layer = placeholder(int)  # 1 … depth; None: the last, and the norm behind it
    config.pool = "mean"  # over the tokens; or first
    config.batch_size = 64
    config.precision = placeholder(str)
    config.data = {key: placeholder(type(value)) for key, value in mlm.data.items()}
    for key in ("skip", "examples", "pair", "format"):  # have no meaning here
        del config.data[key]
    config.data.validation_fraction = 0.2
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
