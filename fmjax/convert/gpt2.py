"""Names of GPT-2's parameters in Hugging Face's files, and its config.json.

Its linear maps are Conv1D, which keep a weight as (in, out), and one holds queries, keys and values
beside each other.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fmjax.convert import options
from fmjax.convert.files import Place

# Classes of transformers and the heads they have, the richest first.
ARCHITECTURES: dict[str, options.Architectures] = {
    "gpt2": (
        ("GPT2ForSequenceClassification", frozenset({"classify"})),
        ("GPT2ForSequenceClassification", frozenset({"regress"})),
        ("GPT2ForTokenClassification", frozenset({"tag"})),
        ("GPT2ForQuestionAnswering", frozenset({"span"})),
        ("GPT2LMHeadModel", frozenset({"lm"})),
        ("GPT2LMHeadModel", frozenset()),
    )
}
POOLED = {"gpt2": ("last",)}  # what stands for the whole before a head
OPTIONS: options.Table = {
    "vocab_size": ("vocab_size", 50257),
    "n_embd": ("width", 768),
    "n_layer": ("depth", 12),
    "n_head": ("heads", 12),
    "n_inner": ("mlp", None),
    "n_positions": ("max_len", 1024),
    "activation_function": ("activation", "gelu_new"),
    "resid_pdrop": ("dropout", 0.1),
    "embd_pdrop": ("dropout", 0.1),
    "attn_pdrop": ("attention_dropout", 0.1),
    "layer_norm_epsilon": ("eps", 1e-5),
    "scale_attn_weights": ("scaled", True),
    "scale_attn_by_inverse_layer_idx": ("scaled_by_layer", False),
    "tie_word_embeddings": ("tied", True),
}
FIXED = options.FIXED | {"add_cross_attention": False}
ALIASES = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
}
_LAYER = "transformer.h.{}"
# Modules of ours: (name in files, is it a Conv1D, which part of it, of how many).
TABLE: dict[str, tuple[str, bool, int, int]] = {
    "embed/token": ("transformer.wte", False, 0, 1),
    "embed/position": ("transformer.wpe", False, 0, 1),
    "block_{}/attn_norm": (f"{_LAYER}.ln_1", False, 0, 1),
    "block_{}/attn/query": (f"{_LAYER}.attn.c_attn", True, 0, 3),
    "block_{}/attn/key": (f"{_LAYER}.attn.c_attn", True, 1, 3),
    "block_{}/attn/value": (f"{_LAYER}.attn.c_attn", True, 2, 3),
    "block_{}/attn/out": (f"{_LAYER}.attn.c_proj", True, 0, 1),
    "block_{}/mlp_norm": (f"{_LAYER}.ln_2", False, 0, 1),
    "block_{}/mlp/up": (f"{_LAYER}.mlp.c_fc", True, 0, 1),
    "block_{}/mlp/down": (f"{_LAYER}.mlp.c_proj", True, 0, 1),
    "norm": ("transformer.ln_f", False, 0, 1),
    "head/lm": ("lm_head", False, 0, 1),
    "head/classify": ("score", False, 0, 1),
    "head/regress": ("score", False, 0, 1),
    "head/tag": ("classifier", False, 0, 1),
    "head/span": ("qa_outputs", False, 0, 1),
}
SHARED = frozenset({"classify", "regress", "tag", "span"})  # heads of which a class has one
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
BUFFERS = r".*\.attn\.(masked_)?bias"  # the triangle in old files, no parameter


def tied(hf: Mapping[str, Any]) -> dict[str, str]:
    """{tensor: the one that it repeats}; older files hold both."""
    is_tied = hf.get("tie_word_embeddings", True)
    return {"lm_head.weight": "transformer.wte.weight"} if is_tied else {}


def place(hf: Mapping[str, Any], name: str) -> Place | None:
    """Where the parameter `name` is in files with a config.json; None if it is in none of them."""
    module, leaf = name.rsplit("/", 1)
    layer = re.match(r"block_(\d+)/", module)
    entry = TABLE.get(re.sub(r"^block_\d+/", "block_{}/", module))
    if entry is None or leaf not in LEAVES:
        return None
    module, conv, part, parts = entry
    if layer:
        module = module.format(int(layer[1]))
    kernel = leaf == "kernel"
    axis = 1 if conv and kernel else 0
    return Place(f"{module}.{LEAVES[leaf]}", kernel and not conv, part, parts, axis)


def canonical(model_type: str, key: str) -> str:
    """A file's key as the table has it: bare trunks get their prefix."""
    return f"transformer.{key}" if re.match(r"(wte|wpe|h|ln_f)\.", key) else key


def model_options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `models.gpt2.Model` for a config.json.

    Raises ConfigError for an option that the model does not have.
    """
    found = options.read(hf, OPTIONS, FIXED)
    if found["mlp"] is None:
        found["mlp"] = 4 * found["width"]
    classes = options.classes(hf, ARCHITECTURES["gpt2"])
    return found | {"variant": "gpt2", "biases": True} | ({"classes": classes} if classes else {})


def type_of(cfg: Any) -> str:
    """`model_type` of a `models.gpt2.Config`."""
    return "gpt2"


def hf_config(
    cfg: Any, heads: Iterable[str], ids: Mapping[str, int], labels: Sequence[str] = ()
) -> dict[str, Any]:
    """config.json for a `models.gpt2.Config`, the heads to write, the ids of special tokens and the
    names of the classes, if any.

    Raises ConfigError for a combination of options that no class of transformers has.
    """
    options.require("gpt2", "biases", cfg.biases, True)
    has = set(heads) - {""}
    config = options.written(cfg, OPTIONS)
    if cfg.mlp == 4 * cfg.width:
        config["n_inner"] = None
    if cfg.activation == "gelu_tanh":  # which has two names there
        config["activation_function"] = "gelu_new"
    return {
        "architectures": [next(name for name, own in ARCHITECTURES["gpt2"] if own == has)],
        "model_type": "gpt2",
        "dtype": "float32",
        **{f"{kind}_token_id": ids.get(kind) for kind in ("bos", "eos", "pad")},
        **options.named_outputs(dict(cfg.classes), heads, labels),
        **config,
    }


def labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a config.json gives; () where it has none for a head."""
    return options.labels(hf, options.classes(hf, ARCHITECTURES["gpt2"]))
