"""From a config to its model, and how objectives call one."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fmjax import adapters
from fmjax.data.settings import ALONE
from fmjax.errors import ConfigError
from fmjax.models import AnyModel, experts
from fmjax.objectives import requirements

DOCUMENTS = ("packed", "padded", "chat", "chat_padded")  # formats whose tokens have one type


def model(config: Any, vocab_size: int, labels: Sequence[str] = ()) -> AnyModel:
    """The model of a config, sized for a vocabulary, with the heads that its objectives need for
    classes called `labels`.

    Keys that are None are the variant's own; `config.model.vocab_size=None` takes the tokenizer's
    size, a larger one leaves unused rows. Raises ConfigError where vocabulary, sequence length or
    `config.adapter` do not fit the model.
    """
    fields = {key: value for key, value in config.model.to_dict().items() if value is not None}
    name, wanted = fields.pop("name"), fields.pop("vocab_size", None)
    heads = fields.pop("classes", {}) | requirements.heads(config.objectives, labels)
    if name == "bert" and (pool := requirements.pool(config.objectives.to_dict())):
        fields["pool"] = pool
    if wanted and wanted < vocab_size:
        raise ConfigError(
            f"config.model.vocab_size={wanted} is smaller than the tokenizer's {vocab_size}: its "
            f"ids would have no row. Set it to None (the tokenizer's size) or {vocab_size} or more."
        )
    built = importlib.import_module(f"fmjax.models.{name}").Model(
        **fields,
        vocab_size=wanted or vocab_size,
        dtype=config.precision,
        lm_head=requirements.vocabulary(config.objectives),
        classes=heads,
    )
    requirements.check_model(config.objectives.to_dict(), built)
    if requirements.prefix(config.objectives.to_dict()):
        if config.data.format not in DOCUMENTS:
            raise ConfigError(
                f"config.data.format={config.data.format!r} has texts of two types, but objectives "
                "that read a decoder's documents in both directions mark what they show by types: "
                f"set it to {' or '.join(map(repr, DOCUMENTS))}."
            )
        built = built.clone(cfg=dataclasses.replace(built.cfg, prefix=True))
    built = adapters.wrap(built, config.to_dict())
    check_rows(built, config.data.to_dict())
    return built


def check_rows(model: AnyModel, data: Mapping[str, Any]) -> None:
    """Raise ConfigError for rows of `data` (`config.data`) that the model has no positions for, and
    for several documents in one where a prompt is before the first alone."""
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

    Beside the model's methods there is "encode_routed": (what "encode" gives, what the routers of
    layers with experts say of it (`models.experts.Routing`) or None).
    """

    def applied(params, *args, method):
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
