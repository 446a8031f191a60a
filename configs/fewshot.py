"""What a model knows without training: questions by name, behind some examples or none.

    python run.py --config=configs/fewshot.py --config.folder=runs/clm-1a2b3c4d \\
        --config.benchmark.name=blimp --config.benchmark.path=blimp/
    python run.py --config=configs/fewshot.py --config.folder=… --config.shots="(0, 1, 4)" \\
        --config.benchmark.name=choices --config.benchmark.path=test.jsonl \\
        --config.benchmark.examples=train.jsonl

The folder is a run's, one in Hugging Face format, or a hub id (id@commit). A decoder chooses what
it finds likeliest, an encoder too, by its pseudo-log-likelihood. fmjax/benchmarks.py lists the
formats; means, standard errors and intervals are added to fewshot.jsonl.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "fewshot"
    config.folder = ""
    config.step = placeholder(int)  # of a run; None: its newest
    config.benchmark = dict(
        name="blimp",  # or lambada, hellaswag, choices
        path="",  # a file, or a folder of files
        examples="",  # a file whose items, with their answers, stand before what is asked
        limit=0,  # items of each file, 0 = all
    )
    config.shots = (0,)  # how many examples: each number is measured
    config.score = "token"  # of encoders: what is masked, a token, or what follows in its word too
    config.batch_size = 32
    config.seed = 0  # of the examples that are drawn
    config.precision = placeholder(str)
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
