"""`layer_types` of config.json: which layers see all, and which a window."""

from collections.abc import Mapping, Sequence
from typing import Any

from fmjax.errors import ConfigError, quoted

FULL, SLIDING = "full_attention", "sliding_attention"


def listed(hf: Mapping[str, Any], depth: int) -> list[bool] | None:
    """For each layer, whether it has a window; None if the key is not given.

    Raises ConfigError for another number of layers, or layers of another kind.
    """
    given = hf.get("layer_types")
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != depth or not set(given) <= {FULL, SLIDING}:
        raise ConfigError(
            f"config.json has layer_types={quoted(given)}; fmjax takes one of {FULL!r} and "
            f"{SLIDING!r} for each of the {depth} layers."
        )
    return [kind == SLIDING for kind in given]


def kinds(full: Sequence[bool]) -> list[str]:
    """The value of the key, given which layers see all."""
    return [FULL if sees_all else SLIDING for sees_all in full]
