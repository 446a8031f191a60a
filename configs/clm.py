"""Causal-language-model pretraining from nothing (Radford et al. 2019), of a small GPT-2.

    python run.py --config=configs/clm.py

Differs from configs/mlm.py in the model, the objective, and in the tokens: pieces of bytes, none
lost, with one that ends each document.
"""

import runpy
from pathlib import Path

from fmjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, variant="small", runlocal=False)
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]
    config = mlm(f"{arg.variant},runlocal={arg.runlocal}")
    config.data.frame = "document"  # what ends a document does not end each piece of a long one
    config.tokenizer.update(kind="bpe", special="gpt", lowercase=False)
    config.model.update(name="gpt2", variant="tiny")
    config.objectives = dict(clm=dict(weight=1.0))
    config.optim.update(lr=3e-3, clip=1.0, weight_decay=0.1)
    config.optim.args.update(b2=0.95, eps=1e-8)
    config.ledger = ("samples",)
    config.samples = dict(prompt="", count=3, length=64, temperature=0.8, top_k=0)
    return config
