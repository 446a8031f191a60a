"""Requirements of objectives on a model and its data, as their modules declare them
(fmjax/objectives)."""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fmjax.errors import ConfigError
from fmjax.models import WHOLE_HEADS, AnyModel


def heads(objectives: Iterable[str], labels: Sequence[str]) -> dict[str, int]:
    """{name: outputs} of the linear heads that the objectives need; `labels` names the classes."""
    found = {}
    for name in objectives:
        module = importlib.import_module(f"fmjax.objectives.{name}")
        found |= module.heads(labels) if hasattr(module, "heads") else {}
    return found


def vocabulary(objectives: Iterable[str]) -> bool:
    """True if one of the objectives predicts tokens."""
    modules = (importlib.import_module(f"fmjax.objectives.{name}") for name in objectives)
    return any(getattr(module, "VOCABULARY", False) for module in modules)


def pool(objectives: Mapping[str, Mapping[str, Any]]) -> str:
    """The pooling before linear heads; "" if not given, or not the same for all."""
    pools = {args.get("pool", "") for name, args in objectives.items() if name in WHOLE_HEADS}
    return pools.pop() if len(pools) == 1 else ""


def prefix(objectives: Mapping[str, Mapping[str, Any]]) -> bool:
    """True if one of the objectives shows a decoder's tokens to earlier ones."""
    return any(
        args.get("prefix")
        or getattr(importlib.import_module(f"fmjax.objectives.{name}"), "PREFIX", 0)
        for name, args in objectives.items()
    )


def room(objectives: Iterable[str]) -> int:
    """Largest number of tokens that the objectives add to a document."""
    modules = (importlib.import_module(f"fmjax.objectives.{name}") for name in objectives)
    return sum(getattr(module, "ROOM", 0) for module in modules)


def check_model(objectives: Mapping[str, Mapping[str, Any]], model: AnyModel) -> None:
    """Raise ConfigError for a model that cannot learn the objectives: whether its tokens see only
    earlier ones, and whether a decoder follows its encoder."""
    for name, args in objectives.items():
        module = importlib.import_module(f"fmjax.objectives.{name}")
        decodes = getattr(module, "DECODES", False)
        if decodes != model.decodes and (decodes or getattr(module, "VOCABULARY", False)):
            raise ConfigError(
                f"config.objectives.{name} needs a model "
                f"{'with' if decodes else 'without'} a decoder behind its encoder, which that of "
                f"config.model.name is not: use "
                f"{'t5, or clm or mlm' if decodes else 'bert, gpt2 or llama, or seq2seq'} in its "
                "place."
            )
        wanted = getattr(module, "CAUSAL", None)
        if args.get("prefix"):
            if not model.causal:
                raise ConfigError(
                    f"config.objectives.{name}.prefix=True lets a decoder read in both directions, "
                    "but the model of config.model.name does so always: leave it out."
                )
            continue
        if wanted is not None and wanted != model.causal:
            raise ConfigError(
                f"config.objectives.{name} needs a model whose tokens see "
                f"{'only what is before them' if wanted else 'all of a text'}, which that of "
                f"config.model.name does not: use "
                f"{'gpt2 or llama, or mlm' if wanted else 'bert, or clm'} in its place."
            )
        if model.causal and args.get("pool") == "first":
            raise ConfigError(
                f"config.objectives.{name}.pool='first' is a token that sees itself alone in a "
                "causal model: set it to 'last' or 'mean'."
            )


def check_target(objective: str, needs: str | tuple[str, ...], target: str) -> None:
    """Raise ConfigError for labels that mean something else than the objective declares."""
    if target in needs if isinstance(needs, tuple) else needs in ("", target):
        return
    made = f"made for {target!r}" if target else "without labels"
    pairs = needs in ("nsp", "sop")
    form = f"pairs and config.data.pair={needs}" if pairs else needs
    form = " or ".join(needs) if isinstance(needs, tuple) else form
    raise ConfigError(
        f"config.objectives.{objective} cannot use these data, which are {made}: set "
        f"config.data.format={form}."
    )
