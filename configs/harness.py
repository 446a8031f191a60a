"""Tasks of lm-evaluation-harness on a run or a folder in Hugging Face format.

    pip install lm-eval
    python run.py --config=configs/harness.py --config.folder=runs/clm-1a2b3c4d \\
        --config.include=my_tasks --config.tasks="('mine',)"

`include` is a folder of task files (YAML) of your own; without one the tasks are those of the
harness, whose data come from the hub. configs/fewshot.py needs neither.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "harness"
    config.folder = ""
    config.step = placeholder(int)  # of a run; None: its newest
    config.tasks = ("lambada_openai",)
    config.include = ""
    config.shots = placeholder(int)  # examples before a question; None: as the task has it
    config.limit = 0  # questions of each task, 0 = all
    config.chat = False  # whether questions are put into the tokenizer's chat template
    config.score = "token"  # of encoders: what is masked, a token, or what follows in its word too
    config.batch_size = 32
    config.seed = 0
    config.precision = placeholder(str)
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
