"""Two towers trained to match views, with data, objective and source of this package."""

import runpy

from fmjax.config.load import parse_arg

MLM = "{ROOT}/configs/mlm.py"  # as the test has it


def get_config(arg=None):
    arg = parse_arg(arg, kind="Pairs")
    config = runpy.run_path(MLM)["get_config"]()
    config.total, config.batch_size = "6 steps", 8
    config.data = dict(format=f"outside.views:{arg.kind}", noise=0.3, examples=0, skip=())
    del config.tokenizer
    tower = dict(name="vit", variant="digits", depth=2, width=16, heads=2, mlp=32)
    tower |= dict(classes=dict(project=8))
    parts = dict(left=tower, right={**tower, "class_token": False})
    with config.ignore_type():
        config.init = {}  # {model: the folder that it starts from}
    config.model = dict(name="composite", parts=parts, scan=True, remat="none")
    config.objectives = dict(match=dict(module="outside.match", temperature=0.2))
    config.optim.update(lr=1e-3, warmup="0 steps")
    config.log_every, config.eval_every, config.save_every = 1, 3, 3
    config.best = "validation/match/nearest"
    config.tensorboard = False
    return config
