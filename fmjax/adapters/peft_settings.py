"""adapter_config.json: what an adapter is for and where it sits, and the check of one by PEFT.

A setting that fmjax does not know is refused, since it may change what the adapter computes.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fmjax.errors import ConfigError, quoted
from fmjax.io.snapshot import read_json

CONFIG = "adapter_config.json"
# Settings that would change outputs, with the values that mean "not used".
OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "target_parameters": ([],),
    "ensure_weight_tying": (False,),
    "num_transformer_submodules": (1,),
}
# Settings that fmjax follows, or that the tensors say too: which modules, and of which rank.
FOLLOWED = (
    *("peft_type", "task_type", "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora"),
    *("use_dora", "init_lora_weights", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "feedforward_modules", "fan_in_fan_out"),
    *("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"),
)
# Settings that matter while training or starting alone, or that say where the adapter is from.
HARMLESS = (
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"),
    *("lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "init_ia3_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    *("tokenizer_kwargs", "prefix_projection", "init_weights"),
    *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers"),
    "encoder_dropout",
)
# {head: the task_type of PEFT}
TASKS = dict(classify="SEQ_CLS", regress="SEQ_CLS", tag="TOKEN_CLS", span="QUESTION_ANS")
KNOWN = frozenset({*OFF, *FOLLOWED, *HARMLESS})


def read(folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The settings of an adapter's folder. Raises ConfigError for a peft_type that is none of the
    `kinds`, and for a setting that is not null and either unknown or not supported."""
    path = folder / CONFIG
    try:
        given = read_json(path)
        kind = given.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error!r}") from error
    if kind not in kinds:
        raise ConfigError(f"{path} has peft_type={quoted(kind)}; fmjax reads {', '.join(kinds)}.")
    settings = {key: value for key, value in given.items() if value is not None}
    unsupported = [key for key, off in OFF.items() if settings.get(key, off[0]) not in off]
    if refused := unsupported + [key for key in settings if key not in KNOWN]:
        key = refused[0]
        raise ConfigError(
            f"{path}: {quoted(key)[1:-1]}={quoted(settings[key])} is not supported, and may change "
            "what the adapter computes: have PEFT merge it into its base (merge_and_unload), save "
            "that and use it in its place."
        )
    return given


def task(model: Any, heads: Iterable[str]) -> str | None:
    """The task_type of a model with these heads, None where PEFT has none, or several fit."""
    tasks = {TASKS[head] for head in heads if head in TASKS}
    if not tasks and model.cfg.lm_head and model.causal:
        tasks = {"CAUSAL_LM"}
    if not tasks and model.cfg.lm_head and model.decodes:
        tasks = {"SEQ_2_SEQ_LM"}
    return tasks.pop() if len(tasks) == 1 else None


def origin(source: str) -> dict[str, str | None]:
    """Where transformers finds the base of an adapter: the folder, or the hub id, in `source`, and
    its revision; for a run the folder that it was exported to, if it was."""
    if os.path.isdir(os.path.expanduser(source)):
        exported = os.path.join(source, "export")
        folder = exported if os.path.isdir(os.path.join(source, "checkpoints")) else source
        known = os.path.isfile(os.path.join(os.path.expanduser(folder), "config.json"))
        return {"base_model_name_or_path": folder if known else None, "revision": None}
    name, _, revision = source.partition("@")
    return {"base_model_name_or_path": name or None, "revision": revision or None}


def shortened(config: Mapping[str, Any], everything: Collection[str]) -> dict[str, Any]:
    """`config` with the shortest names that mean the same modules, of all that there are."""
    inputs = config.get("feedforward_modules", [])
    short = _suffixes(inputs, everything)
    changed = {"feedforward_modules": sorted(short)} if "feedforward_modules" in config else {}
    if "target_modules" in config:
        others = _suffixes(set(config["target_modules"]) - set(inputs), everything)
        changed["target_modules"] = sorted(short | others)
    return {**config, **changed}


def _suffixes(wanted: Iterable[str], everything: Collection[str]) -> set[str]:
    """For each module the shortest end of its name that only `wanted` ones have: "query"."""
    wanted, found = set(wanted), set()
    for name in sorted(wanted):
        parts = name.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        means = lambda end: {m for m in everything if m == end or m.endswith(f".{end}")}
        found.add(next(end for end in ends if means(end) <= wanted))
    return found
