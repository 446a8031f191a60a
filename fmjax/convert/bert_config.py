"""config.json of Hugging Face's BERT and its relatives against our options.

The tables are read in both directions; names of parameters are in bert.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fmjax.convert import layer_types as layers
from fmjax.convert import options
from fmjax.errors import ConfigError, quoted
from fmjax.models import WHOLE_HEADS


def _tasks(prefix: str, each: tuple[str, ...] = ()) -> options.Architectures:
    """Classes of one family for tasks on a whole text, and on `each` token with these heads too."""
    return (
        (f"{prefix}ForSequenceClassification", frozenset({"pooler", "classify"})),
        (f"{prefix}ForSequenceClassification", frozenset({"pooler", "regress"})),
        (f"{prefix}ForMultipleChoice", frozenset({"pooler", "choose"})),
        (f"{prefix}ForTokenClassification", frozenset({*each, "tag"})),
        (f"{prefix}ForQuestionAnswering", frozenset({*each, "span"})),
    )


# Models that are a RoBERTa but for their tokenizer and their training, and their prefix there.
RELATIVES = {"xlm-roberta": "XLMRoberta", "camembert": "Camembert"}

# Classes of transformers and the heads they have, the richest first.
ARCHITECTURES: dict[str, options.Architectures] = {
    "bert": (
        ("BertForPreTraining", frozenset({"mlm", "pooler", "nsp"})),
        *_tasks("Bert"),
        ("BertForNextSentencePrediction", frozenset({"pooler", "nsp"})),
        ("BertForMaskedLM", frozenset({"mlm"})),
    ),
    **{
        kind: (*_tasks(prefix), (f"{prefix}ForMaskedLM", frozenset({"mlm"})))
        for kind, prefix in {"roberta": "Roberta", "distilbert": "DistilBert", **RELATIVES}.items()
    },
    "electra": (
        ("ElectraForTokenClassification", frozenset({"tag"})),
        ("ElectraForQuestionAnswering", frozenset({"span"})),
        ("ElectraForMaskedLM", frozenset({"mlm"})),
    ),
    "modernbert": (
        *_tasks("ModernBert", each=("pooler",)),
        ("ModernBertForMaskedLM", frozenset({"mlm"})),
    ),
}
# What stands for the whole text before a head.
POOLED = dict.fromkeys(ARCHITECTURES, ("first",)) | {"modernbert": ("mean", "first")}

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
    "tie_word_embeddings": ("tied", True),
}
OPTIONS: dict[str, dict[str, tuple[str, Any]]] = {
    "bert": _POST_NORM_OPTIONS,
    "roberta": _POST_NORM_OPTIONS | {"vocab_size": ("vocab_size", 50265)},
    "electra": {key: value for key, value in _POST_NORM_OPTIONS.items() if "tie" not in key}
    | {
        "embedding_size": ("embed_size", 128),
        "hidden_size": ("width", 256),
        "num_attention_heads": ("heads", 4),
        "intermediate_size": ("mlp", 1024),
    },
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
        "tie_word_embeddings": ("tied", True),
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
        "attention_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
        "norm_bias": ("norm_bias", False),
        "classifier_bias": ("head_bias", False),
        "decoder_bias": ("output_bias", True),
        "tie_word_embeddings": ("tied", True),
    },
}
OPTIONS |= dict.fromkeys(RELATIVES, _POST_NORM_OPTIONS)
# Options of transformers that we have in one setting only; absent means that setting.
_ENCODER = options.FIXED | {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
FIXED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "roberta", *RELATIVES), _ENCODER),
    "distilbert": options.FIXED,
    "electra": _ENCODER | {"tie_word_embeddings": True},
    "modernbert": options.FIXED | {"rope_scaling": None},
}
ALIASES = {
    "distilbert": {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
}
POOLS = {"cls": "first", "mean": "mean"}  # classifier_pooling of ModernBERT: `pool` here
TOKEN_IDS = {
    "bert": ("pad",),
    "electra": ("pad",),
    "roberta": ("pad", "bos", "eos"),
    "distilbert": ("pad",),
    "modernbert": ("pad", "bos", "eos", "cls", "sep"),
}


def model_options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `models.bert.Model` for a config.json.

    Raises ConfigError for an option that the model does not have.
    """
    model_type = hf["model_type"]
    found = options.read(hf, OPTIONS[model_type], FIXED[model_type])
    constant: dict[str, Any] = dict(position_shift=0, modern=False)
    if classes := classes_of(hf):
        constant["classes"] = classes
    if model_type == "bert":
        constant["head_activation"] = found["activation"]
    elif model_type in ("roberta", *RELATIVES):
        pad = hf.get("pad_token_id", 1)
        if not isinstance(pad, int):
            raise ConfigError(
                f"config.json has pad_token_id={pad!r}; RoBERTa's positions start after it."
            )
        found["max_len"] -= pad + 1
        constant |= dict(position_shift=pad + 1, head_activation="gelu")
    elif model_type == "electra":
        constant |= dict(head_activation="gelu", pooler=False)
        if found["embed_size"] == found["width"]:
            found["embed_size"] = 0
    elif model_type == "distilbert":
        constant |= dict(types=0, eps=1e-12, head_activation=found["activation"])
    else:
        constant |= dict(modern=True, types=0, **_local_attention(hf, found["depth"]))
        pool = options.one_of(hf, "classifier_pooling", POOLS, "cls")
        constant |= {"pool": pool} if classes.keys() & {*WHOLE_HEADS} else {}
    return found | constant


def pooling(cfg: Any) -> str:
    """`classifier_pooling` of a ModernBERT."""
    return "mean" if cfg.pool == "mean" else "cls"


def type_of(cfg: Any) -> str:
    """`model_type` of a `models.bert.Config`, the plainest that has its options."""
    if cfg.modern:
        return "modernbert"
    if cfg.embed_size:
        return "electra"
    if cfg.position_shift:
        return "roberta"
    return "bert" if cfg.types else "distilbert"


def hf_config(
    cfg: Any, heads: Iterable[str], ids: Mapping[str, int], labels: Sequence[str] = ()
) -> dict[str, Any]:
    """config.json for a `models.bert.Config`, the heads to write, the ids of special tokens and the
    names of the classes, if any.

    Raises ConfigError for a combination of options that no class of transformers has.
    """
    family = type_of(cfg)
    config: dict[str, Any] = {
        "architectures": [
            next(name for name, has in ARCHITECTURES[family] if has == set(heads) - {""})
        ],
        "model_type": family,
        "dtype": "float32",
        **{f"{kind}_token_id": ids.get(kind) for kind in TOKEN_IDS[family]},
    }
    config |= options.named_outputs(dict(cfg.classes), heads, labels)
    config |= options.written(cfg, OPTIONS[family])
    if family == "modernbert":
        # The keys of the published checkpoints, which every version of transformers reads.
        config |= {
            "local_attention": 2 * cfg.window,
            "global_attn_every_n_layers": cfg.full_every,
            "layer_types": layers.kinds(cfg.full_layers),
            "global_rope_theta": cfg.theta_full,
            "local_rope_theta": cfg.theta_local,
            "classifier_pooling": pooling(cfg),
        }
        return config
    if family == "roberta":
        config["max_position_embeddings"] += cfg.position_shift
        config["pad_token_id"] = ids.get("pad", cfg.position_shift - 1)
        options.require(family, "position_shift", cfg.position_shift, config["pad_token_id"] + 1)
        if not cfg.types:
            raise ConfigError(
                "A RoBERTa with config.model.types=0 has no counterpart in transformers."
            )
    if family == "electra":
        options.require(family, "position_shift", cfg.position_shift, 0)
    if family == "distilbert":
        options.require(family, "eps", cfg.eps, 1e-12)
    options.require(
        family,
        "head_activation",
        cfg.head_activation,
        "gelu" if family in ("roberta", "electra") else cfg.activation,
    )
    return config


def labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a config.json gives; () where it has none for a head."""
    return options.labels(hf, classes_of(hf))


def classes_of(hf: Mapping[str, Any]) -> dict[str, int]:
    """{head: outputs} of the class of transformers that wrote a config.json."""
    return options.classes(hf, ARCHITECTURES[hf["model_type"]])


def _local_attention(hf: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """ModernBERT's windows and rotary bases, in the keys of transformers 4 or 5."""
    every = hf.get("global_attn_every_n_layers") or 3
    sliding = layers.listed(hf, depth)
    if sliding is None:
        sliding = [i % every != 0 for i in range(depth)]
    window_layers = tuple(i for i, slides in enumerate(sliding) if slides)
    for period in (every, *([sliding.index(False, 1)] if False in sliding[1:] else [depth])):
        if sliding == [i % period != 0 for i in range(depth)]:
            every, window_layers = period, ()
            break
    rope = hf.get("rope_parameters") or {}
    bases = []
    for kind, old, default in (
        ("full_attention", "global_rope_theta", 160_000.0),
        ("sliding_attention", "local_rope_theta", 10_000.0),
    ):
        given = rope.get(kind) or {}
        if given.get("rope_type", "default") != "default":
            raise ConfigError(
                f"config.json has rope_type={quoted(given['rope_type'])}; fmjax has 'default' only."
            )
        bases.append(float(given.get("rope_theta") or hf.get(old) or default))
    return dict(
        window=hf.get("local_attention", 128) // 2,
        full_every=every,
        window_layers=window_layers,
        theta_full=bases[0],
        theta_local=bases[1],
    )
