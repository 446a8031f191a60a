"""From a config to its model, and how objectives call one."""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from fmjax import adapters
from fmjax.config import plugins
from fmjax.data.settings import ALONE
from fmjax.errors import ConfigError, did_you_mean
from fmjax.models import AnyModel, experts
from fmjax.objectives import requirements

DOCUMENTS = ("packed", "padded", "chat", "chat_padded")  # formats whose tokens have one type


def model(config: Any, facts: Mapping[str, Any]) -> AnyModel:
    """The model of a config for data with these `facts` (`fmjax.data.Dataset.facts`), with the
    heads that its objectives need.

    Keys that are None are the variant's own; `config.model.vocab_size=None` takes the tokenizer's
    size, a larger one leaves unused rows. Raises ConfigError where the model and the data,
    objectives or `config.adapter` do not fit together.
    """
    fields = {key: value for key, value in config.model.to_dict().items() if value is not None}
    objectives, factory = config.objectives.to_dict(), factory_of(fields.pop("name"))
    heads = fields.pop("classes", {}) | requirements.heads(objectives, facts["labels"])
    about = facts | {
        "vocab_size": _vocab_size(fields.pop("vocab_size", None), facts),
        "lm_head": requirements.vocabulary(objectives),
        "pool": requirements.pool(objectives),
    }
    about["facts"] = dict(about)
    takes = sys.modules[factory.__module__].FACTS
    if lacking := [name for name in takes if about.get(name) is None]:
        raise ConfigError(
            f"config.model.name={config.model.name!r} needs {lacking[0]} of the data, which those "
            f"of config.data.format={config.data.format!r} do not have."
        )
    # An empty pool is the model's own.
    known = {name: about[name] for name in takes if (name, about[name]) != ("pool", "")}
    built = factory(**fields | known, dtype=config.precision, classes=heads)
    requirements.check_model(objectives, built)
    if requirements.prefix(objectives):
        if config.data.format not in DOCUMENTS:
            raise ConfigError(
                f"config.data.format={config.data.format!r} has texts of two types, but objectives "
                "that read a decoder's documents in both directions mark what they show by types: "
                f"set it to {' or '.join(map(repr, DOCUMENTS))}."
            )
        built = built.clone(cfg=dataclasses.replace(built.cfg, prefix=True))
    built = adapters.wrap(built, config.to_dict())
    for part in getattr(built, "parts", {"": built}).values():
        check_rows(part, config.data.to_dict())
    return built


def factory_of(name: str) -> Callable[..., AnyModel]:
    """`Model` of the family `name` (fmjax/models), or of "package.module:name".

    Raises ConfigError where its module does not define `FACTS`, the names of the facts about data
    and objectives that the model is made from.
    """
    if plugins.is_object(name):
        factory = plugins.load(name, "model.name")
    else:
        factory = importlib.import_module(f"fmjax.models.{name}").Model
    if not hasattr(sys.modules[factory.__module__], "FACTS"):
        raise ConfigError(
            f"config.model.name={name!r}: {factory.__module__} does not define FACTS, the facts "
            "that its Model takes, such as FACTS = ('vocab_size', 'lm_head')."
        )
    return factory


def _vocab_size(wanted: int | None, facts: Mapping[str, Any]) -> int | None:
    """Rows of the embedding: `config.model.vocab_size`, or the tokenizer's; None without tokens.

    Raises ConfigError for fewer than the tokenizer has."""
    size = facts.get("vocab_size")
    if wanted and size and wanted < size:
        raise ConfigError(
            f"config.model.vocab_size={wanted} is smaller than the tokenizer's {size}: its "
            f"ids would have no row. Set it to None (the tokenizer's size) or {size} or more."
        )
    return wanted or size


def check_rows(model: AnyModel, data: Mapping[str, Any]) -> None:
    """Raise ConfigError for rows of `data` (`config.data`) that the model has no positions for, and
    for several documents in one where a prompt is before the first alone; rows that are no tokens
    pass."""
    if "seq_len" not in data or not hasattr(model.cfg, "max_len"):
        return
    taken, seq_len, target_len = adapters.positions(model), data["seq_len"], data.get("target_len")
    if (target_len or 0) > model.cfg.max_len:
        raise ConfigError(
            f"config.data.target_len={target_len} is longer than the {model.cfg.max_len} positions "
            "of the model: lower it, or train a model with a larger config.model.max_len."
        )
    if seq_len + taken > model.cfg.max_len:
        more = f", with {taken} of config.adapter.length before it," if taken else ""
        raise ConfigError(
            f"config.data.seq_len={seq_len}{more} is longer than the {model.cfg.max_len} positions "
            "of the model: lower it, or train a model with a larger config.model.max_len."
        )
    pack = data.get("pack")
    if (data["format"] in ALONE or pack) and adapters.has_prompt(model):
        key = "pack=True" if pack else f"format={data['format']!r}"
        raise ConfigError(
            "config.adapter.name='prompt' puts its vectors before a row, but config.data."
            f"{key} has several documents in one: set it to "
            f"{not pack if pack else ALONE[data['format']]!r}, or use 'prefix', which all of them "
            "see."
        )


def check_facts(model: AnyModel, facts: Mapping[str, Any]) -> None:
    """Raise ConfigError for data other than those that the model is made for, such as images of
    another size; of tokens see `check_rows` and `check_types`."""
    base = adapters.base(model)
    for name in sys.modules[type(base).__module__].FACTS:
        if name in facts and "vocab" not in facts and facts[name] != getattr(base.cfg, name):
            raise ConfigError(
                f"the data have {name}={facts[name]}, but the model is made for "
                f"{getattr(base.cfg, name)}: give it such data in config.data."
            )


def check_types(model: AnyModel, types: int) -> None:
    """Raises ConfigError where tokens have more types than the model has embeddings of."""
    known = getattr(model.cfg, "types", 0)
    if 0 < known < types:
        raise ConfigError(
            f"the tokenizer gives tokens of {types} types, 0 to {types - 1}, but the model has "
            f"type_vocab_size={known} (config.model.types): take the tokenizer that the model was "
            "trained with, or a model with more types."
        )


def apply(model: AnyModel) -> Callable:
    """`apply(params, *arrays, method=…)`, what objectives call.

    "encode" may be given a batch in place of arrays, of which the model reads its `inputs` by name,
    and `seeds` for dropout where there are any. Beside the model's methods there is
    "encode_routed": (what "encode" gives, what the routers of layers with experts say of it
    (`models.experts.Routing`) or None). Of several models `model` names the one that is run.
    """
    parts = getattr(model, "parts", {})

    def applied(params, *args, method, model=model):
        if isinstance(model, str):
            if model not in parts:
                raise ConfigError(
                    f"an objective runs the model {model!r}, which config.model.parts lacks."
                    + did_you_mean(model, parts)
                )
            model, params = parts[model], params[model]
        if args and isinstance(args[0], Mapping):
            (batch,) = args
            args = *(batch[name] for name in model.inputs), batch.get("seeds")
        if method == "encode_routed":
            how = dict(method="encode", mutable=[experts.COLLECTION])
            hidden, kept = model.apply({"params": params}, *args, **how)
            return hidden, experts.report(model.cfg, kept.get(experts.COLLECTION, {}))
        return model.apply({"params": params}, *args, method=method)

    return applied


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s that the vendor states for a device, None where unknown (CPUs)."""
    kinds = {
        "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
        "v4": 275e12, "v5 lite": 197e12, "v5e": 197e12, "v5p": 459e12, "v6 lite": 918e12,
    }  # fmt: skip
    return next((peak for kind, peak in kinds.items() if kind in device.device_kind), None)
