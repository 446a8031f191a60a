"""How should tokens be masked in pretraining? At equal FLOPs, by the loss and by a task behind it.

    python run.py --config=configs/ablations/masking.py --sweep

First each recipe pretrains the encoder of configs/mlm.py on the documentation of Python, with as
many FLOPs: mask rates of 15, 30 and 40 %, each with 80/10/10 (of the chosen tokens so many become
[MASK], another token, or stay) and 100/0/0; whole words; spans; and pairs of segments with next
sentence prediction or sentence order. All see the whole row in both layers, which pairs need. Then
each encoder is fine-tuned as configs/finetune.py, to tell packages of docstrings apart. All are
compared with 15 %, 80/10/10.

The losses of pretraining compare since all are evaluated with the masks of 15 %, 80/10/10; those of
pairs are of other rows, so that only fine-tuning compares them with the others. A seed is that of
pretraining and fine-tuning. `only=rate15+span` takes some of the recipes.

In 69 minutes on two cores beside other work (2026-11-22), three seeds: loss in nats 4.42 ± 0.02
with 15 %, 4.32 ± 0.03 with 30 %, 4.39 ± 0.01 with 40 %; with 100/0/0 5.24 ± 0.15, 5.25 ± 0.08 and
5.32 ± 0.04, perhaps as these models have never had to doubt a token that stands there; whole words
4.77 ± 0.09, spans 5.31 ± 0.05. Fine-tuned, accuracy in % on 762 docstrings: 68.5 ± 2.0, 69.8 ± 1.9,
71.6 ± 1.7; 66.6 ± 3.4, 68.1 ± 3.3, 67.2 ± 0.7; words 68.3 ± 1.2, spans 69.0 ± 1.1, next sentence
67.2 ± 3.5, sentence order 68.2 ± 0.7. No difference of fine-tuned ones survives Holm's correction;
encoders so small, after minutes, do not tell how to mask a large one (40 % in Wettig et al. 2023).
"""

import runpy
from pathlib import Path

from fmjax.config.load import parse_arg
from fmjax.errors import ConfigError, did_you_mean

HERE = Path(__file__).resolve().parents[1]
DEFAULTS = dict(recipe="rate15", only="", flops="7T", tune=False, steps=200, seeds=3)
USUAL = dict(rate=0.15, mask="token", replace=(0.8, 0.1))
ALL = (1.0, 0.0)  # of the chosen, all become [MASK]
RECIPES = {
    "rate15": {},
    "rate30": dict(rate=0.3),
    "rate40": dict(rate=0.4),
    "rate15-all": dict(replace=ALL),
    "rate30-all": dict(rate=0.3, replace=ALL),
    "rate40-all": dict(rate=0.4, replace=ALL),
    "word": dict(mask="word"),
    "span": dict(mask="span"),
    "nsp": {},
    "sop": {},
}


def get_sweep(arg=None):
    arg = parse_arg(arg, **DEFAULTS)
    own = "".join(f",{key}={arg[key]}" for key in ("flops", "steps", "seeds"))
    encoders = {}
    for recipe in arg.only.split("+") if arg.only else RECIPES:
        record = yield {"group": recipe, "arg": f"recipe={recipe}{own}"}
        encoders[recipe] = {
            result["seed"]: f"{record['folder']}/{result['folder']}"
            for result in record["results"]
            if not result["failed"]
        }
    for recipe, folders in encoders.items():
        for seed, folder in folders.items():
            tune = {"arg": f"recipe={recipe},tune=True{own}", "init": folder, "seed": seed}
            yield {"group": recipe, **tune}


def get_config(arg=None):
    arg = parse_arg(arg, **DEFAULTS)
    if arg.recipe not in RECIPES:
        raise ConfigError(f"recipe={arg.recipe}: unknown.{did_you_mean(arg.recipe, RECIPES)}")
    load = lambda name: runpy.run_path(str(HERE / f"{name}.py"))["get_config"]
    if arg.tune:
        config = load("finetune")()
        with config.ignore_type(), config.unlocked():
            config.update(total=arg.steps, batch_size=16, eval_every=20, save_every=0, keep_best=0)
            config.model.pooler = False  # a linear head: what differs is the trunk
        return config
    pairs = arg.recipe in ("nsp", "sop")
    config = load("nsp")(arg.recipe) if pairs else load("mlm")()
    config.objectives.mlm = dict(weight=1.0, **(USUAL | RECIPES[arg.recipe]), validation=USUAL)
    config.model.full_every = 1  # as configs/nsp.py has it: both layers see the whole row
    config.total = f"{arg.flops} flops"
    config.best = "validation/mlm/loss"
    config.keep, config.keep_best = 1, 0
    config.arms = (("seed", tuple(range(arg.seeds))),) if arg.seeds > 1 else ()
    return config


def get_expected(arg=None):
    if arg is not None:
        return []
    own = dict(seeds=(0, 1, 2), budget=120, source="three seeds on two cores, 2026-11-22")
    loss, accuracy = "validation/mlm/loss", "validation/classify/accuracy"
    losses = (("rate15", 4.42), ("rate30", 4.32), ("rate40", 4.39), ("span", 5.31))
    accuracies = (("rate15", 0.685), ("rate30", 0.698), ("rate40", 0.716), ("nsp", 0.672))
    return [
        *(dict(metric=loss, group=g, value=x, tolerance=0.15, **own) for g, x in losses),
        *(dict(metric=accuracy, group=g, value=x, tolerance=0.05, **own) for g, x in accuracies),
    ]
