"""What a model knows without training: questions by name, behind some examples or none.

    python run.py --config=configs/fewshot.py --config.folder=runs/clm-1a2b3c4d \\
        --config.benchmark.name=blimp --config.benchmark.path=blimp/
    python run.py --config=configs/fewshot.py --config.folder=… --config.shots="(0, 1, 4)" \\
        --config.benchmark.name=choices --config.benchmark.path=test.jsonl \\
        --config.benchmark.examples=train.jsonl

    python run.py --config=configs/fewshot.py --config.folder=… --config.shots="(0, 4, 16)" \\
        --config.benchmark.name=classes --config.data.train=train.tsv \\
        --config.data.validation=dev.tsv --config.data.columns=sentence \\
        --config.templates="('Review: {sentence}\\nSentiment:', '{sentence} It was')" \\
        --config.words="('bad', 'good')"

The folder is a run's, one in Hugging Face format, or a hub id (id@commit). A decoder chooses what
it finds likeliest, an encoder too, by its pseudo-log-likelihood. fmjax/evaluation/benchmarks.py
lists the formats, fmjax/evaluation/prompt_templates.py what templates are; each template is asked
behind each number of examples. Means, standard errors and intervals are added to fewshot.jsonl.
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
        name="blimp",  # lambada, hellaswag, gsm8k, choices, sst2 and others of GLUE, classes
        path="",  # a file, or a folder of files
        examples="",  # a file whose items, with their answers, stand before what is asked
        limit=0,  # items of each file, of classes evenly over it; 0 = all
    )
    config.templates = ()  # of classes, and of GLUE in the place of its own
    config.words = ()  # what the classes are called, in their order; () = by their names
    config.shots = (0,)  # how many examples: each number is measured
    config.score = "token"  # of encoders: what is masked, a token, or what follows in its word too
    config.norm = "sum"  # what is likeliest, in a summary: by the sum; or by token, byte, gain
    config.length = 256  # tokens of an answer that is written (gsm8k)
    config.long = "error"  # prompts without room for it; or cut, to their end
    config.batch_size = 32
    config.seed = 0  # of the examples that are drawn
    config.precision = placeholder(str)
    config.data = {key: placeholder(type(value)) for key, value in mlm.data.items()}  # of classes
    for key in ("skip", "examples", "pair", "format"):  # have no meaning here
        del config.data[key]
    config.mesh = mlm.mesh
    config.distributed = mlm.distributed
    return config
