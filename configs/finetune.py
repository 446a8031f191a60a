"""Fine-tuning of a pretrained encoder to tell classes of text apart (Devlin et al. 2019, §4).

    python run.py --config=configs/mlm.py         # once: the encoder that this starts from
    python run.py --config=configs/finetune.py    # which package a docstring of Python belongs to
    python run.py --config=configs/finetune.py --config.init=<run, Hugging Face folder or hub id> \\
        --config.data.train=train.tsv --config.data.validation=dev.tsv \\
        --config.data.columns=sentence --config.data.label=label --config.optim.lr=5e-5

The second, from the encoder of the first, on two cores and Python 3.11 (2026-11-30, three seeds):
84.8 ± 0.5 % of 762 docstrings get the right one of 15 packages, in 40 seconds; the most frequent
one is 17 % of them. The encoder has read the docstrings before, without their packages. A model of
BERT's size wants the learning rate of the last command; the small one has its own. With MiniLM,
beside transformers: benchmarks/RESULTS.md. Pairs of texts are `columns="first,second"`; with
`--config.data.format=labels` the label is a list, of any number of classes. Other tasks, each with
files of its own:

    finetune.py:regress   a number, in the column `label`
    finetune.py:tag       a class for each word; of .conll files (word TAB tag), or lists in columns
    finetune.py:span      the part of a context that answers a question; of SQuAD's .json files
    finetune.py:choose    which of the `endings` (a list) goes on from a text; `label` is its number
    finetune.py:contrast  sentence embeddings: SimCSE of one column of texts, else pairs of two, of
                          which a third can hold hard negatives; for the latter see config.best
"""

import runpy
from pathlib import Path

from ml_collections.config_dict import placeholder

from fmjax.config.load import digest, parse_arg
from fmjax.data.settings import ROWS_OF_TASK
from fmjax.errors import ConfigError, did_you_mean

# Of each task what its loss takes, and the metric by which the best is kept.
WHOLE = dict(pool="mean")
TASKS = {
    "classify": dict(args=WHOLE, best="classify/accuracy"),
    "regress": dict(args=WHOLE, best="loss"),
    "tag": dict(best="tag/f1"),
    "span": dict(best="span/f1"),
    "choose": dict(args=WHOLE, best="choose/accuracy"),
    "contrast": dict(args=dict(pool="mean", temperature=0.05), best="loss"),
}


def get_config(arg=None):
    arg = parse_arg(arg, task="classify", runlocal=False)
    if arg.task not in TASKS:
        raise ConfigError(f"unknown task {arg.task!r}.{did_you_mean(arg.task, TASKS)}")
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]
    config = mlm(f"small,runlocal={arg.runlocal}")
    config.init = f"runs/mlm-{digest(mlm())}"
    config.total = "4 epochs"
    args, best = TASKS[arg.task].get("args", {}), TASKS[arg.task]["best"]
    config.data.update(ROWS_OF_TASK[arg.task])  # its format, columns, and what is done to long ones
    config.data.validation_fraction = 0.2
    config.tokenizer.name = "init"  # as config.init has it
    sizes = dict.fromkeys(config.model, None) | dict(variant=placeholder(str))
    how = {key: config.model[key] for key in ("attention", "scan", "remat")}
    config.model = sizes | how | dict(name="init")  # what is None is as config.init has it
    if arg.task == "contrast":
        config.model.dropout = 0.1  # SimCSE's only noise
    config.objectives = {arg.task: dict(weight=1.0, **args)}
    config.optim.update(lr=1e-3, decay=".*/kernel")
    config.optim.args.b2 = 0.999
    with config.ignore_type():
        config.eval_every = config.save_every = "1 epoch"
    config.best = f"validation/{best}"
    if arg.runlocal:
        config.total = "10 steps"
    return config


def get_expected():
    return [
        dict(
            metric="validation/classify/accuracy",
            value=0.846,
            tolerance=0.025,
            seeds=(0, 1, 2),
            budget=10,
            source="three seeds on two cores, 2026-11-22",
        ),
    ]
