"""Masked-language-model pretraining of a BERT on real text (Devlin et al. 2019), from nothing.

    python run.py --config=configs/mlm.py                 on the documentation that ships with Python
    python run.py --config=configs/mlm.py --config.data.train=my.txt --config.data.name=text
"""

from ml_collections import ConfigDict

from fmjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, variant="mini", runlocal=False)
    config = ConfigDict()

    config.task = "train"
    config.seed = 0
    config.total = "600 steps"
    config.batch_size = 64
    config.accumulate = 1
    config.precision = "bfloat16"
    config.init = ""  # start from a Hugging Face folder or hub id, or from a run folder

    config.data = dict(
        name="pydocs",
        seq_len=128,
        format="packed",
        pair="nsp",
        train="",
        validation="",
        validation_fraction=0.05,
        column="text",
        document="blank_line",
        long="split",
        on_bad_record="raise",
        path="",
        subset="",
        revision="",
        streaming=False,
        max_documents=0,
        workers=0,
        cache="",
    )
    config.tokenizer = dict(
        name="train", kind="wordpiece", vocab_size=8192, lowercase=True, revision=""
    )
    config.model = dict(
        name="bert",
        variant="mini",
        vocab_size=0,  # the tokenizer's
        max_len=512,
        dropout=0.0,
        attention_dropout=0.0,
        classes={},
        attention="auto",
        scan=True,
        remat="none",
    )
    config.objectives = dict(
        mlm=dict(weight=1.0, rate=0.15, mask="token", replace=(0.8, 0.1)),
    )

    config.groups = ((".*", "train"),)
    config.group_optim = {}
    config.optim = dict(
        name="adamw",
        args=dict(b1=0.9, b2=0.98, eps=1e-6),
        lr=1e-3,
        schedule="linear",
        warmup="10%",
        cooldown="0%",
        end=0.0,
        clip=1.0,
        weight_decay=0.01,
        decay=r".*/(kernel|embedding)",
        layer_decay=1.0,
        ema=0.0,
    )

    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.distributed = dict(auto=False, coordinator="", num_processes=1, process_id=0)
    config.log_every = 20
    config.eval_every = 200
    config.save_every = 100
    config.keep = 2
    config.best = "validation/loss"
    config.max_skipped = 10
    config.tensorboard = True
    config.wandb = False
    return config
