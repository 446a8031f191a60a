"""Sequence to sequence with an encoder–decoder (T5, Raffel et al. 2020): translation, summaries.

    python run.py --config=configs/seq2seq.py --config.data.train=train.jsonl \\
        --config.data.validation=val.jsonl --config.data.columns=en --config.data.label=de

Several pairs share a row and do not see each other; a source that is a list is joined, of a list of
targets each is one of its own. `configs/seq2seq.py:summarise` has longer sources. On Multi30k
(29,000 pairs, English to German) from nothing, one seed, two cores beside tests, nine minutes
(Python 3.11, 2026-11-22): 1.927 nats a token of the 1,014 pairs of its validation, 61.0 % right;
the model has 1.9 M parameters. With a rate of 3e-3 for its tables too (configs/span_corruption.py
says why they have their own) it came to 2.614. On SciTLDR, `:summarise`, one seed, twelve minutes
beside tests: 5.265 nats a token of its validation after four of the eight epochs, and 5.451 after
all, as the 1,992 papers are few. configs/translate.py makes of their test files (sacreBLEU's 13a,
ROUGE-1, 2 and Lsum): 1,000 sentences at BLEU 32.2 greedily and 33.4 with four beams; 618 summaries
at 21.0, 5.2, 17.6 and at 26.3, 8.1, 22.4, in phrases that fit any paper.
"""

import runpy
from pathlib import Path

from ml_collections.config_dict import placeholder

from fmjax.config.load import parse_arg
from fmjax.errors import ConfigError, did_you_mean

TASKS = {
    "translate": dict(seq_len=128),
    "summarise": dict(seq_len=512, target_len=128),
}
VARIANTS = ("small", "tiny")


def get_config(arg=None):
    arg = parse_arg(arg, task="translate", variant="small", runlocal=False)
    for key, possible in (("task", TASKS), ("variant", VARIANTS)):
        if arg[key] not in possible:
            raise ConfigError(f"unknown {key} {arg[key]!r}.{did_you_mean(arg[key], possible)}")
    mlm = runpy.run_path(str(Path(__file__).with_name("mlm.py")))["get_config"]
    config = mlm(f"{arg.variant},runlocal={arg.runlocal}")
    config.data.update(format="seq2seq", long="truncate", columns="source", label="target")
    config.data.update(target_len=0, source_prefix="", pack=True)
    config.data.update(TASKS[arg.task])
    config.tokenizer.update(kind="unigram", special="t5", lowercase=False)
    config.model.update(name="t5", variant="tiny", encoder_depth=placeholder(int))
    config.objectives = dict(seq2seq=dict(weight=1.0))
    config.optim.args.eps = 1e-8
    config.optim.lr = 1e-3
    # The table's elements are of deviation 1, as T5 has it: Adam's steps must be as much larger.
    config.groups = (("embed/.*", "embed"), (".*", "train"))
    config.group_optim = dict(embed=dict(lr=1e-2))
    config.batch_size = 8
    if arg.variant == "small" and not arg.runlocal:
        config.total = "8 epochs"
        with config.ignore_type():
            config.eval_every = config.save_every = "1 epoch"
    return config


def get_expected(arg=None):
    if arg is not None:
        return []
    given = ("data.train", "data.validation", "data.columns", "data.label")
    source = "one seed on two cores, 2026-11-22: Multi30k, English to German"
    of_all = dict(seeds=(0,), budget=30, source=source, given=given)
    return [dict(metric="validation/loss", value=1.93, tolerance=0.1, **of_all)]
