"""Images with labels, as arrays, from what comes with a library or from files."""

import contextlib
import gzip
import math
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from fmjax.data.images.settings import ImageSettings
from fmjax.errors import ConfigError, DataError, first_line
from fmjax.io import disk_cache

MAX_BYTES = 2**34  # of the pixels of one file
Labelled = tuple[np.ndarray, np.ndarray]  # uint8 [N, H, W, C] and int32 [N]


def files(settings: ImageSettings) -> dict[str, str]:
    """{path: digest} of the files that the images are read from."""
    paths = [Path(name).expanduser() for name in (settings.train, settings.validation) if name]
    each = [path for images in paths for path in (images, labels_of(images))]
    for path in each:
        if not path.is_file():
            raise DataError(f"{path} does not exist. See config.data.train and its labels file")
    return {str(path): disk_cache.file_digest(path) for path in each}


def read(settings: ImageSettings) -> dict[str, Labelled]:
    """{"train": …} or {"train": …, "validation": …} of the settings' images.

    Raises DataError for files that are no images or no labels for them.
    """
    if settings.name == "digits":
        return {"train": digits()}
    splits = {"train": settings.train, "validation": settings.validation}
    return {split: idx(Path(name).expanduser()) for split, name in splits.items() if name}


def image_shape(settings: ImageSettings) -> tuple[int, int, int]:
    """(height, width, channels) of the images, without reading them."""
    if settings.name == "digits":
        return 8, 8, 1
    path = Path(settings.train).expanduser()
    with _opened(path) as file:
        return _image_shape(path, _idx_shape(path, file))


def digits() -> Labelled:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels of 17 greys (Alpaydin and Kaynak
    1998), spread over 0 to 255."""
    from sklearn import datasets

    digits = datasets.load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return grey[..., None], digits.target.astype(np.int32)


def idx(path: Path) -> Labelled:
    """The images of a file in MNIST's format, and the labels of the file beside it."""
    images, labels = _idx_array(path), _idx_array(labels_of(path))
    images = images.reshape(-1, *_image_shape(path, images.shape))
    if labels.ndim != 1 or len(labels) != len(images):
        raise DataError(
            f"{labels_of(path)} has an array of shape {labels.shape}, not a label for each of the "
            f"{len(images):,} images of {path}"
        )
    return images, labels.astype(np.int32)


def labels_of(images: Path) -> Path:
    """The file of the labels of a file of images: train-images-idx3-ubyte has
    train-labels-idx1-ubyte."""
    name = images.name.replace("images", "labels").replace("idx3", "idx1")
    if name == images.name:
        raise ConfigError(
            f"config.data.train={str(images)!r}: its name must have the word images, which stands "
            "for labels in the name of the file beside it (train-images-idx3-ubyte.gz)"
        )
    return images.with_name(name)


def _idx_array(path: Path) -> np.ndarray:
    """The uint8 array of a file in idx format."""
    with _opened(path) as file:
        shape = _idx_shape(path, file)
        values = file.read((size := math.prod(shape)) + 1)
    if len(values) != size:
        count = "more" if len(values) > size else "fewer"
        raise DataError(f"{path} has {count} values than the {size} of an array of shape {shape}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _idx_shape(path: Path, file: BufferedIOBase) -> tuple[int, ...]:
    """The shape at the head of an idx file: two zeros, 8 for bytes, the number of dimensions, and
    their sizes as big-endian int32."""
    head = file.read(4)
    if head[:3] != b"\0\0\x08" or not 1 <= head[3] <= 4:
        raise DataError(f"{path} is no idx file of bytes, as MNIST's are")
    sizes = file.read(4 * head[3])
    shape = tuple(np.frombuffer(sizes[: len(sizes) // 4 * 4], ">i4").tolist())
    if len(shape) != head[3] or min(shape) < 0 or math.prod(shape) > MAX_BYTES:
        raise DataError(f"{path} claims an array of shape {list(shape)}")
    return shape


def _image_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(height, width, channels) of an array [N, H, W] of greys, or [N, H, W, C]."""
    image = (*shape[1:], 1) if len(shape) == 3 else shape[1:]
    if len(image) != 3 or image[-1] not in (1, 3) or not math.prod(shape):
        raise DataError(f"{path} has an array of shape {list(shape)}: images are [N, H, W(, 3)]")
    return image


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    """The file, decompressed. Raises DataError where it cannot be read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
