"""config.json of Hugging Face's Llama and its relatives against our options.

The tables (llama_options.py) are read in both directions; names of parameters are in llama.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fmjax.convert import options
from fmjax.convert.llama_options import (
    ALIASES,
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
from fmjax.errors import ConfigError

_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6}
_OWN_BIASES = (
    *("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "qwen3_moe", "olmo", "smollm3"),
)
_BASES = {"gemma3_text": 1e6, "mixtral": 1e6, "smollm3": 2e6}  # of positions, where nothing is said
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
    others = ALIASES.get(kind, {}).items()
    hf = {**hf, **{key: hf[other] for other, key in others if hf.get(other) is not None}}
    found = options.read(hf, OPTIONS[kind], FIXED[kind])
    found |= {field: found[field] or 0 for field in NULLABLE if field in found}
    found |= CONSTANT[kind]
    if kind == "bloom":
        found["mlp"] = 4 * found["width"]
    else:
        found |= _rope(hf, kind)
    if kind == "smollm3":
        found["nope_every"] = _nope_every(hf, found["depth"])
    if kind in _SPARSE:
        found |= _routing(hf, found["depth"])
    if kind in _OWN_BIASES:
        found |= dict.fromkeys(("qkv_bias", "out_bias"), bool(hf.get("attention_bias", False)))
    if kind in _FULL_EVERY:
        found["query_scale"] = float(hf.get("query_pre_attn_scalar", 256)) ** -0.5
        found["full_every"] = _full_every(hf, kind, found["depth"])
    classes = options.classes(hf, architectures(kind))
    return found | {"variant": "llama2_7b"} | ({"classes": classes} if classes else {})


def type_of(cfg: Any) -> str:
    """`model_type` of a `models.llama.Config`, the plainest that has its options."""
    if cfg.experts:
        return "qwen2_moe" if cfg.shared_mlp else "qwen3_moe" if cfg.qk_norm else "mixtral"
    if cfg.alibi:
        return "bloom"
    if cfg.nope_every:
        return "smollm3"
    if cfg.norm == "plain":
        return "olmo"
    if cfg.norms == "behind":
        return "olmo2"
    if cfg.norms == "around":
        return "gemma3_text" if cfg.qk_norm else "gemma2"
    if cfg.norm_offset:
        return "gemma"
    if cfg.qk_norm:
        return "qwen3"
    if cfg.qkv_bias and not cfg.out_bias:
        return "qwen2"
    return "mistral" if cfg.window else "llama"


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
        config |= _written_rope(cfg, kind)
    if kind == "smollm3":
        needed["nope_every"] = config["no_rope_layer_interval"] = cfg.nope_every
        config["no_rope_layers"] = _rotary(cfg.nope_every, cfg.depth)
    if kind in _SPARSE:
        config |= _written_routing(cfg, kind)
        needed |= dict(experts=cfg.experts)
        needed |= dict(dense_layers=(), expert_mlp=0) if kind == "mixtral" else {}
    has = {field for field, _ in OPTIONS[kind].values()}
    if kind in _FULL_EVERY:
        has |= {"full_every", "theta_window"} if kind == "gemma3_text" else {"full_every"}
        scale = cfg.query_scale or cfg.size**-0.5
        config["query_pre_attn_scalar"] = round(scale**-2)
        config["layer_types"] = [
            "full_attention" if full else "sliding_attention" for full in cfg.full_layers
        ]
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


def _full_every(hf: Mapping[str, Any], kind: str, depth: int) -> int:
    """Of which layers every n-th has no window, in the keys of transformers 4 or 5."""
    every = hf.get("sliding_window_pattern", _FULL_EVERY[kind])
    if kinds := hf.get("layer_types"):
        full = [i + 1 for i, name in enumerate(kinds) if name == "full_attention"]
        every = full[0] if full else depth + 1
        numbers = np.arange(1, depth + 1)
        if kinds != [("full" if i % every == 0 else "sliding") + "_attention" for i in numbers]:
            raise ConfigError(
                f"config.json has layer_types={kinds}; fmjax has every n-th layer without a window "
                "(config.model.full_every)."
            )
    return every


def _nope_every(hf: Mapping[str, Any], depth: int) -> int:
    """Every n-th layer of which has no positions; 0: none."""
    told = hf.get("no_rope_layers") or _rotary(hf.get("no_rope_layer_interval", 4), depth)
    every = [*told, 0].index(0) + 1 if 0 in told[:depth] else 0
    if list(told[:depth]) != _rotary(every, depth):
        raise ConfigError(
            f"config.json has no_rope_layers={told}; fmjax has every n-th layer without positions "
            "(config.model.nope_every)."
        )
    return every


def _rotary(nope_every: int, depth: int) -> list[int]:
    return [int(not nope_every or i % nope_every != 0) for i in range(1, depth + 1)]


def _routing(hf: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Which layers have no experts, and the losses with which transformers would train."""
    step, alone = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
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


def _rope(hf: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Bases and stretching of positions, in the keys of transformers 4 or 5."""
    told = hf.get("rope_parameters") or {}
    local = kind == "gemma3_text"
    far = (told.get("full_attention") or {}) if local else told
    base = _BASES.get(kind, 10_000.0)
    scaling = dict(hf.get("rope_scaling") or {}) | dict(far)
    found = {"theta": float(scaling.pop("rope_theta", None) or hf.get("rope_theta") or base)}
    if local:
        near = told.get("sliding_attention") or {}
        if near.get("rope_type", "default") != "default":
            raise ConfigError(
                f"config.json has rope_type={near['rope_type']!r} for layers with a window; fmjax "
                "has 'default' only."
            )
        own = near.get("rope_theta") or hf.get("rope_local_base_freq") or 10_000.0
        found["theta_window"] = float(own)
    kinds = [scaling.pop(key) for key in ("rope_type", "type") if scaling.get(key)]
    if not kinds or kinds[0] == "default":
        return found | {"rope": ()}
    if kinds[0] == "yarn":
        scaling.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
    else:
        extra = "original_max_position_embeddings"
        scaling = {k: v for k, v in scaling.items() if kinds[0] == "llama3" or k != extra}
    scaling = {key: value for key, value in scaling.items() if value is not None}
    return found | {"rope": (("type", kinds[0]), *sorted(scaling.items()))}


def _written_rope(cfg: Any, kind: str) -> dict[str, Any]:
    """In the keys of the published checkpoints, which every version of transformers reads."""
    told = dict(cfg.rope)
    scaling = None if not told else {"rope_type": told.pop("type"), **told}
    config = {"rope_theta": cfg.theta, "rope_scaling": scaling}
    return config | ({"rope_local_base_freq": cfg.theta_window} if kind == "gemma3_text" else {})
