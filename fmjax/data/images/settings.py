"""The keys of `config.data` for images: their defaults, and what fits together."""

import dataclasses
from collections.abc import Mapping

from fmjax.data.images.augmentation import Augmentation
from fmjax.errors import ConfigError, did_you_mean, quoted

NAMES = ("digits", "idx")


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """`config.data` with `format="images"`. Sizes in pixels; `validation_fraction` is a share of
    images."""

    format: str = "images"
    name: str = "digits"  # scikit-learn's handwritten digits; or idx: files of MNIST's format
    train: str = ""  # idx: the file of images; its labels are in the file called labels-idx1 for it
    validation: str = ""  # empty: a share of the images of `train`
    validation_fraction: float = 0.2
    # Of training images: see augmentation.py
    shift: float = 0.0
    rotate: float = 0.0
    zoom: float = 0.0
    classes: tuple[str, ...] | list[str] = ()  # names of the classes in order; empty: as found
    examples: int = 0  # images that training draws by its seed; 0 = all
    skip: tuple | list = ()  # ranges of examples that training passes over: see batches.py
    cache: str = ""  # empty: $FMJAX_CACHE, else ~/.cache/fmjax

    def __post_init__(self):
        if self.name not in NAMES:
            raise ConfigError(
                f"config.data.name={quoted(self.name)} is no source of images."
                + did_you_mean(self.name, NAMES)
            )
        if (self.name == "idx") != bool(self.train):
            raise ConfigError(
                "config.data.name='idx' needs config.data.train, a file of images in MNIST's format"
                if self.name == "idx"
                else "config.data.name='digits' comes with its images: leave config.data.train "
                "empty, or set config.data.name='idx'"
            )
        if self.validation and not self.train:
            raise ConfigError("config.data.validation needs config.data.train beside it")
        _ = self.augmentation  # which refuses what it cannot do

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.shift, self.rotate, self.zoom)


def read(values: Mapping) -> ImageSettings:
    """The settings. Raises ConfigError for unknown keys, with those that are close."""
    possible = [field.name for field in dataclasses.fields(ImageSettings)]
    for name in values:
        if name not in possible:
            raise ConfigError(
                f"Unknown key config.data.{name} with config.data.format='images'."
                + did_you_mean(name, possible)
            )
    return ImageSettings(**values)
