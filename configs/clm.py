"""Causal-language-model pretraining from nothing (Radford et al. 2019), of a small GPT-2.

    python run.py --config=configs/clm.py

Differs from configs/mlm.py in the model, the objective, and in the tokens: pieces of bytes, none
lost, with one that begins and ends each document.

Three minutes a seed on two cores, of which tests had a part (Python 3.11, 2026-11-22, three seeds):
1.909 ± 0.005 bits a byte of held-out documentation, 4.671 ± 0.012 nats a token. Three samples
stand at the end of the output, in report.html and in ledger.json; configs/generate.py writes more.
Variants: `tiny` (seconds), `runlocal`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fmjax.config.load import parse_arg
from fmjax.errors import ConfigError, did_you_mean

VARIANTS = ("small", "tiny")


def get_config(arg=None):
    arg = parse_arg(arg, variant="small", runlocal=False)
    if arg.variant not in VARIANTS:
        raise ConfigError(f"unknown variant {arg.variant!r}.{did_you_mean(arg.variant, VARIANTS)}")
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]
    config = mlm(f"{arg.variant},runlocal={arg.runlocal}")
    config.data.frame = "document"  # what ends a document does not end each piece of a long one
    config.tokenizer.update(kind="bpe", special="gpt", lowercase=False)
    config.model.update(name="gpt2", variant="tiny")
    config.objectives = dict(clm=dict(weight=1.0))
    config.optim.update(lr=3e-3, clip=1.0, weight_decay=0.1)
    config.optim.args.update(b2=0.95, eps=1e-8)
    config.ledger = ("samples",)
    config.samples = ConfigDict(
        dict(prompt="", count=3, length=64, temperature=0.8, top_k=placeholder(int))
    )
    if arg.variant == "tiny":
        config.samples.length = 16
    return config


def get_expected(arg=None):
    if arg is not None:
        return []
    of_all = dict(seeds=(0, 1, 2), budget=30, source="three seeds on two cores, 2026-11-22")
    return [
        dict(metric="validation/loss", value=4.67, tolerance=0.15, **of_all),
        dict(metric="validation/clm/bits_per_byte", value=1.908, tolerance=0.05, **of_all),
    ]
