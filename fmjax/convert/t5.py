"""Names of the parameters of T5 and its relatives in Hugging Face's files, and their config.json.

Their decoder numbers its layers from 0 again. The first layer of each trunk has the table of
distances, and in UMT5 every layer its own.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fmjax.convert import options
from fmjax.convert.files import Place
from fmjax.errors import ConfigError, did_you_mean, quoted

# Classes of transformers and the heads they have, the richest first.
ARCHITECTURES: dict[str, options.Architectures] = {
    kind: (
        (f"{prefix}ForConditionalGeneration", frozenset({"lm"})),
        (f"{prefix}ForConditionalGeneration", frozenset()),
    )
    for kind, prefix in {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}.items()
}
POOLED: dict[str, tuple[str, ...]] = dict.fromkeys(ARCHITECTURES, ())  # before a head: none
_T5: options.Table = {
    "vocab_size": ("vocab_size", 32128),
    "d_model": ("width", 512),
    "d_kv": ("head_size", 64),
    "d_ff": ("mlp", 2048),
    "num_heads": ("heads", 8),
    "relative_attention_num_buckets": ("buckets", 32),
    "relative_attention_max_distance": ("far", 128),
    "dropout_rate": ("dropout", 0.1),
    "layer_norm_epsilon": ("eps", 1e-6),
}
_MT5 = _T5 | {
    "vocab_size": ("vocab_size", 250112),
    "d_ff": ("mlp", 1024),
    "num_heads": ("heads", 6),
}
OPTIONS = {"t5": _T5, "mt5": _MT5, "umt5": _MT5}
# What they assume where config.json does not have the key.
_OTHERS = {"t5": ("relu", 6)} | dict.fromkeys(("mt5", "umt5"), ("gated-gelu", 8))
FIXED = options.FIXED
ALIASES = dict.fromkeys(
    OPTIONS,
    {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
)
# feed_forward_proj: (activation, gated)
MLPS = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gelu_new": ("gelu_tanh", False),
    "silu": ("silu", False),
    "gated-relu": ("relu", True),
    "gated-gelu": ("gelu_tanh", True),
    "gated-silu": ("silu", True),
}
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_DISTANCE = "layer.0.SelfAttention.relative_attention_bias"
TABLE = {
    "embed/token": "shared",
    "embed/encoder_distance": f"encoder.block.0.{_DISTANCE}",
    "embed/decoder_distance": f"decoder.block.0.{_DISTANCE}",
    "encoder_norm": "encoder.final_layer_norm",
    "norm": "decoder.final_layer_norm",
    "head/lm": "lm_head",
}
SHARED: frozenset[str] = frozenset()  # heads that have one name in files
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
# A table that old files have and no version of the model reads.
BUFFERS = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"


def tied(hf: Mapping[str, Any]) -> dict[str, str]:
    """{tensor: the one that it repeats}; some files hold all of them."""
    copies = [f"{part}.embed_tokens.weight" for part in ("encoder", "decoder")]
    copies += ["lm_head.weight"] * _tied(hf)
    return dict.fromkeys(copies, "shared.weight")


def place(hf: Mapping[str, Any], name: str) -> Place | None:
    """Where the parameter `name` is in files with a config.json; None if it is in none of them."""
    module, leaf = name.rsplit("/", 1)
    key = TABLE.get(module)
    if match := re.fullmatch(r"block_(\d+)/(.*)", module):
        key = _of_layer(int(match[1]), match[2], hf)
    if key is None or leaf not in LEAVES:
        return None
    return Place(f"{key}.{LEAVES[leaf]}", leaf == "kernel")


def _of_layer(layer: int, module: str, hf: Mapping[str, Any]) -> str | None:
    """The name of a layer's module: of its parts, one after the other, each with its norm."""
    encoder, gated = _encoder_depth(hf), _mlp(hf)[1]
    decoder = layer >= encoder
    first = f"decoder.block.{layer - encoder}" if decoder else f"encoder.block.{layer}"
    parts = {"attn": (0, "SelfAttention"), "mlp": (1 + decoder, "DenseReluDense")}
    parts |= {"cross": (1, "EncDecAttention")} if decoder else {}
    if module == "distance":
        return f"{first}.{_DISTANCE}"
    whole, _, inner = module.partition("/")
    if whole.removesuffix("_norm") not in parts:
        return None
    number, name = parts[whole.removesuffix("_norm")]
    if whole.endswith("_norm"):
        return f"{first}.layer.{number}.layer_norm"
    maps = {"up": "wi_0" if gated else "wi", "gate": "wi_1", "down": "wo"}
    inner = (maps if whole == "mlp" else _ATTENTION).get(inner)
    return inner and f"{first}.layer.{number}.{name}.{inner}"


def canonical(model_type: str, key: str) -> str:
    """A file's key as the table has it."""
    return key


def borrowed(hf: Mapping[str, Any]) -> dict[str, str]:
    """{tensor: the one that it is where the files lack it}: transformers ties any T5's output whose
    files have none."""
    return {} if _tied(hf) else {"lm_head.weight": "shared.weight"}


def _tied(hf: Mapping[str, Any]) -> bool:
    """True if the output is the embedding, for states times 1/√D. transformers 5 writes that it is
    tied whatever it is, and tells the two kinds of T5 apart by the scale alone. mT5 has none."""
    if hf["model_type"] == "mt5":
        return False
    return bool(hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings") is not False))


def _encoder_depth(hf: Mapping[str, Any]) -> int:
    return hf.get("num_layers", _OTHERS[hf["model_type"]][1])


def _mlp(hf: Mapping[str, Any]) -> tuple[str, bool]:
    """(activation, whether it is gated). Raises ConfigError for one that the model does not have,
    and for keys that follow from it and do not."""
    name = hf.get("feed_forward_proj", _OTHERS[hf["model_type"]][0])
    if name not in MLPS:
        raise ConfigError(
            f"config.json has feed_forward_proj={quoted(name)}, which fmjax does not have."
            + did_you_mean(str(name), MLPS)
        )
    activation, gated = MLPS[name]
    same = options.ACTIVATIONS.get(hf.get("dense_act_fn"), activation) == activation
    for key, fits in (
        ("dense_act_fn", same),
        ("is_gated_act", hf.get("is_gated_act") in (None, gated)),
    ):
        if not fits:
            raise ConfigError(
                f"config.json has {key}={quoted(hf[key])} beside feed_forward_proj={quoted(name)}."
            )
    return activation, gated


def model_options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `models.t5.Model` for a config.json.

    Raises ConfigError for an option that the model does not have.
    """
    kind = hf["model_type"]
    found = options.read(hf, OPTIONS[kind], FIXED)
    activation, gated = _mlp(hf)
    encoder, decoder = _encoder_depth(hf), hf.get("num_decoder_layers")
    return found | {
        "variant": "small",
        "depth": encoder + (encoder if decoder is None else decoder),
        "encoder_depth": encoder,
        "activation": activation,
        "gated": gated,
        "tied": _tied(hf),
        "layer_distances": kind == "umt5",
        "attention_dropout": found["dropout"],
        **_start(hf, found["vocab_size"]),
    }


def _start(hf: Mapping[str, Any], rows: int) -> dict[str, int]:
    """{"start_id": the token that transformers puts before a target's first}, {} where none is
    named. Raises ConfigError for one that the embedding of `rows` tokens lacks."""
    start = hf.get("decoder_start_token_id")
    if start is None:
        return {}
    if type(start) is int and 0 <= start < rows:
        return {"start_id": start}
    raise ConfigError(
        f"config.json has decoder_start_token_id={quoted(start)}: it has to be the number of one "
        f"of the {rows:,} tokens (vocab_size)."
    )


def type_of(cfg: Any) -> str:
    """`model_type` of a `models.t5.Config`: of mT5 that of T5 1.1, which it is."""
    return "umt5" if cfg.layer_distances else "t5"


def hf_config(
    cfg: Any, heads: Iterable[str], ids: Mapping[str, int], labels: Sequence[str] = ()
) -> dict[str, Any]:
    """config.json for a `models.t5.Config` and the ids of special tokens.

    Raises ConfigError for a combination of options that no class of transformers has.
    """
    kind = type_of(cfg)
    options.require(kind, "attention_dropout", cfg.attention_dropout, cfg.dropout)
    mlps = {how: name for name, how in MLPS.items()}
    if (cfg.activation, cfg.gated) not in mlps:
        raise ConfigError(
            f"config.model.activation={cfg.activation!r} with config.model.gated={cfg.gated} "
            f"cannot be exported: transformers' {kind} has {', '.join(MLPS)} only."
        )
    return {
        "architectures": [ARCHITECTURES[kind][0][0]],
        "model_type": kind,
        "dtype": "float32",
        "is_encoder_decoder": True,
        "num_layers": cfg.encoder_depth,
        "num_decoder_layers": cfg.depth - cfg.encoder_depth,
        "feed_forward_proj": mlps[cfg.activation, cfg.gated],
        "tie_word_embeddings": cfg.tied,
        "scale_decoder_outputs": cfg.tied,
        "pad_token_id": ids.get("pad", 0),
        "eos_token_id": ids.get("eos", 1),
        "decoder_start_token_id": ids.get("pad", 0) if cfg.start_id is None else cfg.start_id,
        **options.written(cfg, OPTIONS[kind]),
    }


def labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a config.json gives: none, as no head is read."""
    return ()
