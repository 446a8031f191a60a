"""Labelled images in the cache, as arrays of uint8 that are normalized when a batch is made."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fmjax.data.dataset import Dataset
from fmjax.data.images import sources
from fmjax.data.images.augmentation import Augmentation, augmented
from fmjax.data.images.settings import ImageSettings, read
from fmjax.errors import ConfigError, DataError
from fmjax.io import disk_cache
from fmjax.io.mapped import MappedFiles

VERSION = 1  # of what the cache holds; raise it when the same inputs give other files
PROCESSOR = "image_processor"  # the folder of a run with what makes arrays of images
MEAN, DEVIATION = 0.5, 0.5  # subtracted from pixels in [0, 1], and divided by


@dataclasses.dataclass(frozen=True)
class ImageDataset(Dataset):
    """Images of one size, with a class each."""

    image_shape: tuple[int, int, int] = (0, 0, 0)  # height, width, channels
    processor: Path | None = None  # folder with preprocessor_config.json

    unit = "images"

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {"image_shape": self.image_shape}

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"image_shape": list(self.image_shape)}

    @property
    def processors(self) -> dict[str, Path]:
        return {PROCESSOR: self.processor}

    def example(self, batch: Mapping[str, Any], prepared: Mapping[str, Any]) -> str:
        image = np.asarray(prepared["images"][0]).mean(axis=-1)
        greys = np.clip((image * DEVIATION + MEAN) * 9.99, 0, 9).astype(int)
        rows = ["".join(" .:-=+*#%@"[grey] for grey in row) for row in greys]
        return "\n".join([*rows, f"label {self.labels[int(batch['labels'][0])]}"])

    def texts(self, batch: Mapping[str, np.ndarray]) -> list[str]:
        return [f"image {number}" for number in batch["index"].tolist()]


class ImageSplit:
    """Images and labels of one split, memory-mapped.

    In training images are changed as `augmentation` says.
    """

    row_units = 1

    def __init__(self, folder: Path, split: str, augmentation: Augmentation):
        self._files = files = MappedFiles(folder)
        self._images = files.npy(f"{split}.images.npy")
        self._labels = files.npy(f"{split}.labels.npy")
        self._augmentation = augmentation

    @property
    def unit_count(self) -> int:
        return len(self)

    @property
    def row_size(self) -> str:
        height, width, channels = self._images.shape[1:]
        return f"{height} x {width} pixels" + f" of {channels} colours" * (channels > 1)

    @property
    def labels(self) -> np.ndarray:
        """int32 [N], those of all images."""
        return self._labels

    def __len__(self) -> int:
        return len(self._images)

    def rows(
        self, index: np.ndarray, examples: np.ndarray | None = None, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """`images`, float32 [n, H, W, C] around 0, and `labels`, int32 [n]."""
        with self._files.unchanged():
            images, labels = self._images[index], self._labels[index].astype(np.int32)
        if self._augmentation and examples is not None:
            images = augmented(images, self._augmentation, seed, examples)
        return {"images": normalized(images), "labels": labels}

    def widths(self, index: np.ndarray) -> np.ndarray:
        return np.ones(len(index), int)

    def trim(self, batch: Mapping[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
        return dict(batch)

    def units(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.ones(len(batch["images"]), np.int32)


def normalized(images: np.ndarray) -> np.ndarray:
    """uint8 pixels as float32 around 0."""
    scale = np.float32(1 / (255 * DEVIATION))
    return images.astype(np.float32) * scale - np.float32(MEAN / DEVIATION)


def complete(data: Mapping) -> dict[str, Any]:
    """`config.data` with its defaults. Raises ConfigError for settings that cannot be used."""
    return dataclasses.asdict(read(data))


def stand_in(data: Mapping, tokenizer: Mapping) -> ImageDataset:
    """Facts from the settings and the head of a file, before images are read; classes are any two.

    Raises ConfigError for settings that cannot be used, DataError for files that cannot.
    """
    settings = read(data)
    labels = tuple(settings.classes) or ("one", "other")
    shape = sources.image_shape(settings)
    return ImageDataset({}, "", "images", {}, "classes", labels, image_shape=shape)


def prepare(
    data: Mapping,
    tokenizer: Mapping,
    *,
    embedding_rows: int | None = None,
    log: Callable[[str], None] = print,
    poll: Callable[[], None] = lambda: None,
) -> ImageDataset:
    """Read the images into the cache, or reuse what it holds (`fmjax.data.prepare`).

    Without validation files a share of the images is held out by the hash of their pixels, so that
    equal images are never in both.
    """
    settings = read(data)
    root = disk_cache.root(settings.cache)
    disk_cache.remove_leftovers(root)
    files = sources.files(settings)
    identity = {
        "version": VERSION,
        "name": settings.name,
        "files": sorted(files.items()),
        "fraction": 0 if settings.validation else settings.validation_fraction,
    }
    home = root / f"images-{disk_cache.digest(identity)}"
    with disk_cache.lock(root / f"{home.name}.lock", log, poll):
        index = disk_cache.verified(home, log, poll)
        if index is None:
            index = disk_cache.build(
                home, lambda folder: _write(folder, settings, files, poll), poll
            )
    splits = {split: ImageSplit(home, split, settings.augmentation) for split in index["counts"]}
    for split, counts in index["counts"].items():
        log(f"data: {split}: {counts['images']:,} images")
    return ImageDataset(
        splits,
        digest=disk_cache.digest(index["files"]),
        format="images",
        counts=index["counts"],
        target="classes",
        labels=_names(settings, index["classes"]),
        image_shape=tuple(index["image_shape"]),
        processor=home / PROCESSOR,
    )


def _write(
    folder: Path, settings: ImageSettings, files: Mapping[str, str], poll: Callable[[], None]
) -> dict:
    splits = sources.read(settings)
    poll()
    if sources.files(settings) != files:
        raise DataError(
            f"{settings.train} and the files beside it have changed while they were read: start "
            "again when they are whole."
        )
    if "validation" not in splits and settings.validation_fraction:
        images, labels = splits["train"]
        held_out = _held_out(images, settings.validation_fraction)
        splits = {
            "train": (images[~held_out], labels[~held_out]),
            "validation": (images[held_out], labels[held_out]),
        }
    shapes = {split: images.shape[1:] for split, (images, _) in splits.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"images have different shapes: {shapes}. See config.data.validation")
    for split, (images, labels) in splits.items():
        if not len(images):
            raise DataError(f"there are no images for {split}: see config.data.validation_fraction")
        np.save(folder / f"{split}.images.npy", images)
        np.save(folder / f"{split}.labels.npy", labels)
    (folder / PROCESSOR).mkdir()
    (folder / PROCESSOR / "preprocessor_config.json").write_text(_processor(shapes["train"]))
    return {
        "counts": {
            split: {"images": len(images), "rows": len(images)}
            for split, (images, _) in splits.items()
        },
        "classes": max(int(labels.max()) for _, labels in splits.values()) + 1,
        "image_shape": list(shapes["train"]),
    }


def _held_out(images: np.ndarray, fraction: float) -> np.ndarray:
    """bool [N], true for a `fraction` of the images, by the hash of their pixels."""
    hashes = [xxhash.xxh3_64_intdigest(image.tobytes()) for image in images]
    return np.array(hashes, np.uint64) < np.uint64(fraction * 2**64)


def _processor(shape: tuple[int, int, int]) -> str:
    """Settings in the format of an image processor of transformers."""
    height, width, channels = shape
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": height, "width": width},
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * channels,
        "image_std": [DEVIATION] * channels,
    }
    return json.dumps(settings, indent=2) + "\n"


def _names(settings: ImageSettings, classes: int) -> tuple[str, ...]:
    """Names of the classes, which labels count from 0."""
    if settings.classes and len(settings.classes) < classes:
        raise ConfigError(
            f"config.data.classes has {len(settings.classes)} names, and the images have labels "
            f"from 0 to {classes - 1}"
        )
    return tuple(settings.classes) or tuple(map(str, range(classes)))
