"""Does a small decoder learn from examples in its context, beside what training on them gives?

    python run.py --config=configs/clm.py --workdir=runs/decoder \\
        --config.data.seq_len=512 --config.model.max_len=512 --config.batch_size=4
    python run.py --config=configs/ablations/in_context.py --sweep   # docstrings of Python
    python run.py --config=configs/ablations/in_context.py:task=sst2 --sweep \\
        --config.data.train=SST-2/train.tsv --config.data.validation=SST-2/dev.tsv \\
        --config.data.columns=sentence --config.data.seq_len=64

The base, runs/decoder or config.init, is asked in the words of each of two templates, behind 0 to
16 examples that are drawn for each question by the seed; its answer is the choice that gains most
over the same words with nothing in them (`norm=gain`, or `sum` for the likeliest). Beside that the
head, LoRA and everything train for 100 steps, of 16 on 16 examples that are drawn by the seed, and
of 32 on all. Docstrings are asked of a hundred held-out ones alone, evenly over all.

The second command took 17 minutes on two cores beside other work (2026-11-23; accuracy in % of 15
packages, mean and standard deviation of three seeds, without examples one; what is trained is
measured on all 762 held-out docstrings):

    examples               0            1            4            16            all
    "… Package:"          8.0       9.7 ± 5.9   10.0 ± 4.4
    "… This is in"       10.0      14.0 ± 2.6   11.7 ± 2.9
    the head                                                 23.0 ± 3.1    48.9 ± 0.3
    LoRA                                                     21.0 ± 2.2    56.3 ± 1.5
    everything                                               21.1 ± 1.4    60.2 ± 0.3

(The largest package is 15.5 %.) In context it cannot be told from chance, though such text is all
that it has read; 16 examples to train on are above it, and all give 49 to 60.

The last, of a GPT of 2.7 M parameters that had read 6.6 M tokens of books (--config.init), took
about 25 minutes on two cores beside other work (2026-11-23; accuracy in % on the 872 sentences of
SST-2's validation file, mean and standard deviation of three seeds, without examples one):

    examples               0            1            4            16            all
    "Review: …"          53.3      52.1 ± 1.2   52.8 ± 0.8   53.4 ± 0.2
    "… It was"           51.7      51.4 ± 0.3   52.6 ± 0.8   54.4 ± 1.4
    the head                                                 51.2 ± 1.5    60.4 ± 1.2
    LoRA                                                     50.0 ± 0.8    61.0 ± 2.7
    everything                                               49.4 ± 2.2    66.1 ± 0.9

(Half is chance, 50.9 % the larger class.) By the likeliest choice, without taking out what the
model says anyway, the first template is at 50.8 to 51.2 whatever is shown. So a model of this size
learns nothing in context that three seeds could show, nor by training on 16 examples; 3,200 raise
it by 7 to 13 points.
"""

import runpy
from pathlib import Path

from ml_collections import FieldReference

from fmjax.config.load import parse_arg
from fmjax.experiments import sweep

HERE = Path(__file__).resolve().parents[1]
DEFAULTS = dict(task="docstrings", way="full", template=0, norm="gain", steps=100, seeds=3)
TRAINED = ("head", "lora", "full")
# Of each task: shots, templates, words for the classes in their order (none: their names), and of
# how many examples it is asked; 0: all.
TASKS = {
    "docstrings": ((0, 1, 4), ("{text}\nPackage:", "{text}\nThis is in"), (), 100),
    "sst2": (
        (0, 1, 4, 16),
        ("Review: {sentence}\nSentiment:", "{sentence} It was"),
        ("bad", "good"),
        0,
    ),
}  # fmt: skip


def get_sweep(arg=None):
    arg = parse_arg(arg, **DEFAULTS)
    own = "".join(
        f",{k}={arg[k]}" for k in ("task", "norm", "steps", "seeds") if arg[k] != DEFAULTS[k]
    )
    shots, templates, *_ = TASKS[arg.task]
    asked = [
        {
            "arg": f"way=shots,template={template}{own}",
            "shots": (count,),
            "seed": seed,
            "group": f"{count} shots, template {template}",
        }
        for template in range(len(templates))
        for count in shots
        for seed in (range(arg.seeds) if count else (0,))
    ]
    few = {"data.examples": 16, "batch_size": 16}
    trained = [
        {"arg": f"way={way}{own}", "group": f"{way}, {name}", **settings}
        for way in TRAINED
        for name, settings in (("16", few), ("all", {"data.examples": 0}))
    ]
    return sweep.chain(asked, trained)


def get_config(arg=None):
    arg = parse_arg(arg, **DEFAULTS)
    load = lambda name: runpy.run_path(str(HERE / f"{name}.py"))["get_config"]
    if arg.way in TRAINED:
        config = load("compare")(f"{arg.way},steps={arg.steps},seeds={arg.seeds}")
        config.init = "runs/decoder"
        config.ledger = ("memory",)
        return config
    config, (_, templates, words, limit) = load("fewshot")(), TASKS[arg.task]
    config.init = FieldReference("runs/decoder")
    config.folder = config.get_oneway_ref("init")
    config.benchmark.update(name="classes", limit=limit)
    config.templates = (templates[arg.template],)
    config.update(words=words, norm=arg.norm)
    config.data.seq_len = 128
    return config


def get_expected(arg=None):
    arg = parse_arg(arg, **DEFAULTS)
    if (arg.task, arg.norm, arg.steps, arg.seeds) != ("docstrings", "gain", 100, 3):
        return []
    rows = (("4 shots, template 1", 0.117), ("head, all", 0.489))
    rows += (("lora, all", 0.563), ("full, all", 0.602))
    own = dict(seeds=(0, 1, 2), tolerance=0.04, budget=45)
    own |= dict(source="three seeds on two cores, 2026-11-23")
    metric = "validation/classify/accuracy"
    return [dict(metric=metric, group=group, value=value, **own) for group, value in rows]
