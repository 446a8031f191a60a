"""Rotary positions (Su et al. 2021): frequencies, and the ways in which they are stretched.

Models are trained on texts of some length and then made to read longer ones by turning slower:
`scaling` names how. The frequencies are made once, on the host, in float64.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmjax.errors import ConfigError, did_you_mean

# What each kind of scaling is told, and what it assumes where it is not (None: it must be told).
SCALINGS: dict[str, dict[str, float | None]] = {
    "default": {},
    "linear": {"factor": None},
    "dynamic": {"factor": None},
    "llama3": {
        "factor": None,
        "low_freq_factor": None,
        "high_freq_factor": None,
        "original_max_position_embeddings": None,
    },
    "yarn": {
        "factor": None,
        "original_max_position_embeddings": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 0.0,
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
        "truncate": True,
    },
}


def check(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a scaling with what it assumes. Raises ConfigError for one that is not
    known, lacks something or has too much."""
    told = dict(scaling)
    kind = told.pop("type", "default")
    if kind not in SCALINGS:
        raise ConfigError(
            f"config.model.rope.type={kind!r} is not known." + did_you_mean(str(kind), SCALINGS)
        )
    known = SCALINGS[kind]
    for key, value in told.items():
        if key not in known:
            raise ConfigError(f"config.model.rope.{key} is not known." + did_you_mean(key, known))
        if not isinstance(value, int | float) or value < 0:
            raise ConfigError(f"config.model.rope.{key}={value!r} is no number from 0.")
    if missing := [key for key, value in known.items() if value is None and not told.get(key)]:
        raise ConfigError(f"config.model.rope.type={kind!r} needs {', '.join(missing)}.")
    return {"type": kind, **known, **told}


def frequencies(
    size: int, theta: float, scaling: Mapping[str, Any], length: int, max_len: int
) -> tuple[np.ndarray, float]:
    """([H/2] radians a position, factor of the cosines and sines) for heads of `size`.

    `length` is that of the rows, `max_len` what the model was trained for; "dynamic" depends on
    both.
    """
    told = check(scaling)
    half = np.arange(0, size, 2, dtype=np.float64) / size
    plain = theta**-half
    if told["type"] == "default":
        return plain, 1.0
    factor = told["factor"]
    if told["type"] == "linear":  # Chen et al. 2023, "Extending Context Window … via Positional
        return plain / factor, 1.0  # Interpolation"
    if told["type"] == "dynamic":  # the base grows with the length (NTK-aware)
        over = max(length, max_len) / max_len
        base = theta * (factor * over - (factor - 1)) ** (size / (size - 2))
        return base**-half, 1.0
    original = told["original_max_position_embeddings"]
    if told["type"] == "llama3":  # slow waves are stretched, fast ones not (Llama 3.1)
        turns = original * plain / (2 * np.pi)
        low, high = told["low_freq_factor"], told["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return plain * (kept + (1 - kept) / factor), 1.0
    return _yarn(plain, size, theta, original, told)


def _yarn(
    plain: np.ndarray, size: int, theta: float, original: float, told: Mapping[str, Any]
) -> tuple[np.ndarray, float]:
    """Peng et al. 2023, §3.2 to 3.4: dimensions that turn often in the trained length are kept,
    those that do not turn once are stretched, and attention is made a little sharper."""
    factor = told["factor"]

    def dimension(turns: float) -> float:
        """The dimension whose waves turn so often in the trained length."""
        return size * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(theta))

    low, high = dimension(told["beta_fast"]), dimension(told["beta_slow"])
    if told["truncate"]:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    stretched = np.clip((np.arange(size // 2) - low) / ((high - low) or 1e-3), 0, 1)
    sharper = lambda scale: 0.1 * scale * np.log(factor) + 1 if factor > 1 else 1.0
    attention = told["attention_factor"]
    if not attention:
        scales = told["mscale"], told["mscale_all_dim"]
        attention = sharper(scales[0]) / sharper(scales[1]) if all(scales) else sharper(1.0)
    return plain * (1 - stretched) + plain / factor * stretched, float(attention)


def turned(
    x: Float[Array, "B N T H"], positions: Int[Array, "B T"], table: Float[Array, "F"], factor: Any
) -> Float[Array, "B N T H"]:
    """x with its halves turned by the angles positions * table (convention of GPT-NeoX and
    Llama); cosines and sines times `factor`."""
    angles = positions[..., None].astype(jnp.float32) * table.reshape(1, 1, -1)  # (B, T, H/2)
    cos, sin = (wave[:, None] * factor for wave in (jnp.cos(angles), jnp.sin(angles)))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x.dtype)


def rope(
    x: Float[Array, "B N T H"], positions: Int[Array, "B T"], theta: float | Float[Array, ""]
) -> Float[Array, "B N T H"]:
    """`turned` by the frequencies theta^(-2i/H), of which theta may be traced."""
    exponents = jnp.arange(x.shape[-1] // 2, dtype=jnp.float32) / (x.shape[-1] // 2)
    return turned(x, positions, 1.0 / jnp.asarray(theta, jnp.float32) ** exponents, 1.0)
