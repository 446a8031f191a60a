"""config.json of Hugging Face's Llama and its relatives against our options.

The tables are read in both directions; names of parameters are in llama.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fmjax.convert import options
from fmjax.errors import ConfigError

PREFIXES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "olmo2": "Olmo2",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "olmo": "Olmo",
    "smollm3": "SmolLM3",
    "bloom": "Bloom",
}
# What of these transformers has no class for texts to be classified by.
_UNCLASSIFIED = ("olmo2",)
# Our options where a member of the family says nothing of them, and those that make it what it is.
_PLAIN = dict(
    norm_offset=0.0, embed_scale=False, norms="before", qk_norm="", norm="rms", embed_norm=False,
    dropout=0.0, window=0, full_every=0, theta_window=0.0, logit_softcap=0.0, query_scale=0.0,
    attention_softcap=0.0, mlp_bias=False, gated=True, clip_qkv=0.0, nope_every=0, alibi=False,
    experts=0, shared_mlp=0, capacity=0.0,
)  # fmt: skip
CONSTANT: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm="head"),
    "gemma": dict(norm_offset=1.0, embed_scale=True),
    "gemma2": dict(norm_offset=1.0, embed_scale=True, norms="around"),
    "gemma3_text": dict(norm_offset=1.0, embed_scale=True, norms="around", qk_norm="head"),
    "olmo2": dict(norms="behind", qk_norm="whole"),
    "mixtral": dict(experts_normed=True),
    "qwen2_moe": {},
    "qwen3_moe": dict(qk_norm="head"),
    "olmo": dict(norm="plain", eps=1e-5),
    "smollm3": {},
    "bloom": dict(alibi=True, norm="layer", embed_norm=True, gated=False, activation="gelu_tanh")
    | dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True),
}
_SIZES: options.Table = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("width", 4096),
    "intermediate_size": ("mlp", 11008),
    "num_hidden_layers": ("depth", 32),
    "num_attention_heads": ("heads", 32),
    "num_key_value_heads": ("kv_heads", None),
    "head_dim": ("head_size", None),
    "hidden_act": ("activation", "silu"),
    "max_position_embeddings": ("max_len", 2048),
    "rms_norm_eps": ("eps", 1e-6),
    "tie_word_embeddings": ("tied", False),
    "attention_dropout": ("attention_dropout", 0.0),
}
_QWEN = _SIZES | {
    "vocab_size": ("vocab_size", 151936),
    "intermediate_size": ("mlp", 22016),
    "num_key_value_heads": ("kv_heads", 32),
    "max_position_embeddings": ("max_len", 32768),
}
_EXPERTS = _QWEN | {
    "hidden_size": ("width", 2048),
    "num_hidden_layers": ("depth", 24),
    "norm_topk_prob": ("experts_normed", False),
}
_GEMMA = _SIZES | {
    "vocab_size": ("vocab_size", 256000),
    "max_position_embeddings": ("max_len", 8192),
    "tie_word_embeddings": ("tied", True),
    "head_dim": ("head_size", 256),
    "hidden_act": ("activation", "gelu_pytorch_tanh"),
}
_CAPPED = {key: value for key, value in _GEMMA.items() if key != "hidden_act"} | {
    "hidden_size": ("width", 2304),
    "intermediate_size": ("mlp", 9216),
    "num_hidden_layers": ("depth", 26),
    "num_attention_heads": ("heads", 8),
    "num_key_value_heads": ("kv_heads", 4),
    "hidden_activation": ("activation", "gelu_pytorch_tanh"),
    "sliding_window": ("window", 4096),
}
OPTIONS: dict[str, options.Table] = {
    "llama": _SIZES | {"mlp_bias": ("mlp_bias", False)},
    "mistral": _SIZES
    | {
        "intermediate_size": ("mlp", 14336),
        "num_key_value_heads": ("kv_heads", 8),
        "max_position_embeddings": ("max_len", 4096 * 32),
        "sliding_window": ("window", 4096),
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": ("head_size", 128)},
    "gemma": _GEMMA
    | {
        "hidden_size": ("width", 3072),
        "intermediate_size": ("mlp", 24576),
        "num_hidden_layers": ("depth", 28),
        "num_attention_heads": ("heads", 16),
        "num_key_value_heads": ("kv_heads", 16),
    },
    "gemma2": _CAPPED
    | {
        "final_logit_softcapping": ("logit_softcap", 30.0),
        "attn_logit_softcapping": ("attention_softcap", 50.0),
    },
    "gemma3_text": _CAPPED
    | {
        "vocab_size": ("vocab_size", 262_208),
        "max_position_embeddings": ("max_len", 131_072),
        "final_logit_softcapping": ("logit_softcap", None),
        "attn_logit_softcapping": ("attention_softcap", None),
    },
    "olmo2": _SIZES | {"vocab_size": ("vocab_size", 50304), "rms_norm_eps": ("eps", 1e-5)},
    "olmo": {key: value for key, value in _SIZES.items() if key != "rms_norm_eps"}
    | {"vocab_size": ("vocab_size", 50304), "clip_qkv": ("clip_qkv", None)},
    "smollm3": _SIZES
    | {
        "vocab_size": ("vocab_size", 128256),
        "hidden_size": ("width", 2048),
        "num_hidden_layers": ("depth", 36),
        "num_attention_heads": ("heads", 16),
        "num_key_value_heads": ("kv_heads", 4),
        "max_position_embeddings": ("max_len", 32768),
        "tie_word_embeddings": ("tied", True),
        "mlp_bias": ("mlp_bias", False),
    },
    "bloom": {
        "vocab_size": ("vocab_size", 250880),
        "hidden_size": ("width", 64),
        "n_layer": ("depth", 2),
        "n_head": ("heads", 8),
        "seq_length": ("max_len", 2048),
        "layer_norm_epsilon": ("eps", 1e-5),
        "attention_dropout": ("attention_dropout", 0.0),
        "tie_word_embeddings": ("tied", True),
    },
    "mixtral": _SIZES
    | {
        "intermediate_size": ("mlp", 14336),
        "num_key_value_heads": ("kv_heads", 8),
        "max_position_embeddings": ("max_len", 4096 * 32),
        "rms_norm_eps": ("eps", 1e-5),
        "sliding_window": ("window", None),
        "num_local_experts": ("experts", 8),
        "num_experts_per_tok": ("experts_per_token", 2),
    },
    "qwen2_moe": _EXPERTS
    | {
        "num_attention_heads": ("heads", 16),
        "num_key_value_heads": ("kv_heads", 16),
        "intermediate_size": ("mlp", 5632),
        "moe_intermediate_size": ("expert_mlp", 1408),
        "shared_expert_intermediate_size": ("shared_mlp", 5632),
        "num_experts": ("experts", 60),
        "num_experts_per_tok": ("experts_per_token", 4),
        "qkv_bias": ("qkv_bias", True),
    },
    "qwen3_moe": _EXPERTS
    | {
        "num_key_value_heads": ("kv_heads", 4),
        "intermediate_size": ("mlp", 6144),
        "moe_intermediate_size": ("expert_mlp", 768),
        "num_experts": ("experts", 128),
        "num_experts_per_tok": ("experts_per_token", 8),
    },
}
# Options of transformers that we have in one setting only; absent means that setting.
FIXED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(PREFIXES, {"quantization_config": None}),
    **dict.fromkeys(
        ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3"),
        {"quantization_config": None, "use_sliding_window": False},
    ),
    "mixtral": {"quantization_config": None, "router_jitter_noise": 0.0},
    "bloom": {
        "quantization_config": None,
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": 0.0,
    },
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text"),
        {"quantization_config": None, "use_bidirectional_attention": None},
    ),
}
# Fields whose absence config.json has as null, and we as 0.
NULLABLE = (*("kv_heads", "head_size", "window", "logit_softcap", "attention_softcap", "clip_qkv"),)
# {model_type: {another name of a key: the name that we write}}.
_ALIASES = {
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "bloom": {
        "n_embed": "hidden_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
}
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6}
_OWN_BIASES = (
    *("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "qwen3_moe", "olmo", "smollm3"),
)
_BASES = {"gemma3_text": 1e6, "mixtral": 1e6, "smollm3": 2e6}  # of positions, where nothing is said
_SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe")


def architectures(model_type: str) -> tuple[tuple[str, frozenset[str]], ...]:
    """Classes of transformers and the heads they have, the richest first."""
    prefix, classified = PREFIXES[model_type], ()
    if model_type not in _UNCLASSIFIED:
        name = f"{prefix}ForSequenceClassification"
        classified = tuple((name, frozenset({head})) for head in ("classify", "regress"))
    causal = f"{prefix}ForCausalLM"
    return (*classified, (causal, frozenset({"lm"})), (causal, frozenset()))


def model_options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `models.llama.Model` for a config.json.

    Raises ConfigError for an option that the model does not have.
    """
    kind = hf["model_type"]
    others = _ALIASES.get(kind, {}).items()
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
    classes = options.classes(hf, PREFIXES[kind])
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
    needed = _PLAIN | CONSTANT[kind]
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
    return options.labels(hf, options.classes(hf, PREFIXES[hf["model_type"]]))


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
