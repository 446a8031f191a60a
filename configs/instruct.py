"""Instruction tuning of a decoder: it learns what the assistant says, and nothing else.

    python run.py --config=configs/clm.py         # once: the decoder that this starts from
    python run.py --config=configs/instruct.py    # what a function of Python's library does
    python run.py --config=configs/instruct.py --config.init=<run, Hugging Face folder or hub id> \\
        --config.data.train=chats.jsonl --config.optim.lr=2e-5
    python run.py --config=configs/instruct.py --config.data.train=alpaca.json \\
        --config.data.columns=instruction,input,output --config.data.template=alpaca

(Ouyang et al. 2022, §3.5, the supervised part.) The second, on two cores and Python 3.11
(2026-11-22, three seeds, four minutes each beside other work): of 348 held-out answers, each the
first paragraph of a docstring, the decoder of the first command has 4.87 nats a token and 15.0 % of
the tokens right, this one 3.865 ± 0.004 and 31.0 ± 0.2 %. It has read most of the docstrings
before, but not as answers.

Questions in a column and answers in another are `columns="question,answer"`. The text of a
conversation is that of the tokenizer's chat template; for one without it is "### User:", what is
asked, "### Assistant:" and the answer, each on lines of its own (`fmjax/data/chat.py`).
What cannot be told apart by the template, or is no conversation, is named with file and line. Any
adapter goes with it, as in configs/finetune_lora.py; soft prompts need `format=chat_padded`.
"""

import runpy
from pathlib import Path

from ml_collections.config_dict import placeholder

from fmjax.config.load import digest, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, runlocal=False)
    clm = runpy.run_path(str(Path(__file__).with_name("clm.py")))["get_config"]
    config = clm(f"small,runlocal={arg.runlocal}")
    config.init = f"runs/clm-{digest(clm())}"
    config.total = "4 epochs"
    config.data.update(
        format="chat",  # several conversations a row; or chat_padded, one, as soft prompts need
        columns="messages",  # or a question and its answer, "a,b", or instruction, input and answer
        template="auto",  # the tokenizer's own, where it has none "plain"; or alpaca
        frame="piece",
        long="drop",
        validation_fraction=0.1,
    )
    config.tokenizer.name = "init"  # as config.init has it
    sizes = dict.fromkeys(config.model, None) | dict(variant=placeholder(str))
    how = {key: config.model[key] for key in ("attention", "scan", "remat")}
    config.model = sizes | how | dict(name="init")  # what is None is as config.init has it
    config.optim.lr = 1e-3
    config.samples.prompt = "### User:\nWhat does len(obj) do?\n\n### Assistant:\n"
    with config.ignore_type():
        config.eval_every = config.save_every = "1 epoch"
    if arg.runlocal:
        config.total = "10 steps"
    return config


def get_expected():
    of_all = dict(seeds=(0, 1, 2), budget=30, source="three seeds on two cores, 2026-11-22")
    return [
        dict(metric="validation/loss", value=3.87, tolerance=0.1, **of_all),
        dict(metric="validation/clm/accuracy", value=0.31, tolerance=0.02, **of_all),
    ]
