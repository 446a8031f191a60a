"""The first table of a run's page: model, data, parameters and length, from summary.json and
config.json."""

from collections.abc import Mapping
from typing import Any

from fmjax.config.rules import UNITS

# Fields of a model's config that say its size, with the words for them.
SIZES = {
    "width": "width",
    "depth": "depth",
    "heads": "heads",
    "kv_heads": "key and value heads",
    "mlp": "MLP",
    "experts": "experts",
    "patch": "patch",
    "vocab_size": "vocabulary",
    "max_len": "longest text",
}
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def rows(config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of all that is known."""
    environment = summary.get("environment", {})
    found = {
        "model": _model(summary.get("model", {})),
        "parameters": _parameters(summary),
        "starts from": str(config.get("init") or ""),
        "data": _data(config, summary.get("data", {})),
        "trained on": _length(config, summary),
        "device": environment.get("device", ""),
        "finished": summary.get("finished", ""),
        "code": " ".join(filter(None, (environment.get("fmjax"), environment.get("commit")))),
    }
    return [(name, text) for name, text in found.items() if text]


def flop(number: float) -> str:
    """A number of operations as people read it: 7.04 TFLOP."""
    unit, letter = next(((unit, s) for unit, s in PREFIXES if number >= unit), (1, ""))
    return f"{number / unit:.3g} {letter}FLOP"


def _model(model: Mapping[str, Any]) -> str:
    sizes = [f"{words} {model[key]:,}" for key, words in SIZES.items() if model.get(key)]
    return ": ".join(filter(None, (model.get("name", ""), ", ".join(sizes))))


def _parameters(summary: Mapping[str, Any]) -> str:
    whole, moving = summary.get("parameters"), summary.get("trainable_parameters")
    if whole is None:
        return ""
    if moving in (None, whole):
        return f"{whole:,}" + ", which all train" * (moving == whole)
    return f"{whole:,}, of which {moving:,} train"


def _data(config: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    data = config.get("data", {})
    named = data.get("path") or data.get("train") or data.get("name") or ""
    named = ", ".join(named) if isinstance(named, list | tuple) else str(named)
    parts = [named]
    for split in ("train", "validation"):
        own = counts.get(split, {}) if isinstance(counts.get(split), Mapping) else {}
        sizes: dict[
            int, str
        ] = {}  # what is as many as another, as rows of an image each, goes unsaid
        for key in ("documents", *UNITS):
            if own.get(key):
                sizes.setdefault(own[key], f"{own[key]:,} {key}")
        parts += [f"{split} {', '.join(sizes.values())}"] if sizes else []
    return "; ".join(filter(None, parts))


def _length(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    metrics, counts = summary.get("metrics", {}), summary.get("data", {})
    unit = next((unit for unit in UNITS if unit in metrics), None)
    if unit is None:
        return ""
    text = f"{metrics[unit]:,} {unit} in {summary['step']:,} steps"
    rows = counts.get("train", {}).get("rows") if isinstance(counts.get("train"), Mapping) else None
    rows = min(filter(None, (rows, config.get("data", {}).get("examples"))), default=None)
    if rows and config.get("batch_size"):
        text += f", {summary['step'] * config['batch_size'] / rows:.3g} epochs"
    return text
