"""Tables of Llama and its relatives: keys of config.json, our options for them, and defaults."""

from typing import Any

from fmjax.convert import options

PREFIXES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "ministral": "Ministral",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "olmo": "Olmo",
    "smollm3": "SmolLM3",
    "bloom": "Bloom",
}
# The classes of transformers for texts to be classified by have all; gemma3_text its own name.
CLASSIFIED = PREFIXES | {"gemma3_text": "Gemma3Text"}
# Those that have a class for each token to be classified by, and one to answer questions.
TAGGED = frozenset(PREFIXES) - {"gemma3_text", "olmo", "olmo2", "olmo3"}
ANSWERED = TAGGED - {"gemma", "gemma2"}
# Of the latter those whose class calls its trunk "transformer", and not "model".
ANSWERED_AS_TRANSFORMER = frozenset(
    {"llama", "ministral", "qwen2", "qwen3", "qwen3_moe", "smollm3"}
)
# Our options where a member of the family says nothing of them, and those that make it what it is.
PLAIN = dict(
    norm_offset=0.0, embed_scale=False, norms="before", qk_norm="", norm="rms", embed_norm=False,
    dropout=0.0, window=0, full_every=0, theta_window=0.0, logit_softcap=0.0, query_scale=0.0,
    attention_softcap=0.0, mlp_bias=False, gated=True, clip_qkv=0.0, nope_every=0, nope_layers=(),
    window_layers=(), alibi=False, experts=0, shared_mlp=0, capacity=0.0,
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
    "olmo3": dict(norms="behind", qk_norm="whole"),
    "ministral": {},
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
}
_MISTRAL = _SIZES | {
    "intermediate_size": ("mlp", 14336),
    "num_key_value_heads": ("kv_heads", 8),
    "max_position_embeddings": ("max_len", 4096 * 32),
}
_OLMO2 = _SIZES | {"vocab_size": ("vocab_size", 50304), "rms_norm_eps": ("eps", 1e-5)}
OPTIONS: dict[str, options.Table] = {
    "llama": _SIZES | {"mlp_bias": ("mlp_bias", False)},
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
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
    },
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
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
    "mixtral": _MISTRAL
    | {
        "rms_norm_eps": ("eps", 1e-5),
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
_FIXED = options.FIXED
FIXED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(PREFIXES, _FIXED),
    "mixtral": _FIXED | {"router_jitter_noise": 0.0},
    "bloom": _FIXED
    | {"apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0}
    | {"slow_but_exact": False},  # which leaves biases out where pretraining_tp is above 1
    **dict.fromkeys(("gemma", "gemma2"), _FIXED | {"use_bidirectional_attention": None}),
    "gemma3_text": _FIXED
    | dict.fromkeys(("use_bidirectional_attention", "attn_logit_softcapping")),
}
# Fields whose absence config.json has as null, and we as 0.
NULLABLE = ("kv_heads", "head_size", "logit_softcap", "attention_softcap", "clip_qkv")
# {model_type: {another name of a key: the name that we write}}.
ALIASES = {
    "mixtral": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "bloom": {
        "n_embed": "hidden_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
}
