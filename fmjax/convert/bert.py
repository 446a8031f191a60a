"""Names of BERT-like parameters in Hugging Face's files (configs: bert_config.py).

The table is read in both directions. Left is a module of `fmjax.models.bert`, right its name in a
file that `transformers` wrote; `{}` is the layer number. Torch keeps a Linear's weight as
(out, in), so kernels are transposed.
"""

import re
from collections.abc import Mapping
from typing import Any

from fmjax.convert.bert_config import (
    ALIASES,
    ARCHITECTURES,
    POOLED,
    RELATIVES,
    hf_config,
    labels,
    model_options,
    type_of,
)
from fmjax.convert.files import Place

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


def _post_norm(prefix: str) -> dict[str, str | tuple[str, int, int]]:
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
        "head/mlm/lm": "cls.predictions.decoder",
        "head/nsp": "cls.seq_relationship",
        "head/classify": "classifier",
        "head/regress": "classifier",
        "head/tag": "classifier",
        "head/choose": "classifier",
        "head/span": "qa_outputs",
    },
    "roberta": {
        **_post_norm("roberta"),
        "head/mlm/dense": "lm_head.dense",
        "head/mlm/norm": "lm_head.layer_norm",
        "head/mlm": "lm_head",
        "head/pooler": "classifier.dense",
        "head/classify": "classifier.out_proj",
        "head/regress": "classifier.out_proj",
        "head/tag": "classifier",
        "head/choose": "classifier",
        "head/span": "qa_outputs",
        "head/mlm/lm": "lm_head.decoder",
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
        "head/pooler": "pre_classifier",
        **dict.fromkeys(("head/classify", "head/regress", "head/tag", "head/choose"), "classifier"),
        "head/span": "qa_outputs",
    },
    "electra": {
        **_post_norm("electra"),
        "embed/project": "electra.embeddings_project",
        "head/mlm/dense": "generator_predictions.dense",
        "head/mlm/norm": "generator_predictions.LayerNorm",
        "head/mlm": "generator_lm_head",
        "head/tag": "classifier",
        "head/span": "qa_outputs",
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
        # The two have one name: a task continues with what a masked language model has learnt.
        "head/pooler/dense": "head.dense",
        "head/pooler/norm": "head.norm",
        **dict.fromkeys(("head/classify", "head/regress", "head/tag", "head/choose"), "classifier"),
        "head/span": "classifier",
    },
}
# What a class calls otherwise than the others of its family.
OF_CLASS = dict.fromkeys(
    (f"{prefix}ForMultipleChoice" for prefix in ("Roberta", *RELATIVES.values())),
    {"head/pooler": "roberta.pooler.dense"},
)
# Heads that have one name in files: which of them it is, only the class of the file tells.
SHARED = frozenset({"classify", "regress", "tag", "choose", "span"})
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

TABLES |= dict.fromkeys(RELATIVES, TABLES["roberta"])
TIED: dict[str, str] = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
    "generator_lm_head.weight": "electra.embeddings.word_embeddings.weight",
    "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight",
    "decoder.weight": "model.embeddings.tok_embeddings.weight",
}
BUFFERS = r".*\.(position_ids|token_type_ids|\w*inv_freq)"  # constants in old files, no parameters


def tied(hf: Mapping[str, Any]) -> dict[str, str]:
    """{tensor: the one that it repeats}; older files hold both."""
    return TIED if hf.get("tie_word_embeddings", True) else {}


def place(hf: Mapping[str, Any], name: str) -> Place | None:
    """Where the parameter `name` is in files with a config.json; None if it is in none of them."""
    module, leaf = name.rsplit("/", 1)
    layer = re.match(r"block_(\d+)/", module)
    table = TABLES[hf["model_type"]]
    for kind in hf.get("architectures") or ():
        table = table | OF_CLASS.get(kind, {})
    if module in ("head/mlm", "head/mlm/lm") and not hf.get("tie_word_embeddings", True):
        # Some have a module for it, whose bias counts, and another bias that is of use where tied.
        module = "head/mlm/lm" if "head/mlm/lm" in table else "head/mlm"
    entry = table.get(re.sub(r"^block_\d+/", "block_{}/", module))
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
    prefixes = {"modernbert": "model"} | dict.fromkeys(RELATIVES, "roberta")
    prefix = prefixes.get(model_type, model_type)
    bare = re.match(
        r"(embeddings|embeddings_project|encoder|pooler|transformer|layers|final_norm)\.", key
    )
    return f"{prefix}.{key}" if bare else key
