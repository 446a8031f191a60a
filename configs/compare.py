"""Every method of adaptation on one task, from one base, for as many steps: what each keeps, what
each takes.

    python run.py --config=configs/mlm.py        # once: the encoder that this starts from
    python run.py --config=configs/compare.py    # which package a docstring of Python belongs to
    python run.py --config=configs/compare.py:big --config.init=<run, HF folder, hub id> \\
        --config.data.train=train.tsv --config.data.validation=dev.tsv \\
        --config.data.columns=sentence

With MiniLM on 3,200 sentences of SST-2 (`big`, 100 steps of 32, three seeds, two cores,
2026-11-22): full 81.8 ± 1.1 %, last2 81.7 ± 0.4, lora 80.5 ± 1.0, ia3 81.3 ± 0.8, houlsby 81.3 ±
1.4, pfeiffer 80.8 ± 1.3, parallel 81.0 ± 0.7, prefix 79.9 ± 0.5, projected 79.5 ± 0.3, lstm 79.5 ±
0.1, bitfit 79.2 ± 0.4, mlp 79.1 ± 0.9, prompt 78.6 ± 1.5, head 78.4 ± 0.3, qlora 80.7 ± 0.7, in
about 40 minutes beside other work; benchmarks/RESULTS.md has the whole table and STS-B. The second
command above, of the small encoder, has not been run to its end.

`big` has learning rates for a model of BERT's size, in place of those for the small one, and
`only=lora+head` takes some of the methods; each is a row of `config.methods`, its config and what
it sets differently. `:regress` and the other tasks are those of configs/finetune.py.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fmjax.config import parse_arg
from fmjax.errors import ConfigError, did_you_mean

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


def get_config(arg=None):
    arg = parse_arg(arg, task="classify", big=False, only="+".join(METHODS), runlocal=False)
    for name in set(arg.only.split("+")) - set(METHODS):
        raise ConfigError(f"only={arg.only}: unknown method {name!r}.{did_you_mean(name, METHODS)}")
    start = lambda name: runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))["get_config"]()
    config = ConfigDict()

    config.task = "compare"
    config.init = start("finetune").init
    config.seeds = (0, 1, 2)
    config.shared = ("eval_every=0", "save_every=0", "keep_best=0")  # KEY=VALUE of every method
    config.methods = tuple(  # (name, config, KEY=VALUE of it)
        (
            name,
            f"configs/finetune{file}.py:{arg.task}{kind},runlocal={arg.runlocal}",
            (f"optim.lr={big if arg.big else small}",),
        )
        for name, (file, kind, small, big) in METHODS.items()
        if name in arg.only.split("+")
    )
    config.data = start("evaluate").data  # what is None is as the methods have it
    # What the base was trained for, to see how much of it is forgotten: as configs/evaluate.py.
    config.pretraining = ConfigDict(
        dict(
            objectives=placeholder(ConfigDict),
            split="validation",
            batch_size=placeholder(int),
            precision=placeholder(str),
            limit=0,
        )
    )
    config.pretraining.data = start("evaluate").data
    return config
