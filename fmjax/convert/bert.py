"""Where Hugging Face's BERT, RoBERTa, DistilBERT and ModernBERT keep our parameters and options.

The tables are read in both directions. Left is a module of `fmjax.models.bert`, right its name in a
file that `transformers` wrote; `{}` is the layer number. Torch keeps a Linear's weight as
(out, in), so kernels are transposed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fmjax.convert.files import Place
from fmjax.errors import ConfigError, did_you_mean


def _post_norm(prefix: str) -> dict[str, str]:
    """The trunk that BERT and RoBERTa share."""
    layer = f"{prefix}.encoder.layer.{{}}"
    return {
        "embed/token": f"{prefix}.embeddings.word_embeddings",
        "embed/position": f"{prefix}.embeddings.position_embeddings",
        "embed/type": f"{prefix}.embeddings.token_type_embeddings",
        "embed/norm": f"{prefix}.embeddings.LayerNorm",
        "block_{}/attn/query": f"{layer}.attention.self.query",
        "block_{}/attn/key": f"{layer}.attention.self.key",
        "block_{}/attn/value": f"{layer}.attention.self.value",
        "block_{}/attn/out": f"{layer}.attention.output.dense",
        "block_{}/attn_norm": f"{layer}.attention.output.LayerNorm",
        "block_{}/mlp/up": f"{layer}.intermediate.dense",
        "block_{}/mlp/down": f"{layer}.output.dense",
        "block_{}/mlp_norm": f"{layer}.output.LayerNorm",
        "head/pooler": f"{prefix}.pooler.dense",
    }


TABLES: dict[str, dict[str, str | tuple[str, int, int]]] = {
    "bert": {
        **_post_norm("bert"),
        "head/mlm/dense": "cls.predictions.transform.dense",
        "head/mlm/norm": "cls.predictions.transform.LayerNorm",
        "head/mlm": "cls.predictions",
        "head/nsp": "cls.seq_relationship",
    },
    "roberta": {
        **_post_norm("roberta"),
        "head/mlm/dense": "lm_head.dense",
        "head/mlm/norm": "lm_head.layer_norm",
        "head/mlm": "lm_head",
    },
    "distilbert": {
        "embed/token": "distilbert.embeddings.word_embeddings",
        "embed/position": "distilbert.embeddings.position_embeddings",
        "embed/norm": "distilbert.embeddings.LayerNorm",
        "block_{}/attn/query": "distilbert.transformer.layer.{}.attention.q_lin",
        "block_{}/attn/key": "distilbert.transformer.layer.{}.attention.k_lin",
        "block_{}/attn/value": "distilbert.transformer.layer.{}.attention.v_lin",
        "block_{}/attn/out": "distilbert.transformer.layer.{}.attention.out_lin",
        "block_{}/attn_norm": "distilbert.transformer.layer.{}.sa_layer_norm",
        "block_{}/mlp/up": "distilbert.transformer.layer.{}.ffn.lin1",
        "block_{}/mlp/down": "distilbert.transformer.layer.{}.ffn.lin2",
        "block_{}/mlp_norm": "distilbert.transformer.layer.{}.output_layer_norm",
        "head/mlm/dense": "vocab_transform",
        "head/mlm/norm": "vocab_layer_norm",
        "head/mlm": "vocab_projector",
    },
    "modernbert": {
        "embed/token": "model.embeddings.tok_embeddings",
        "embed/norm": "model.embeddings.norm",
        # One matrix holds several of ours, one below the other: (name, which, of how many).
        "block_{}/attn/query": ("model.layers.{}.attn.Wqkv", 0, 3),
        "block_{}/attn/key": ("model.layers.{}.attn.Wqkv", 1, 3),
        "block_{}/attn/value": ("model.layers.{}.attn.Wqkv", 2, 3),
        "block_{}/attn/out": "model.layers.{}.attn.Wo",
        "block_{}/attn_norm": "model.layers.{}.attn_norm",
        "block_{}/mlp/up": ("model.layers.{}.mlp.Wi", 0, 2),
        "block_{}/mlp/gate": ("model.layers.{}.mlp.Wi", 1, 2),
        "block_{}/mlp/down": "model.layers.{}.mlp.Wo",
        "block_{}/mlp_norm": "model.layers.{}.mlp_norm",
        "norm": "model.final_norm",
        "head/mlm/dense": "head.dense",
        "head/mlm/norm": "head.norm",
        "head/mlm": "decoder",
    },
}
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

# Classes of transformers and the heads they have, the richest first.
ARCHITECTURES: dict[str, tuple[tuple[str, frozenset[str]], ...]] = {
    "bert": (
        ("BertForPreTraining", frozenset({"mlm", "pooler", "nsp"})),
        ("BertForMaskedLM", frozenset({"mlm"})),
    ),
    "roberta": (("RobertaForMaskedLM", frozenset({"mlm"})),),
    "distilbert": (("DistilBertForMaskedLM", frozenset({"mlm"})),),
    "modernbert": (("ModernBertForMaskedLM", frozenset({"mlm"})),),
}
# Those with the head nsp.
NEXT_SENTENCE = {"BertForPreTraining", "BertForNextSentencePrediction"}

# Tensors that repeat another one (the tied output projection); older files hold both.
TIED: dict[str, str] = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
    "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight",
    "decoder.weight": "model.embeddings.tok_embeddings.weight",
}
BUFFERS = r".*\.(position_ids|token_type_ids|\w*inv_freq)"  # constants in old files, no parameters

# config.json key -> (field of models.bert.Config, what transformers assumes when the key is absent)
_POST_NORM_OPTIONS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 30522),
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("depth", 12),
    "num_attention_heads": ("heads", 12),
    "intermediate_size": ("mlp", 3072),
    "max_position_embeddings": ("max_len", 512),
    "type_vocab_size": ("types", 2),
    "hidden_act": ("activation", "gelu"),
    "hidden_dropout_prob": ("dropout", 0.1),
    "attention_probs_dropout_prob": ("attention_dropout", 0.1),
    "layer_norm_eps": ("eps", 1e-12),
}
OPTIONS: dict[str, dict[str, tuple[str, Any]]] = {
    "bert": _POST_NORM_OPTIONS,
    "roberta": _POST_NORM_OPTIONS | {"vocab_size": ("vocab_size", 50265)},
    "distilbert": {
        "vocab_size": ("vocab_size", 30522),
        "dim": ("width", 768),
        "n_layers": ("depth", 6),
        "n_heads": ("heads", 12),
        "hidden_dim": ("mlp", 3072),
        "max_position_embeddings": ("max_len", 512),
        "activation": ("activation", "gelu"),
        "dropout": ("dropout", 0.1),
        "attention_dropout": ("attention_dropout", 0.1),
    },
    "modernbert": {
        "vocab_size": ("vocab_size", 50368),
        "hidden_size": ("width", 768),
        "num_hidden_layers": ("depth", 22),
        "num_attention_heads": ("heads", 12),
        "intermediate_size": ("mlp", 1152),
        "max_position_embeddings": ("max_len", 8192),
        "hidden_activation": ("activation", "gelu"),
        "classifier_activation": ("head_activation", "gelu"),
        "embedding_dropout": ("dropout", 0.0),
        "mlp_dropout": ("dropout", 0.0),
        "attention_dropout": ("attention_dropout", 0.0),
        "norm_eps": ("eps", 1e-5),
    },
}
# Options of transformers that we have in one setting only; absent means that setting.
_COMMON = {"tie_word_embeddings": True, "quantization_config": None}
_ENCODER = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
FIXED: dict[str, dict[str, Any]] = {
    "bert": _COMMON | _ENCODER,
    "roberta": _COMMON | _ENCODER,
    "distilbert": _COMMON,
    "modernbert": {
        **_COMMON,
        **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), False),
        "decoder_bias": True,
        "rope_scaling": None,
    },
}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
TOKEN_IDS = {
    "bert": ("pad",),
    "roberta": ("pad", "bos", "eos"),
    "distilbert": ("pad",),
    "modernbert": ("pad", "bos", "eos", "cls", "sep"),
}


# --- Names ---


def place(model_type: str, name: str) -> Place | None:
    """Where the parameter `name` lies in a file of that model type; None: it has no counterpart."""
    module, leaf = name.rsplit("/", 1)
    layer = re.match(r"block_(\d+)/", module)
    entry = TABLES[model_type].get(re.sub(r"^block_\d+/", "block_{}/", module))
    if entry is None or leaf not in LEAVES:
        return None
    module, part, parts = (entry, 0, 1) if isinstance(entry, str) else entry
    if layer:
        module = module.format(int(layer[1]))
    return Place(f"{module}.{LEAVES[leaf]}", leaf == "kernel", part, parts)


def canonical(model_type: str, key: str) -> str:
    """A file's key as the tables have it: bare trunks get their prefix, norms today's names."""
    key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key)
    key = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
    prefix = "model" if model_type == "modernbert" else model_type
    bare = re.match(r"(embeddings|encoder|pooler|transformer|layers|final_norm)\.", key)
    return f"{prefix}.{key}" if bare else key


# --- Options ---


def model_options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `models.bert.Model` for a config.json.

    Raises ConfigError for an option that the model does not have.
    """
    model_type = hf["model_type"]
    for key, value in FIXED[model_type].items():
        if hf.get(key, value) != value:
            raise ConfigError(
                f"config.json has {key}={hf[key]!r}; fmjax's {model_type} has {value!r} only."
            )
    found: dict[str, Any] = {}
    for key, (field, default) in OPTIONS[model_type].items():
        value = hf.get(key, default)
        if field.endswith("activation"):
            value = _activation(key, value)
        if found.setdefault(field, value) != value:
            raise ConfigError(
                f"config.json has {key}={value!r} beside {found[field]!r} for what is one option "
                f"here, config.model.{field}."
            )
    constant: dict[str, Any] = dict(position_shift=0, pooler=model_type == "bert", modern=False)
    if model_type == "bert":
        constant["head_activation"] = found["activation"]
        if NEXT_SENTENCE.intersection(hf.get("architectures") or ()):
            constant["classes"] = {"nsp": 2}
    elif model_type == "roberta":
        pad = hf.get("pad_token_id", 1)
        if not isinstance(pad, int):
            raise ConfigError(
                f"config.json has pad_token_id={pad!r}; RoBERTa's positions start after it."
            )
        found["max_len"] -= pad + 1
        constant |= dict(position_shift=pad + 1, head_activation="gelu")
    elif model_type == "distilbert":
        constant |= dict(types=0, eps=1e-12, head_activation=found["activation"])
    else:
        constant |= dict(modern=True, types=0, **_local_attention(hf, found["depth"]))
    return found | constant


def type_of(cfg: Any) -> str:
    """Which of the four a `models.bert.Config` describes."""
    if cfg.modern:
        return "modernbert"
    if cfg.position_shift:
        return "roberta"
    return "bert" if cfg.types else "distilbert"


def hf_config(cfg: Any, heads: Iterable[str], ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json for a `models.bert.Config`, the heads to write and the ids of special tokens.

    Raises ConfigError for a combination of options that no class of transformers has.
    """
    family = type_of(cfg)
    config: dict[str, Any] = {
        "architectures": [
            next(name for name, has in ARCHITECTURES[family] if has == set(heads) - {""})
        ],
        "model_type": family,
        "dtype": "float32",
        "tie_word_embeddings": True,
        **{f"{kind}_token_id": ids.get(kind) for kind in TOKEN_IDS[family]},
    }
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    for key, (field, _) in OPTIONS[family].items():
        value = getattr(cfg, field)
        config[key] = names[value] if field.endswith("activation") else value
    if family == "modernbert":
        # The keys of the published checkpoints, which every version of transformers reads.
        config |= {
            "local_attention": 2 * cfg.window,
            "global_attn_every_n_layers": cfg.full_every,
            "global_rope_theta": cfg.theta_full,
            "local_rope_theta": cfg.theta_local,
        }
        return config
    if family == "roberta":
        config["max_position_embeddings"] += cfg.position_shift
        config["pad_token_id"] = ids.get("pad", cfg.position_shift - 1)
        _require(family, "position_shift", cfg.position_shift, config["pad_token_id"] + 1)
        if not cfg.types:
            raise ConfigError(
                "A RoBERTa with config.model.types=0 has no counterpart in transformers."
            )
    if family == "distilbert":
        _require(family, "eps", cfg.eps, 1e-12)
    _require(
        family,
        "head_activation",
        cfg.head_activation,
        "gelu" if family == "roberta" else cfg.activation,
    )
    return config


def _require(family: str, field: str, value: Any, needed: Any) -> None:
    if value != needed:
        raise ConfigError(
            f"config.model.{field}={value!r} cannot be exported: transformers' {family} needs "
            f"{needed!r} here."
        )


def _activation(key: str, value: str) -> str:
    if value not in ACTIVATIONS:
        raise ConfigError(
            f"config.json has {key}={value!r}, which fmjax does not have."
            + did_you_mean(value, ACTIVATIONS)
        )
    return ACTIVATIONS[value]


def _local_attention(hf: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """ModernBERT's windows and rotary bases, in the keys of transformers 4 or 5."""
    every = hf.get("global_attn_every_n_layers", 3)
    if kinds := hf.get("layer_types"):
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        every = full[1] if len(full) > 1 else depth
        expected = ["sliding_attention" if i % every else "full_attention" for i in range(depth)]
        if kinds != expected:
            raise ConfigError(
                f"config.json has layer_types={kinds}; fmjax's ModernBERT has a full layer first "
                "and then every n-th (config.model.full_every)."
            )
    rope = hf.get("rope_parameters") or {}
    bases = []
    for kind, old, default in (
        ("full_attention", "global_rope_theta", 160_000.0),
        ("sliding_attention", "local_rope_theta", 10_000.0),
    ):
        options = rope.get(kind) or {}
        if options.get("rope_type", "default") != "default":
            raise ConfigError(
                f"config.json has rope_type={options['rope_type']!r}; fmjax has 'default' only."
            )
        bases.append(float(options.get("rope_theta", hf.get(old, default))))
    return dict(
        window=hf.get("local_attention", 128) // 2,
        full_every=every,
        theta_full=bases[0],
        theta_local=bases[1],
    )
