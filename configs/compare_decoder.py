"""A ladder of what to train of a decoder, to tell classes apart: configs/compare.py from a GPT-2.

    python run.py --config=configs/clm.py                        # once: the decoder
    python run.py --config=configs/compare_decoder.py --sweep    # which package a docstring is of

The second took eight minutes on two cores beside tests (Python 3.11, 2026-11-22; three seeds, 100
steps of 32, accuracy in % on 762 docstrings): full 68.1 ± 1.6, lora 63.3 ± 2.1, qlora 63.1 ± 2.0,
last3 60.8 ± 0.7, last2 60.1 ± 1.5, ia3 60.0 ± 0.6, last1 56.9 ± 1.0, head 53.8 ± 0.6, bitfit 51.6
± 1.0. So short a training does not reach a logistic regression on words, 80.7, which has seen
all 3,216 docstrings.
"""

import runpy
from pathlib import Path

from fmjax.config.load import digest, parse_arg

RUNGS = ("full", "last3", "last2", "last1", "lora", "qlora", "ia3", "bitfit", "head", "words")


def _file(name):
    return runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))


def get_sweep(arg=None):
    compare = _file("compare")
    arg = parse_arg(arg, **compare["DEFAULTS"])
    rungs = arg.only.split("+") if arg.only else RUNGS
    return compare["trials"](rungs, arg, compare["DEFAULTS"])


def get_config(arg=None):
    config = _file("compare")["get_config"](arg)
    config.init = f"runs/clm-{digest(_file('clm')['get_config']())}"
    return config


def get_expected(arg=None):
    if arg is not None:
        return []
    rows = (("full", 0.68, 0.06), ("lora", 0.63, 0.06), ("head", 0.54, 0.03))
    of_all = dict(seeds=(0, 1, 2), budget=30, source="three seeds on two cores, 2026-11-22")
    metric = "validation/classify/accuracy"
    return [
        dict(metric=metric, group=group, value=value, tolerance=tolerance, **of_all)
        for group, value, tolerance in rows
    ]
