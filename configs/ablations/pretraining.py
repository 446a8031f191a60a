"""What does pretraining buy, and for how many labelled examples?

    python run.py --config=configs/mlm.py && \\
        python run.py --config=configs/ablations/pretraining.py --sweep   # docstrings of Python
    python run.py --config=configs/mlm.py --workdir=runs/books --config.total=20000 \\
        --config.data.train='books/train-00[012].jsonl.gz' \\
        --config.data.validation=books/valid.jsonl.gz
    python run.py --config=configs/ablations/pretraining.py:more=books+minilm --sweep \\
        --config.data.train=SST-2/train.tsv --config.data.validation=SST-2/dev.tsv \\
        --config.data.columns=sentence --config.data.seq_len=64

Everything trains for `steps` updates of 16 examples, from nothing (`scratch`), from the encoder of
configs/mlm.py (`docs`), and from those that `more` names: runs/books, a run, and runs/minilm, a
link to a folder of MiniLM; on 16, 64, 256, 1,024 and 3,000 labelled examples, which are drawn by
the seed and the same for all bases. Each base is compared with `scratch` on as many examples.
`scratch` has the sizes and the tokenizer of `docs`. Rates: 1e-3, with MiniLM 1e-4, as in
configs/compare.py.

The third took 53 minutes on two cores beside other work (2026-11-22), of which MiniLM's trials 42;
`books` had been trained on 41 M tokens. Accuracy in % on the 872 sentences of SST-2's
validation file, three seeds:

    examples       16           64          256         1024         3000
    scratch   51.4 ± 2.4   55.4 ± 3.1   59.7 ± 2.2   66.2 ± 0.8   68.8 ± 1.3
    docs      51.6 ± 1.9   54.7 ± 1.1   59.8 ± 1.2   65.7 ± 1.2   68.0 ± 1.6
    books     51.3 ± 3.7   56.5 ± 2.0   63.2 ± 0.5   70.2 ± 0.8   72.6 ± 1.1
    minilm    52.0 ± 6.6   71.1 ± 2.9   77.3 ± 1.1   80.4 ± 0.0   82.3 ± 1.5

No gain is shown for documentation; books are some 4 points higher from 256 examples on, MiniLM 13
to 18 from 64 on. With three seeds and fifteen comparisons only MiniLM's at 1,024 survives Holm's
correction; benchmarks/RESULTS.md has the intervals.

The first took ten minutes. Of docstrings no gain is shown for the encoder that has read them
without their package: from 16 to 3,000 examples 21.7, 35.8, 55.5, 67.7 and 70.5 %, `scratch`
20.0, 36.2, 58.5, 72.6 and 73.4.
"""

import runpy
from pathlib import Path

from fmjax.config.load import parse_arg
from fmjax.experiments import sweep

HERE = Path(__file__).resolve().parents[1]
DEFAULTS = dict(base="scratch", more="", steps=200, seeds=3)
SIZES = (16, 64, 256, 1024, 3000)


def get_sweep(arg=None):
    given = parse_arg(arg, **DEFAULTS)
    bases = ["scratch", "docs", *filter(None, given.more.split("+"))]
    own = "".join(f",{key}={given[key]}" for key in ("steps", "seeds"))
    return sweep.product(
        sweep.grid("arg", [f"base={base}{own}" for base in bases]),
        sweep.grid("data.examples", SIZES),
    )


def get_config(arg=None):
    arg = parse_arg(arg, **DEFAULTS)
    load = lambda name: runpy.run_path(str(HERE / f"{name}.py"))["get_config"]()
    config = load("finetune")
    if arg.base == "scratch":
        mlm = load("mlm")
        config.model = mlm.model
        config.tokenizer.name = f"{config.init}/tokenizer"
        config.init = ""
    elif arg.base != "docs":
        config.init = f"runs/{arg.base}"
    with config.ignore_type(), config.unlocked():
        config.update(total=arg.steps, batch_size=16, eval_every=20, save_every=0, keep_best=0)
        config.model.pooler = False  # a linear head: what differs is the trunk
    config.optim.lr = 1e-4 if arg.base == "minilm" else 1e-3
    config.arms = (("seed", tuple(range(arg.seeds))),) if arg.seeds > 1 else ()
    config.ledger = ("memory", "slices")
    return config


def get_expected(arg=None):
    arg = parse_arg(arg, **DEFAULTS)
    if (arg.steps, arg.seeds) != (200, 3) or arg.more not in ("", "books+minilm"):
        return []
    rows, own = (("scratch", 0.726), ("docs", 0.677)), dict(tolerance=0.05, budget=30)
    if arg.more:  # SST-2
        rows = (("scratch", 0.662), ("docs", 0.657), ("books", 0.702), ("minilm", 0.804))
        files = ("data.train", "data.validation")
        given = (*files, "data.columns=sentence", "data.seq_len=64")
        own = dict(tolerance=0.03, budget=90, given=given)
    own |= dict(seeds=(0, 1, 2), source="three seeds on two cores, 2026-11-22")
    metric = "validation/classify/accuracy"
    return [
        dict(metric=metric, group=f"base={base}, data.examples=1024", value=value, **own)
        for base, value in rows
    ]
