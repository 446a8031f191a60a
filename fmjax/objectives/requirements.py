"""Requirements of objectives on a model and its data, as their modules declare them
(fmjax/objectives)."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from fmjax.config import plugins
from fmjax.errors import ConfigError
from fmjax.models import WHOLE_HEADS, AnyModel

Objectives = Mapping[str, Mapping[str, Any]]  # config.objectives: {name: arguments}


def module_of(name: str, args: Mapping[str, Any]) -> Any:
    """The module of the objective `name`: its argument `module`, or that of fmjax.objectives."""
    given = args.get("module", f"fmjax.objectives.{name}")
    return plugins.load(given, f"objectives.{name}.module")


def heads(objectives: Objectives, labels: Sequence[str]) -> dict[str, int]:
    """{name: outputs} of the linear heads that the objectives need; `labels` names the classes."""
    needed = {}
    for name, args in objectives.items():
        module = module_of(name, args)
        needed |= module.heads(labels) if hasattr(module, "heads") else {}
    return needed


def vocabulary(objectives: Objectives) -> bool:
    """True if one of the objectives predicts tokens."""
    modules = (module_of(*item) for item in objectives.items())
    return any(getattr(module, "VOCABULARY", False) for module in modules)


def pool(objectives: Objectives) -> str:
    """The pooling before linear heads; "" if not given, or not the same for all."""
    pools = {args.get("pool", "") for name, args in objectives.items() if name in WHOLE_HEADS}
    return pools.pop() if len(pools) == 1 else ""


def prefix(objectives: Objectives) -> bool:
    """True if one of the objectives shows a decoder's tokens to earlier ones."""
    return any(
        args.get("prefix") or getattr(module_of(name, args), "PREFIX", False)
        for name, args in objectives.items()
    )


def check_facts(objectives: Objectives, facts: Mapping[str, Any]) -> None:
    """Call the `check` of each objective that has one with the facts that it asks for, and check
    the room for what all of them add. Raises ConfigError where one cannot be learnt so."""
    modules = [module_of(*item) for item in objectives.items()]
    for check in filter(None, (getattr(module, "check", None) for module in modules)):
        asked = inspect.signature(check).parameters
        check(**{name: facts[name] for name in asked if name in facts})
    room = facts.get("room", 0)
    if room < (needed := sum(getattr(module, "ROOM", 0) for module in modules)):
        raise ConfigError(
            f"config.objectives adds {needed} tokens to a document, but config.data.room={room} "
            f"leaves no room for them behind each: set it to {needed}."
        )


def check_model(objectives: Objectives, model: AnyModel) -> None:
    """Raise ConfigError for a model that cannot learn the objectives: whether its tokens see only
    earlier ones, and whether a decoder follows its encoder."""
    for name, args in objectives.items():
        module = module_of(name, args)
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
