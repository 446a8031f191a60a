"""A search for the learning rate and its decay by layers with Optuna, one trial after the other.

    pip install optuna
    python run.py --config=configs/mlm.py     # once: the encoder that this starts from
    python run.py --config=configs/ablations/search.py --sweep
    python run.py --config=configs/ablations/search.py:trials=50,method=lora --sweep

The search is a sweep that is told of each trial before it says the next
(`fmjax.experiments.trials`). It draws the same numbers each time, so that the same command goes on.
`method` is one of configs/compare.py. The best of many trials looks better than it is: run it again
with other seeds, on other examples.

Has not been run to its end.
"""

import runpy
from pathlib import Path

from fmjax.config.load import parse_arg

COMPARE = runpy.run_path(str(Path(__file__).resolve().parents[1] / "compare.py"))
DEFAULTS = dict(method="full", trials=20, steps=100, big=False)


def get_sweep(arg=None):
    import optuna

    arg = parse_arg(arg, **DEFAULTS)
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(arg.trials):
        trial = study.ask()
        record = yield {
            "optim.lr": trial.suggest_float("lr", 1e-5, 3e-2, log=True),
            "optim.layer_decay": trial.suggest_float("layer_decay", 0.5, 1.0),
        }
        done = record["state"] == "done"
        found = record["results"][0]["metrics"]["validation/classify/accuracy"] if done else None
        failed = optuna.trial.TrialState.FAIL
        study.tell(trial, found, state=None if done else failed)


def get_config(arg=None):
    arg = parse_arg(arg, **DEFAULTS)
    of_all = f"steps={arg.steps},big={arg.big},seeds=1"
    config = COMPARE["get_config"](f"{arg.method},{of_all}")
    config.ledger = ()
    return config
