"""A ladder of what to train of a decoder, to tell classes apart: configs/compare.py from a GPT-2.

python run.py --config=configs/clm.py                        # once: the decoder
python run.py --config=configs/compare_decoder.py --sweep    # which package a docstring is of
"""

import runpy
from pathlib import Path

from fmjax.config import digest, parse_arg

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
    rows = (("full", 0.6, 0.2), ("lora", 0.5, 0.2), ("head", 0.4, 0.2))
    of_all = dict(seeds=(0, 1, 2), budget=30, source="three seeds on two cores, 2026-11-22")
    metric = "validation/classify/accuracy"
    return [
        dict(metric=metric, group=group, value=value, tolerance=tolerance, **of_all)
        for group, value, tolerance in rows
    ]
