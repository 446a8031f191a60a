"""configs/finetune.py with vectors in front of a frozen model: soft prompts, and the head.

    python run.py --config=configs/finetune_prompt.py                   # prompt tuning
    python run.py --config=configs/finetune_prompt.py:kind=mlp          # P-tuning; or kind=lstm
    python run.py --config=configs/finetune_prompt.py:kind=prefix       # of every layer's keys and values
    python run.py --config=configs/finetune_prompt.py:kind=projected    # the same, by a perceptron

Lester et al. 2021, Liu et al. 2021 (P-tuning) and 2022 (P-tuning v2), Li and Liang 2021. MiniLM on
3,200 sentences of SST-2 on two cores (2026-11-22, three seeds, 1.1 to 2.5 minutes each), where the
head alone has 70.0 ± 0.9 %: `prompt` 74.2 ± 1.6 % at 1e-2 (57.1 at 5e-2), `prefix` 76.2 ± 0.3 % at
1e-2, `projected` 78.1 ± 1.0 % at 5e-3; `lstm` 74.3 % at 1e-3, one seed; `mlp` was not run. In front
of the tiny encoder of the commands above they add little: `prompt` has 53.1 ± 0.5 % (2026-12-01,
three seeds), where the head alone has 52.1 ± 1.0 % and everything 84.8 %.
"""  # noqa: E501  a command is one line

import runpy
from pathlib import Path

from fmjax.config.load import parse_arg
from fmjax.errors import ConfigError, did_you_mean

PROMPT = dict(
    name="prompt",
    length=20,
    init="vocabulary",  # or text, random, or without config.init: normal
    text="",
    encoder="",
    hidden=128,
    whole="token",  # or prompt: heads on the first token see the first vector's state, as in PEFT
)
KINDS = {
    "prompt": PROMPT,
    "mlp": PROMPT | dict(encoder="mlp"),
    "lstm": PROMPT | dict(encoder="lstm"),
    "prefix": dict(name="prefix", length=20, hidden=0),
    "projected": dict(name="prefix", length=20, hidden=128),
}


def get_config(arg=None):
    arg = parse_arg(arg, task="classify", kind="prompt", runlocal=False)
    if arg.kind not in KINDS:
        raise ConfigError(f"unknown kind {arg.kind!r}.{did_you_mean(arg.kind, KINDS)}")
    parent = runpy.run_path(str(Path(__file__).with_name("finetune.py")))
    config = parent["get_config"](f"{arg.task},runlocal={arg.runlocal}")
    config.adapter = KINDS[arg.kind]
    config.groups = ((".*/(prompt|prefix)_.*|head/.*", "train"), (".*", "freeze"))
    config.optim.lr = 1e-2
    return config


def get_expected():
    return [
        dict(
            metric="validation/classify/accuracy",
            value=0.531,
            tolerance=0.04,
            seeds=(0, 1, 2),
            budget=10,
            source="three seeds on two cores, 2026-12-01",
        ),
    ]
