"""Layer types of decoders, windows and positions by layer, in config.json and here.

config.json lists them layer by layer, or gives the rule of its family; `models.llama.Config` has a
period (`full_every`, `nope_every`) where there is one, and otherwise the numbers of the layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fmjax.convert.layer_types import kinds, listed
from fmjax.errors import ConfigError, quoted

# Families whose layers differ by `layer_types`; in the others all are alike.
LISTED = ("gemma2", "gemma3_text", "olmo3", "ministral", "qwen2", "qwen3", "qwen2_moe", "smollm3")
ALIKE = ("mistral", "mixtral", "qwen3_moe")
# Families whose `sliding_window` counts where `use_sliding_window` says so.
SWITCHED = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3")
# Of these transformers makes a mask of the window, even if no layer has it.
_ALWAYS = ("gemma2", "gemma3_text", "olmo3")
_WINDOW = dict.fromkeys((*_ALWAYS, *SWITCHED, "mistral", "ministral"), 4096) | {"smollm3": None}
_PERIOD = {"gemma2": 2, "gemma3_text": 6, "olmo3": 4}
_FROM = 28  # the first layer of Qwen with a window, where nothing is said


def read(hf: Mapping[str, Any], kind: str, depth: int) -> dict[str, Any]:
    """The options of windows and positions.

    Raises ConfigError for a list that transformers does not read as it is.
    """
    options: dict[str, Any] = {}
    nope = []
    if kind == "smollm3":
        nope = _nope(hf, depth)
        options = _periodic(nope, "nope_every", "nope_layers")
    window = _window(hf, kind)
    sliding = _sliding(hf, kind, depth, window, nope)
    if any(sliding) and not window:
        raise ConfigError(
            f"config.json has sliding_window={window!r}, and layer_types or its family's rule says "
            "that layers have a window: give it a number from 1."
        )
    full = [not slides for slides in sliding]
    if not any(sliding):
        return options | {"window": 0, "full_every": 0, "window_layers": ()}
    options |= {"window": window} | _periodic(full, "full_every", "window_layers")
    if not options["full_every"] and any(full):
        options["window_layers"] = tuple(i for i, slides in enumerate(sliding) if slides)
    return options


def written(cfg: Any, kind: str) -> dict[str, Any]:
    """The keys for a `models.llama.Config`.

    Raises ConfigError for layers that differ in a family whose are alike.
    """
    full = cfg.full_layers
    config: dict[str, Any] = {}
    if kind == "smollm3":
        config["no_rope_layers"] = [int(rotary) for rotary in cfg.rotary_layers]
        config["no_rope_layer_interval"] = cfg.nope_every
    if kind in (*LISTED, *ALIKE):
        spare = _WINDOW.get(kind) if kind in _ALWAYS else None
        config["sliding_window"] = cfg.window or spare
    if kind in LISTED:
        config["layer_types"] = kinds(full)
    elif len(set(full)) > 1:
        raise ConfigError(
            f"config.model.full_every={cfg.full_every} and config.model.window_layers="
            f"{cfg.window_layers} cannot be exported: all layers of transformers' {kind} are alike."
        )
    if kind in SWITCHED:
        config["use_sliding_window"] = cfg.window > 0
    if kind in ("qwen2", "qwen3") and full == sorted(full, reverse=True) and not full[-1]:
        config["max_window_layers"] = full.index(False)  # which older versions of it read
    return config


def fields(kind: str) -> set[str]:
    """The options that the keys of a family say."""
    windows = {"window", "full_every", "window_layers"} if kind in (*LISTED, *ALIKE) else set()
    return windows | ({"nope_every", "nope_layers"} if kind == "smollm3" else set())


def _window(hf: Mapping[str, Any], kind: str) -> int | None:
    """The window in use; None: none."""
    if kind not in (*LISTED, *ALIKE) or (kind in SWITCHED and not hf.get("use_sliding_window")):
        return None
    window = hf.get("sliding_window", _WINDOW.get(kind))
    if window == 0:
        raise ConfigError("config.json has sliding_window=0: leave it out for no window.")
    return window


def _sliding(
    hf: Mapping[str, Any], kind: str, depth: int, window: int | None, nope: Sequence[bool]
) -> list[bool]:
    """For each layer, whether it has a window."""
    given = listed(hf, depth)
    if kind not in LISTED:
        alike = [window is not None] * depth
        if given not in (None, alike):
            raise ConfigError(
                f"config.json has layer_types={quoted(hf['layer_types'])}, which transformers' "
                f"{kind} does not read: all of its layers are alike."
            )
        return alike
    if given is not None:
        return given
    numbers = range(1, depth + 1)
    if kind in _PERIOD:
        every = hf.get("sliding_window_pattern", _PERIOD[kind]) if "3_text" in kind else None
        return [i % (every or _PERIOD[kind]) != 0 for i in numbers]
    if window is None:
        return [False] * depth
    if kind == "smollm3":
        return list(nope)
    start = hf.get("max_window_layers", _FROM)
    if kind == "qwen2_moe":
        return [i % 2 != 0 and i <= start for i in numbers]
    return [kind == "ministral" or i > start for i in numbers]


def _nope(hf: Mapping[str, Any], depth: int) -> list[bool]:
    """For each layer, whether it has no positions."""
    given = hf.get("no_rope_layers")
    if given is None:
        every = hf.get("no_rope_layer_interval", 4)
        return [i % every == 0 for i in range(1, depth + 1)] if every else [False] * depth
    if not isinstance(given, list) or len(given) < depth or not set(given) <= {0, 1}:
        raise ConfigError(
            f"config.json has no_rope_layers={quoted(given)}; fmjax takes 1 (with positions) or 0 "
            f"for each of the {depth} layers."
        )
    return [not rotary for rotary in given[:depth]]


def _periodic(marked: Sequence[bool], every: str, layers: str) -> dict[str, Any]:
    """{every: n} where each n-th layer is marked, and otherwise {layers: the numbers of those}."""
    if not any(marked):
        return {every: 0, layers: ()}
    period = list(marked).index(True) + 1
    if all(mark == (i % period == 0) for i, mark in enumerate(marked, 1)):
        return {every: period, layers: ()}
    return {every: 0, layers: tuple(i for i, mark in enumerate(marked) if mark)}
