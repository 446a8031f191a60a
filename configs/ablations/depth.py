"""How much of a pretrained encoder has to be trained? From counted words to everything.

    python run.py --config=configs/ablations/depth.py:depth=6 --sweep --config.init=<MiniLM> \\
        --config.data.train=imdb/train.jsonl.gz --config.data.validation=imdb/test.jsonl.gz \\
        --config.data.max_documents=3200 --config.data.overlap=drop
    python run.py --config=configs/mlm.py && \\
        python run.py --config=configs/ablations/depth.py:tiny --sweep     # docstrings of Python

All are compared with the first, where everything trains. Each trial is a config by itself,
`depth.py:lora`, with three seeds as the arms of one program; a classifier of scikit-learn has no
seed. Steps, batches and order are the same for all that train. `depth` is the number of the
encoder's layers, `steps` the length. Rates are those of configs/compare.py, for a model of BERT's
size or, with `tiny`, for the small one.

The second command took five minutes on two cores beside other work (2026-11-22). After 100 steps
everything trained has 62.0 ± 0.7 % of 762 docstrings, logistic regression on the features 61.4, on
counted words 82.7: the small encoder does not pay for itself there. The last layer has 48.8 ± 0.5,
LoRA 51.6 ± 1.1, the head alone 38.5 ± 0.9 %; with four epochs everything reaches 84.6 ± 0.8 %
(configs/finetune.py). The first command has not been run yet.
"""

import runpy
from pathlib import Path

from ml_collections import FieldReference

from fmjax import sweep
from fmjax.config import parse_arg
from fmjax.errors import ConfigError, did_you_mean

HERE = Path(__file__).resolve().parent
PROBES = ("words", "features")
SEQ_LEN = 128


def parsed(arg):
    return parse_arg(arg, method="full", depth=2, steps=100, seeds=3, tiny=False)


def get_sweep(arg=None):
    arg = parsed(arg)
    last = [f"last{layers}" for layers in range(1, arg.depth)]
    methods = ["full", *reversed(last), "head", *PROBES, "lora", "houlsby", "bitfit", "prompt"]
    own = [
        f"{key}={value}"
        for key, value in arg.items()
        if value != parsed(None)[key] and key != "method"
    ]
    return sweep.grid("arg", [",".join([method, *own]) for method in methods])


def get_config(arg=None):
    arg = parsed(arg)
    load = lambda name: runpy.run_path(str(HERE.parent / f"{name}.py"))
    methods = load("compare")["METHODS"]
    finetune = load("finetune")["get_config"]()
    if arg.method in PROBES:
        config = load("probe")["get_config"]()
        config.features = "words" if arg.method == "words" else "states"
        config.init = FieldReference(finetune.init)
        config.folder = config.get_oneway_ref("init")
        config.data.seq_len = SEQ_LEN
        return config
    if arg.method.startswith("last") and arg.method[4:].isdecimal():
        file, kind, small, big = methods["last2"]
        kind = kind.replace("2", arg.method[4:])
    elif arg.method in methods:
        file, kind, small, big = methods[arg.method]
    else:
        raise ConfigError(f"unknown method {arg.method!r}.{did_you_mean(arg.method, methods)}")
    config = load(f"finetune{file}")["get_config"](f"classify{kind}")
    with config.ignore_type():
        config.update(total=arg.steps, batch_size=32, eval_every=0, save_every=0, keep_best=0)
    config.data.seq_len = SEQ_LEN
    config.optim.lr = small if arg.tiny else big
    config.optim.args.eps = 1e-8
    config.arms = (("seed", tuple(range(arg.seeds))),) if arg.seeds > 1 else ()
    return config
