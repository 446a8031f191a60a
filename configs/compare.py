"""Every method of adaptation on one task, from one base, for as many steps: what each keeps, what
each takes.

    python run.py --config=configs/mlm.py                # once: the encoder that this starts from
    python run.py --config=configs/compare.py --sweep    # which package a docstring belongs to
    python run.py --config=configs/compare.py:big --sweep --config.init=<run, HF folder, hub id> \\
        --config.data.train=train.tsv --config.data.validation=dev.tsv \\
        --config.data.columns=sentence

With MiniLM on 3,200 sentences of SST-2 (`big`, 100 steps of 32, three seeds, two cores,
2026-11-22): full 81.8 ± 1.1 %, last2 81.7 ± 0.4, lora 80.5 ± 1.0, ia3 81.3 ± 0.8, houlsby 81.3 ±
1.4, pfeiffer 80.8 ± 1.3, parallel 81.0 ± 0.7, prefix 79.9 ± 0.5, projected 79.5 ± 0.3, lstm 79.5 ±
0.1, bitfit 79.2 ± 0.4, mlp 79.1 ± 0.9, prompt 78.6 ± 1.5, head 78.4 ± 0.3, qlora 80.7 ± 0.7, in
about 40 minutes beside other work; benchmarks/RESULTS.md has the whole table and STS-B.

The second command above, of the small encoder, took nine minutes (the same day, three seeds,
accuracy in % on 762 docstrings): full 62.0 ± 0.7, last2, which are all layers but not the
embeddings, 58.1 ± 2.1, lora and qlora 51.6 ± 1.1 and ± 0.8, ia3 45.1 ± 0.9, parallel 41.4 ± 0.6,
houlsby 41.2 ± 1.1, pfeiffer and projected 39.1, head and prefix 38.5, prompts 37.6 to 38.0 (as the
head alone), bitfit 31.5 ± 1.3 (the head alone at a lower rate: this encoder has no biases). What is
freer forgets more: the loss of masked tokens rises by 2.05 ± 0.20 nats with full, 1.37 with lora,
0.13 with ia3.

Each trial is a config by itself, `compare.py:lora`, with its seeds as the arms of one program;
`last3` are the last three layers, and `words` and `features` classifiers of scikit-learn, which
have no seed. `only=lora+head` takes some of the methods, `steps` is the length, and `big` has rates
for a model of BERT's size in place of those for the small one. `task=regress` and the other tasks
are those of configs/finetune.py. What the base forgets is measured too where it is known what it
was trained for: a run folder says so, for others give `--config.pretraining`.
"""

import runpy
from pathlib import Path

from ml_collections import FieldReference

from fmjax.config.load import parse_arg
from fmjax.errors import ConfigError, did_you_mean
from fmjax.experiments import sweep

# name: (what follows "configs/finetune" and the task, learning rate, that of BERT's size); those of
# BERT's size of pfeiffer, parallel, mlp and lstm were not tried against others.
METHODS = {
    "full": ("", "", 1e-3, 1e-4),
    "last2": ("_last", ",layers=2", 3e-3, 3e-4),
    "head": ("_head", "", 1e-2, 1e-2),
    "bitfit": ("_bitfit", "", 3e-3, 3e-3),
    "lora": ("_lora", "", 5e-3, 1e-3),
    "qlora": ("_qlora", "", 5e-3, 1e-3),
    "ia3": ("_ia3", "", 3e-2, 3e-2),
    "houlsby": ("_adapter", ",kind=houlsby", 5e-3, 3e-3),
    "pfeiffer": ("_adapter", ",kind=pfeiffer", 5e-3, 3e-3),
    "parallel": ("_adapter", ",kind=parallel", 5e-3, 3e-3),
    "prompt": ("_prompt", ",kind=prompt", 1e-2, 1e-2),
    "mlp": ("_prompt", ",kind=mlp", 1e-2, 1e-2),
    "lstm": ("_prompt", ",kind=lstm", 1e-2, 1e-2),
    "prefix": ("_prompt", ",kind=prefix", 1e-2, 1e-2),
    "projected": ("_prompt", ",kind=projected", 1e-2, 5e-3),
}
PROBES = ("words", "features")
DEFAULTS = dict(method="full", task="classify", big=False, only="", steps=100, seeds=3)


def get_sweep(arg=None):
    arg = parse_arg(arg, **DEFAULTS)
    return trials(arg.only.split("+") if arg.only else METHODS, arg, DEFAULTS)


def trials(methods, arg, defaults):
    """A trial for each of the methods, with what `arg` says of all."""
    own = [key for key in arg if key not in ("method", "only") and arg[key] != defaults[key]]
    words = [f"{key}={arg[key]}" for key in own]
    return sweep.grid("arg", [",".join([method, *words]) for method in methods])


def get_config(arg=None):
    arg = parse_arg(arg, **DEFAULTS)
    load = lambda name: runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))["get_config"]
    if arg.method in PROBES:
        return probe(arg.method, load("probe")(), load("finetune")())
    name = arg.method
    layers = name.removeprefix("last") if name.startswith("last") else ""
    if layers.isdecimal():
        name = "last2"
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}.{did_you_mean(name, (*METHODS, *PROBES))}")
    file, kind, small, big = METHODS[name]
    kind = f",layers={layers}" if layers else kind
    config = load(f"finetune{file}")(f"{arg.task}{kind}")
    with config.ignore_type():
        config.update(total=arg.steps, batch_size=32, eval_every=0, save_every=0, keep_best=0)
    config.optim.lr = big if arg.big else small
    config.optim.args.eps = 1e-8
    config.arms = (("seed", tuple(range(arg.seeds))),) if arg.seeds > 1 else ()
    config.ledger = ("forgetting", "memory", "slices")
    return config


def get_expected(arg=None):
    if arg is not None:
        return []
    rows = (("full", 0.62, 0.05), ("lora", 0.52, 0.05), ("head", 0.385, 0.04))
    of_all = dict(seeds=(0, 1, 2), budget=40, source="three seeds on two cores, 2026-11-22")
    metric = "validation/classify/accuracy"
    return [
        dict(metric=metric, group=group, value=value, tolerance=tolerance, **of_all)
        for group, value, tolerance in rows
    ]


def probe(name, config, finetune):
    """The classifier of scikit-learn on the base of the others, with the keys that they share."""
    config.features = "words" if name == "words" else "states"
    config.init = FieldReference(finetune.init)
    config.folder = config.get_oneway_ref("init")
    config.data.seq_len = finetune.data.seq_len
    config.update(ledger=(), pretraining={})
    return config
