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

Neither command has been run to its end yet.
"""

import runpy
from pathlib import Path

from fmjax import sweep
from fmjax.config import parse_arg

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
    with config.ignore_type():
        config.update(total=arg.steps, batch_size=16, eval_every=20, save_every=0, keep_best=0)
    config.optim.lr = 1e-4 if arg.base == "minilm" else 1e-3
    config.arms = (("seed", tuple(range(arg.seeds))),) if arg.seeds > 1 else ()
    config.ledger = ("memory", "slices")
    return config
