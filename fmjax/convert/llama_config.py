"""config.json of Hugging Face's Llama and its relatives against our options.

The tables (llama_options.py) are read in both directions; names of parameters are in llama.py.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fmjax.convert import llama_layers, llama_rope, options
from fmjax.convert.llama_options import (
    ANSWERED,
    CLASSIFIED,
    CONSTANT,
    FIXED,
    NULLABLE,
    OPTIONS,
    PLAIN,
    PREFIXES,
    TAGGED,
)
from fmjax.errors import ConfigError, quoted

_SCALED = ("gemma2", "gemma3_text")  # families with a key for the scale of queries
_OWN_BIASES = (
    *("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "qwen3_moe", "olmo"),
    "smollm3",
)
_SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe")


def architectures(model_type: str) -> options.Architectures:
    """Classes of transformers and the heads they have, the richest first."""
    prefix, classified = PREFIXES[model_type], f"{CLASSIFIED[model_type]}ForSequenceClassification"
    tasks = [(classified, frozenset({head})) for head in ("classify", "regress")]
    if model_type in TAGGED:
        tasks.append((f"{prefix}ForTokenClassification", frozenset({"tag"})))
    if model_type in ANSWERED:
        tasks.append((f"{prefix}ForQuestionAnswering", frozenset({"span"})))
    causal = f"{prefix}ForCausalLM"
    return (*tasks, (causal, frozenset({"lm"})), (causal, frozenset()))


def model_options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `models.llama.Model` for a config.json.

    Raises ConfigError for an option that the model does not have.
    """
    kind = hf["model_type"]
    if kind == "gemma":
        hf = {**hf, "hidden_act": _gemma_activation(hf)}
    found = options.read(hf, OPTIONS[kind], FIXED[kind])
    found |= {field: found[field] or 0 for field in NULLABLE if field in found}
    found |= CONSTANT[kind]
    if kind == "bloom":
        found["mlp"] = 4 * found["width"]
    else:
        found |= llama_rope.read(hf, kind)
    found |= llama_layers.read(hf, kind, found["depth"])
    if kind in _SPARSE:
        found |= _routing(hf, found["depth"])
    if kind in _OWN_BIASES:
        found |= dict.fromkeys(("qkv_bias", "out_bias"), bool(hf.get("attention_bias", False)))
    if kind in _SCALED:
        found["query_scale"] = float(hf.get("query_pre_attn_scalar", 256)) ** -0.5
    classes = options.classes(hf, architectures(kind))
    return found | {"variant": "llama2_7b"} | ({"classes": classes} if classes else {})


def type_of(cfg: Any) -> str:
    """`model_type` of a `models.llama.Config`, the plainest that has its options."""
    if cfg.experts:
        return "qwen2_moe" if cfg.shared_mlp else "qwen3_moe" if cfg.qk_norm else "mixtral"
    if cfg.alibi:
        return "bloom"
    if cfg.nope_every or cfg.nope_layers:
        return "smollm3"
    if cfg.norm == "plain":
        return "olmo"
    if cfg.norms == "behind":
        return "olmo3" if cfg.window or cfg.theta_window else "olmo2"
    if cfg.norms == "around":
        return "gemma3_text" if cfg.qk_norm else "gemma2"
    if cfg.norm_offset:
        return "gemma"
    if cfg.qk_norm:
        return "qwen3"
    if cfg.qkv_bias and not cfg.out_bias:
        return "qwen2"
    if cfg.window:
        return "ministral" if any(cfg.full_layers) else "mistral"
    return "llama"


def hf_config(
    cfg: Any, heads: Iterable[str], ids: Mapping[str, int], labels: Sequence[str] = ()
) -> dict[str, Any]:
    """config.json for a `models.llama.Config`, the heads to write, the ids of special tokens and
    the names of the classes, if any.

    Raises ConfigError for a combination of options that no class of transformers has.
    """
    kind = type_of(cfg)
    config = {
        "architectures": [
            next(name for name, has in architectures(kind) if has == set(heads) - {""})
        ],
        "model_type": kind,
        "dtype": "float32",
        **{f"{name}_token_id": ids.get(name) for name in ("bos", "eos", "pad")},
        **options.named_outputs(dict(cfg.classes), heads, labels),
        **options.written(cfg, OPTIONS[kind]),
    }
    config |= {key: None for key, (field, _) in OPTIONS[kind].items() if _is_null(cfg, field)}
    needed = PLAIN | CONSTANT[kind]
    if kind == "bloom":
        options.require(kind, "kv_heads", cfg.key_heads, cfg.heads)
        options.require(kind, "head_size", cfg.size, cfg.width // cfg.heads)
        options.require(kind, "mlp", cfg.mlp, 4 * cfg.width)
    else:
        config |= {"num_key_value_heads": cfg.key_heads, "head_dim": cfg.size}
        config |= llama_rope.written(cfg, kind)
    config |= llama_layers.written(cfg, kind)
    if kind in _SPARSE:
        config |= _written_routing(cfg, kind)
        needed |= dict(experts=cfg.experts)
        needed |= dict(dense_layers=(), expert_mlp=0) if kind == "mixtral" else {}
    has = {field for field, _ in OPTIONS[kind].values()} | llama_layers.fields(kind)
    has |= {"theta_window"} if kind in llama_rope.LOCAL else set()
    if kind in _SCALED:
        scale = cfg.query_scale or cfg.size**-0.5
        config["query_pre_attn_scalar"] = size = round(scale**-2)
        if not math.isclose(size**-0.5, scale, rel_tol=1e-6):
            raise ConfigError(
                f"config.model.query_scale={scale!r} cannot be exported: transformers' {kind} has "
                f"1 / sqrt(n) of a whole number n; the nearest is {size**-0.5!r}."
            )
        del needed["query_scale"]
    needed.setdefault("out_bias", False)
    if kind in _OWN_BIASES:
        needed["out_bias"] = config["attention_bias"] = cfg.qkv_bias
    else:
        needed.setdefault("qkv_bias", False)
    for field, value in needed.items():
        if field not in has:
            options.require(kind, field, getattr(cfg, field), value)
    return config


def labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a config.json gives; () where it has none for a head."""
    return options.labels(hf, options.classes(hf, architectures(hf["model_type"])))


def _is_null(cfg: Any, field: str) -> bool:
    return field in NULLABLE and not getattr(cfg, field)


def _gemma_activation(hf: Mapping[str, Any]) -> str:
    """Gemma's "gelu" is the tanh approximation: the published files call it so, and transformers
    takes it so. `hidden_activation`, which it does not read, must not say otherwise."""
    tanh = "gelu_pytorch_tanh"
    names = [hf.get(key) or tanh for key in ("hidden_act", "hidden_activation")]
    act, other = (tanh if name == "gelu" else name for name in names)
    if hf.get("hidden_activation") and other != act:
        raise ConfigError(
            f"config.json has hidden_activation={quoted(hf['hidden_activation'])} beside "
            f"hidden_act={quoted(hf.get('hidden_act'))}: versions of transformers differ in which "
            "of them counts."
        )
    return act


def _routing(hf: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """The layers without experts, and the router losses with which transformers would train."""
    step, alone = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    if not isinstance(step, int) or step < 1:
        raise ConfigError(
            f"config.json has decoder_sparse_step={quoted(step)}, not a number of layers from 1."
        )
    dense = tuple(i for i in range(depth) if i in alone or (i + 1) % step)
    factor = float(hf.get("router_aux_loss_coef", 0.001))
    told = bool(hf.get("output_router_logits", False))
    losses = {"router_aux_loss": factor if told else 0.0, "router_z_loss": 0.0}
    return {"dense_layers": dense, **losses}


def _written_routing(cfg: Any, kind: str) -> dict[str, Any]:
    config = {
        "output_router_logits": cfg.router_aux_loss > 0,
        "router_aux_loss_coef": cfg.router_aux_loss,
    }
    if kind == "mixtral":
        return config
    sparse = {"decoder_sparse_step": 1, "mlp_only_layers": list(cfg.dense_layers)}
    return config | sparse | {"moe_intermediate_size": cfg.expert_mlp or cfg.mlp}
