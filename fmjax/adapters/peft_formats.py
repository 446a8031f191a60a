"""The kinds of adapters that PEFT and fmjax both have: tensors and settings, both ways.

| peft_type | tensors |
|---|---|
| LORA | `<module>.lora_A.weight` (rank, in), `lora_B.weight` (out, rank); of tables `lora_embedding_A` and `_B`; of DoRA `lora_magnitude_vector` |
| IA3 | `<module>.ia3_l`: (out, 1), or (1, in) where the input is scaled |
| PROMPT_TUNING, P_TUNING | `prompt_embeddings` (length, width): of P-tuning what its network gives |
| PREFIX_TUNING | `prompt_embeddings` (length, layers · 2 · width of keys): keys and values by layer |

`<module>` is the name in transformers.
"""  # noqa: E501  a row of a table is one line

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fmjax.adapters import ia3, lora, peft_matrices, peft_prompts, prefix, prompt
from fmjax.adapters.peft_matrices import Held, Tensors
from fmjax.adapters.wrapper import Adapted
from fmjax.errors import ConfigError

Named = Mapping[str, Any]  # our parameters by name


class Format(NamedTuple):
    """Storage format of one kind of adapter."""

    before: str  # what PEFT writes before the name of a module
    # (model, parameters, {module in transformers that is adapted: what it holds}, heads)
    # -> (tensors, config)
    write: Callable[[Adapted, Named, Mapping[str, Held], list[str]], tuple[Tensors, dict[str, Any]]]
    # (folder, config, tensors, model, parameters, {module: what it holds}) -> (settings, leaves)
    read: Callable[..., tuple[Any, Tensors]]


def of(model: Adapted) -> str:
    """The peft_type of an adapter. Raises ConfigError for one that PEFT does not have."""
    kinds = {lora.Lora: "LORA", ia3.Ia3: "IA3", prefix.Prefix: "PREFIX_TUNING"}
    if isinstance(model.adapter, prompt.Prompt):
        return "P_TUNING" if model.adapter.encoder else "PROMPT_TUNING"
    if type(model.adapter) not in kinds:
        raise ConfigError(
            f"PEFT has no adapters of the kind {type(model.adapter).__name__}: keep the run's own."
        )
    return kinds[type(model.adapter)]


MODULE = "base_model.model."
_PROMPT = "base_model.", peft_prompts.write_prompt, peft_prompts.read_prompt
FORMATS = {
    "LORA": Format(MODULE, peft_matrices.write_lora, peft_matrices.read_lora),
    "IA3": Format(MODULE, peft_matrices.write_ia3, peft_matrices.read_ia3),
    "PROMPT_TUNING": Format(*_PROMPT),
    "P_TUNING": Format(*_PROMPT),
    "PREFIX_TUNING": Format("base_model.", peft_prompts.write_prefix, peft_prompts.read_prefix),
}
