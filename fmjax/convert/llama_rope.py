"""Rotary positions of Llama and its relatives in config.json, in the keys of transformers 4 and 5.

Of two sets of keys transformers 5 takes `rope_scaling`, and where that is missing
`rope_parameters`; families with a window in some layers have a set for each kind of layers.
"""

from collections.abc import Mapping
from typing import Any

from fmjax.convert import options
from fmjax.errors import ConfigError, quoted

# Where nothing is said, for all layers and for those with a window that have their own.
_BASES = {"gemma3_text": 1e6, "mixtral": 1e6, "smollm3": 2e6, "olmo3": 5e5}
LOCAL = {"gemma3_text": 1e4, "olmo3": 5e5}
_LAYERS = ("full_attention", "sliding_attention")
_TRAINED = "original_max_position_embeddings"
_LENGTHS = ("llama3", "yarn")  # kinds that are told the trained length


def read(hf: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Bases and stretching of positions.

    Raises ConfigError for what transformers' family does not compute.
    """
    given, stretched = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    if (factor := hf.get("partial_rotary_factor")) not in (None, 1):
        raise _not_all(factor)
    if kind in LOCAL:
        far = (given.get(_LAYERS[0]) or {}) | stretched
        found = {"theta_window": _window_base(hf, kind, given.get(_LAYERS[1]) or {})}
    else:
        far, found = dict(stretched or given), {}
        if nested := [key for key in _LAYERS if key in far]:
            raise ConfigError(
                f"config.json has rope_parameters for {nested[0]}: transformers' {kind} has the "
                "same for all of its layers."
            )
    base = far.pop("rope_theta", None) or hf.get("rope_theta") or _BASES.get(kind, 10_000.0)
    return found | {"theta": float(base), "rope": _scaling(hf, far, kind in LOCAL)}


def written(cfg: Any, kind: str) -> dict[str, Any]:
    """In the keys of the published checkpoints, which every version of transformers reads.

    Raises ConfigError for layers with a window that are stretched where transformers' are not.
    """
    if kind in LOCAL and cfg.rope:
        options.require(kind, "theta_window", cfg.theta_window, cfg.theta_window or cfg.theta)
    local = cfg.theta_window or cfg.theta
    scaling = dict(cfg.rope)
    named = {"rope_type": scaling.pop("type"), **scaling} if scaling else None
    config: dict[str, Any] = {"rope_theta": cfg.theta, "rope_scaling": named}
    if kind == "gemma3_text":
        config["rope_local_base_freq"] = local
    if kind == "olmo3":  # whose older keys have no base for layers with a window
        near = {"rope_type": "default", "rope_theta": local}
        far = {"rope_type": "default", **(named or {}), "rope_theta": cfg.theta}
        config["rope_parameters"] = dict(zip(_LAYERS, (far, near), strict=True))
    return config


def _window_base(hf: Mapping[str, Any], kind: str, near: Mapping[str, Any]) -> float:
    if near.get("rope_type", near.get("type", "default")) != "default":
        raise ConfigError(
            f"config.json has rope_type={quoted(near['rope_type'])} for layers with a window; "
            "fmjax has 'default' only."
        )
    if near.get("partial_rotary_factor", 1) != 1:
        raise _not_all(near["partial_rotary_factor"])
    older = hf.get("rope_local_base_freq") if kind == "gemma3_text" else None
    return float(near.get("rope_theta") or older or LOCAL[kind])


def _scaling(
    hf: Mapping[str, Any], given: dict[str, Any], local: bool
) -> tuple[tuple[str, Any], ...]:
    """`config.model.rope`."""
    if (factor := given.pop("partial_rotary_factor", None)) not in (None, 1):
        raise _not_all(factor)
    kinds = [given.pop(key) for key in ("rope_type", "type") if given.get(key)]
    kind = kinds[0] if kinds else "default"
    if kind == "default":
        return ()
    scaling = {key: value for key, value in given.items() if value is not None}
    if kind in _LENGTHS:
        outer = None if local else hf.get(_TRAINED)
        if outer not in (None, scaling.get(_TRAINED, outer)):
            raise ConfigError(
                f"config.json has {_TRAINED}={outer!r} beside {scaling[_TRAINED]!r} for "
                f"rope_type={quoted(kind)}."
            )
        scaling.setdefault(_TRAINED, outer or hf["max_position_embeddings"])
    else:
        scaling.pop(_TRAINED, None)
    if kind == "yarn":
        if scaling.get("attention_factor") == 0:
            raise ConfigError("config.json has attention_factor=0: all attention would be equal.")
        if local and not scaling.get("truncate", True):
            raise ConfigError(
                "config.json has truncate=False, which transformers does not read where layers "
                "with a window have positions of their own."
            )
        if "factor" in given and given["factor"] is None:
            scaling["factor"] = hf["max_position_embeddings"] / scaling[_TRAINED]
        scaling = {k: v for k, v in scaling.items() if v or k not in ("beta_fast", "beta_slow")}
    return (("type", kind), *sorted(scaling.items()))


def _not_all(factor: Any) -> ConfigError:
    return ConfigError(
        f"config.json has partial_rotary_factor={quoted(factor)}; fmjax turns whole heads only."
    )
