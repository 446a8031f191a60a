"""What an encoder–decoder makes of a file of sources, and BLEU, chrF and ROUGE against targets.

    pip install sacrebleu rouge-score
    python run.py --config=configs/translate.py --config.folder=runs/seq2seq-1a2b3c4d \\
        --config.file=test.jsonl --config.source=en --config.target=de

The folder is a run's, one in Hugging Face format, or a hub id (id@commit). Greedy, or with `beams`.
A target that is a list has several references; without `config.target` texts are only written.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]()
    config = ConfigDict()

    config.task = "translate"
    config.folder = ""
    config.step = placeholder(int)  # of a run; None: its newest
    config.file = ""  # JSON lines
    config.source = "source"
    config.target = "target"
    config.limit = 0  # rows, 0 = all
    config.long = "error"  # sources that are too long; or cut, to their beginning
    config.length = 64  # tokens of a text at most
    config.beams = 1  # 1: greedy
    config.length_penalty = 1.0  # of beams: above 0 for longer texts
    config.batch_size = 32
    config.precision = placeholder(str)
    config.weights = ""  # or int8: matrices, and the products with them, in eight bits
    config.cache = ""  # or int8: keys and values of what was seen in eight bits
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
