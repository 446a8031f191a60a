"""Random changes of training images: each is a function of the seed and the example."""

import dataclasses
import math

import numpy as np

from fmjax.data import order
from fmjax.errors import ConfigError, quoted

LIMITS = {"shift": 64, "rotate": 180, "zoom": 0.9}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Largest changes of an image, each drawn uniformly in both directions; 0 is none.

    What comes in at the borders repeats the outermost pixels.
    """

    shift: float = 0.0  # pixels, down and to the right
    rotate: float = 0.0  # degrees about the centre
    zoom: float = 0.0  # share of the size

    def __post_init__(self):
        for name, most in LIMITS.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 <= value <= most):
                raise ConfigError(
                    f"config.data.{name}={quoted(value)}: expected a number from 0 to {most}"
                )

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in LIMITS)


def augmented(images: np.ndarray, how: Augmentation, seed: int, examples: np.ndarray) -> np.ndarray:
    """uint8 images [n, H, W, C] of the `examples` [n], changed.

    Pixels are interpolated between the four around them (bilinear), in float64 and by operations
    that are rounded alike everywhere.
    """
    number = iter(range(4))
    draw = lambda: 2 * order.uniform(seed, examples, next(number)) - 1  # [n] in [-1, 1)
    down, right = draw() * how.shift, draw() * how.shift
    # By the tangent of half the angle, as sines may differ in the last bit between machines.
    tangent = draw() * math.tan(math.radians(how.rotate) / 2)
    size = 1 + draw() * how.zoom
    cos = (1 - tangent**2) / (1 + tangent**2) / size
    sin = 2 * tangent / (1 + tangent**2) / size
    (height, width), each = images.shape[1:3], lambda x: x[:, None, None]
    y = np.arange(height)[:, None] - (height - 1) / 2 - each(down)
    x = np.arange(width) - (width - 1) / 2 - each(right)
    rows = each(cos) * y - each(sin) * x + (height - 1) / 2
    columns = each(sin) * y + each(cos) * x + (width - 1) / 2
    return sampled(images, rows.clip(0, height - 1), columns.clip(0, width - 1))


def sampled(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The images at the places (`rows`, `columns`) [n, H, W] of their pixels, rounded."""
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    below, beside = (rows - top)[..., None], (columns - left)[..., None]
    wide = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge").astype(float)
    which = np.arange(len(images))[:, None, None]
    upper = wide[which, top, left] * (1 - beside) + wide[which, top, left + 1] * beside
    lower = wide[which, top + 1, left] * (1 - beside) + wide[which, top + 1, left + 1] * beside
    return np.rint(upper * (1 - below) + lower * below).astype(np.uint8)
