"""What a fine-tuned model says of the records of a file.

    python run.py --config=configs/predict.py --config.folder=runs/finetune-1a2b3c4d \\
        --config.data.train=new.jsonl --config.output=new-labels.jsonl

The file has the columns that the run was trained on, and needs no labels. What is None is as the
run had it.
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("evaluate.py")))["get_config"]()
    config.task = "predict"
    config.output = ""  # empty: predictions.jsonl in the workdir
    del config.split, config.limit  # all of the file
    return config
