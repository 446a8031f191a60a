"""The command that loads an adapter written for PEFT, with its base, its task and its labels."""

from collections.abc import Mapping
from typing import Any

from fmjax.adapters.peft_settings import TASKS
from fmjax.convert.bert_config import pooling
from fmjax.convert.options import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from fmjax.models import WHOLE_HEADS

# {task_type: the end of the names of the classes that load it}
CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
}
# The same for heads that are no task of PEFT's.
OTHERS = {"choose": "ForMultipleChoice", "nsp": "ForPreTraining", "sop": "ForPreTraining"}


def command(folder: str, settings: Mapping[str, Any], opened: Any) -> str:
    """The command that loads the adapter in `folder`; `settings` are its adapter_config.json,
    `opened` the run (`fmjax.checkpoints.pretrained.Opened`). PEFT takes the base's config.json, so
    what the adapter's head needs there is in arguments."""
    task, source = settings["task_type"], settings["base_model_name_or_path"]
    cfg = opened.model.cfg
    labels = _labels(dict(cfg.classes), task, opened.labels)
    if task == "SEQ_CLS":
        whole = MULTI_LABEL if opened.several else SINGLE_LABEL
        problem = REGRESSION if "regress" in dict(cfg.classes) else whole
        labels += f", problem_type={problem!r}"
    if getattr(cfg, "modern", False) and {*dict(cfg.classes)} & {*WHOLE_HEADS}:
        labels += f", classifier_pooling={pooling(cfg)!r}"
    if source and task:
        return f"to load: peft.AutoPeftModel{CLASSES[task]}.from_pretrained({folder!r}{labels})"
    if not (source or opened.config.init):
        return (
            "to load it PEFT needs its base, which this run made itself and did not keep apart: "
            "with config.merge=True both are written as one model"
        )
    first = ""
    if not source:
        run = opened.config.init
        first = f"python run.py --config=configs/export.py --config.folder={run}, then "
        source = f"{run}/export"
    heads = [OTHERS[head] for head, _ in cfg.classes if head in OTHERS]
    revision = settings.get("revision")
    labels += f", revision={revision!r}" if revision else ""
    name = CLASSES.get(task) or next(iter(heads), "ForMaskedLM")
    base = f"transformers.AutoModel{name}.from_pretrained({source!r}{labels})"
    return f"to load: {first}peft.PeftModel.from_pretrained({base}, {folder!r})"


def _labels(outputs: Mapping[str, int], task: str | None, labels: tuple[str, ...]) -> str:
    """The arguments that give the base's class a head of the size of the adapter's."""
    heads = [head for head in outputs if task and TASKS.get(head) == task]
    if not heads or task == "QUESTION_ANS":
        return ""
    if heads[0] == "regress" or len(labels) != outputs[heads[0]]:
        return f", num_labels={outputs[heads[0]]}"
    names = dict(enumerate(labels))
    return f", id2label={names!r}, label2id={ {name: i for i, name in names.items()}!r}"
