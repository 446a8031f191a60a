"""adapter_config.json as PEFT writes it, checked: a setting that fmjax does not know is refused."""

from pathlib import Path
from typing import Any

from fmjax.errors import ConfigError, quoted
from fmjax.snapshot import read_json

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
