"""Names of the parameters of Llama and its relatives in Hugging Face's files.

The table is read in both directions. Left is a module of `fmjax.models.llama`, right its name in a
file that `transformers` wrote; `{}` is the layer number, `{{}}` that of an expert. Torch keeps a
Linear's weight as (out, in), so kernels are transposed. BLOOM has queries, keys and values in one
tensor, those of each head after each other. What is multiplied with the activation is
`up_proj` there and `gate` here.
"""

import re
from collections.abc import Mapping
from typing import Any

from fmjax.convert.files import Place
from fmjax.convert.llama_config import (
    PREFIXES,
    architectures,
    hf_config,
    labels,
    model_options,
    type_of,
)
from fmjax.convert.llama_options import ALIASES, ANSWERED_AS_TRANSFORMER

__all__ = [
    "ALIASES",
    "ARCHITECTURES",
    "POOLED",
    "SHARED",
    "canonical",
    "hf_config",
    "labels",
    "model_options",
    "place",
    "tied",
    "type_of",
]

ARCHITECTURES = {kind: architectures(kind) for kind in PREFIXES}
POOLED = dict.fromkeys(PREFIXES, ("last",))  # what stands for the whole before a head
_LAYER = "model.layers.{}"
_COMMON = {
    "embed/token": "model.embed_tokens",
    "block_{}/attn/query": f"{_LAYER}.self_attn.q_proj",
    "block_{}/attn/key": f"{_LAYER}.self_attn.k_proj",
    "block_{}/attn/value": f"{_LAYER}.self_attn.v_proj",
    "block_{}/attn/out": f"{_LAYER}.self_attn.o_proj",
    "block_{}/query_norm": f"{_LAYER}.self_attn.q_norm",
    "block_{}/key_norm": f"{_LAYER}.self_attn.k_norm",
    "block_{}/mlp/up": f"{_LAYER}.mlp.gate_proj",
    "block_{}/mlp/gate": f"{_LAYER}.mlp.up_proj",
    "block_{}/mlp/down": f"{_LAYER}.mlp.down_proj",
    "norm": "model.norm",
    "head/lm": "lm_head",
    **dict.fromkeys(("head/classify", "head/regress", "head/tag"), "score"),
    "head/span": "qa_outputs",
}
_BEFORE = {
    "block_{}/attn_norm": f"{_LAYER}.input_layernorm",
    "block_{}/mlp_norm": f"{_LAYER}.post_attention_layernorm",
}
_BEHIND = {
    "block_{}/attn_norm_behind": f"{_LAYER}.post_attention_layernorm",
    "block_{}/mlp_norm_behind": f"{_LAYER}.post_feedforward_layernorm",
}
_AROUND = _BEHIND | {
    "block_{}/attn_norm": f"{_LAYER}.input_layernorm",
    "block_{}/mlp_norm": f"{_LAYER}.pre_feedforward_layernorm",
}
_NORMS = {"olmo2": _BEHIND, "olmo3": _BEHIND, "gemma2": _AROUND, "gemma3_text": _AROUND}
_SPARSE = f"{_LAYER}.block_sparse_moe"
_MIXTRAL = {
    "block_{}/mlp/router": f"{_SPARSE}.gate",
    "block_{}/mlp/experts/up": f"{_SPARSE}.experts.{{{{}}}}.w1",
    "block_{}/mlp/experts/gate": f"{_SPARSE}.experts.{{{{}}}}.w3",
    "block_{}/mlp/experts/down": f"{_SPARSE}.experts.{{{{}}}}.w2",
}
_QWEN = {
    "block_{}/mlp/router": f"{_LAYER}.mlp.gate",
    "block_{}/mlp/experts/up": f"{_LAYER}.mlp.experts.{{{{}}}}.gate_proj",
    "block_{}/mlp/experts/gate": f"{_LAYER}.mlp.experts.{{{{}}}}.up_proj",
    "block_{}/mlp/experts/down": f"{_LAYER}.mlp.experts.{{{{}}}}.down_proj",
    "block_{}/mlp/shared/up": f"{_LAYER}.mlp.shared_expert.gate_proj",
    "block_{}/mlp/shared/gate": f"{_LAYER}.mlp.shared_expert.up_proj",
    "block_{}/mlp/shared/down": f"{_LAYER}.mlp.shared_expert.down_proj",
    "block_{}/mlp/shared_gate": f"{_LAYER}.mlp.shared_expert_gate",
}
_EXPERTS = {"mixtral": _MIXTRAL, "qwen2_moe": _QWEN, "qwen3_moe": _QWEN}
_BLOOM_LAYER = "transformer.h.{}"
_BLOOM = {
    "embed/token": "transformer.word_embeddings",
    "embed/norm": "transformer.word_embeddings_layernorm",
    "block_{}/attn_norm": f"{_BLOOM_LAYER}.input_layernorm",
    "block_{}/attn/query": f"{_BLOOM_LAYER}.self_attention.query_key_value",
    "block_{}/attn/key": f"{_BLOOM_LAYER}.self_attention.query_key_value",
    "block_{}/attn/value": f"{_BLOOM_LAYER}.self_attention.query_key_value",
    "block_{}/attn/out": f"{_BLOOM_LAYER}.self_attention.dense",
    "block_{}/mlp_norm": f"{_BLOOM_LAYER}.post_attention_layernorm",
    "block_{}/mlp/up": f"{_BLOOM_LAYER}.mlp.dense_h_to_4h",
    "block_{}/mlp/down": f"{_BLOOM_LAYER}.mlp.dense_4h_to_h",
    "norm": "transformer.ln_f",
    "head/lm": "lm_head",
    **dict.fromkeys(("head/classify", "head/regress"), "score"),
    "head/tag": "classifier",
    "head/span": "qa_outputs",
}
_PARTS = ("query", "key", "value")  # of BLOOM's tensor
TABLES = {kind: _COMMON | _NORMS.get(kind, _BEFORE) | _EXPERTS.get(kind, {}) for kind in PREFIXES}
TABLES["bloom"] = _BLOOM
SHARED = frozenset({"classify", "regress", "tag", "span"})  # heads of which a class has one
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
BUFFERS = r".*\.rotary_emb\.inv_freq"  # constants in old files, no parameters


def tied(hf: Mapping[str, Any]) -> dict[str, str]:
    """{tensor: the one that it repeats}; some files hold both."""
    table = f"{TABLES[hf['model_type']]['embed/token']}.weight"
    return {"lm_head.weight": table} if model_options(hf)["tied"] else {}


def place(hf: Mapping[str, Any], name: str) -> Place | None:
    """Where the parameter `name` is in files with a config.json; None if it is in none of them."""
    module, leaf = name.rsplit("/", 1)
    layer = re.match(r"block_(\d+)/", module)
    entry = TABLES[hf["model_type"]].get(re.sub(r"^block_\d+/", "block_{}/", module))
    if entry is None or leaf not in LEAVES:
        return None
    key = entry.format(int(layer[1])) if layer else entry
    if _trunk_is_transformer(hf):
        key = re.sub(r"^model\.", "transformer.", key)
    each = "experts" if "/experts/" in module else 0
    name = module.rpartition("/")[2]
    if hf["model_type"] == "bloom" and name in _PARTS:
        part = _PARTS.index(name)
        return Place(f"{key}.{LEAVES[leaf]}", leaf == "kernel", part, 3, heads="heads")
    return Place(f"{key}.{LEAVES[leaf]}", leaf == "kernel", each=each)


def _trunk_is_transformer(hf: Mapping[str, Any]) -> bool:
    """True if the class of a config.json names its trunk "transformer", where others have
    "model"."""
    answers = any(kind.endswith("ForQuestionAnswering") for kind in hf.get("architectures") or ())
    return answers and hf["model_type"] in ANSWERED_AS_TRANSFORMER


def canonical(model_type: str, key: str) -> str:
    """A file's key as the tables have it: bare trunks get their prefix."""
    if model_type == "bloom":
        bare = re.match(r"(word_embeddings(_layernorm)?|h|ln_f)\.", key)
        return f"transformer.{key}" if bare else key
    return f"model.{key}" if re.match(r"(embed_tokens|layers|norm)\.", key) else key
