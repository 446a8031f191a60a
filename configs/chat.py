"""A conversation in the terminal with a decoder that configs/instruct.py or somebody else tuned.

    python run.py --config=configs/chat.py --config.folder=runs/instruct-1a2b3c4d

The folder is a run's, one in Hugging Face format, or a hub id (id@commit). What is said is put
into the template that the run was trained with, else into the tokenizer's own, else into "plain".
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("generate.py")))["get_config"]()
    config.task = "chat"
    config.template = "auto"  # or tokenizer, plain, alpaca
    config.system = ""  # what the system says first, "" nothing
    for key in ("prompt", "count", "long", "beams", "length_penalty", "draft", "ahead"):
        del config[key]
    config.length = 64  # tokens of an answer at most
    return config
