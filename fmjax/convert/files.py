"""Safetensors files, piece by piece: no tensor is read whole where a part of it is needed."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from fmjax.errors import CheckpointError, quoted
from fmjax.io.snapshot import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
# Formats that can hold code, or that nobody has to read any more.
REFUSED = "bin ckpt gguf h5 joblib msgpack npy npz onnx pb pickle pkl pt pth".split()


class Place(NamedTuple):
    """Location of a parameter: tensor `key`, or block `part` of `parts` along its `axis`.

    `each` and `heads` are numbers, or names of the options of the model that say them.
    """

    key: str
    transposed: bool = False
    part: int = 0
    parts: int = 1
    axis: int = 0
    each: str | int = 0  # tensors, with their numbers for {} in `key`, that ours has in one array
    heads: str | int = 0  # within each of which the parts follow each other, if any

    def sized(self, options: Mapping[str, Any]) -> "Place":
        """With numbers in the place of names."""
        number = lambda of: options[of] if isinstance(of, str) else of
        return self._replace(each=number(self.each), heads=number(self.heads))

    def keys(self) -> tuple[str, ...]:
        """Names of all the tensors, once it is `sized`."""
        return tuple(self.key.format(i) for i in range(self.each)) if self.each else (self.key,)


class Tensors:
    """The tensors of open files by key, read in the layout of our parameters."""

    def __init__(self, slices: Mapping[str, Any]):
        self._slices = dict(slices)

    def renamed(self, keys: Mapping[str, str]) -> "Tensors":
        """Those of `keys`, {new name: key}."""
        return Tensors({name: self._slices[key] for name, key in keys.items()})

    def keys(self) -> list[str]:
        return sorted(self._slices)

    def dtype(self, key: str) -> str:
        return self._slices[key].get_dtype()

    def shape(self, place: Place) -> tuple[int, ...]:
        """The shape of what is at `place`; a fused tensor that cannot be cut keeps its own, and
        of several that differ the first that does counts."""
        shapes = [list(self._slices[key].get_shape()) for key in place.keys()]
        shape = next((other for other in shapes if other != shapes[0]), shapes[0])
        if place.axis < len(shape) and shape[place.axis] % (place.parts * (place.heads or 1)) == 0:
            shape[place.axis] //= place.parts
        own = tuple(shape[::-1] if place.transposed else shape)
        return (place.each, *own) if place.each else own

    def read(self, place: Place, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` (slices with explicit bounds) of what is at `place`."""
        if place.each:
            keys = place.keys()[index[0]]
            return np.stack([self._read(key, place, index[1:]) for key in keys])
        return self._read(place.key, place, index)

    def _read(self, key: str, place: Place, index: tuple[slice, ...]) -> np.ndarray:
        tensor = self._slices[key]
        cut = list(index[::-1] if place.transposed else index)
        own, size = cut[place.axis], tensor.get_shape()[place.axis]
        if place.heads:  # read whole along the axis, the first, where the parts are strewn
            assert place.axis == 0, f"{key}: heads along axis {place.axis}"
            piece = tensor[(slice(0, size), *cut[1:])]
            blocks = piece.reshape(place.heads, place.parts, -1, *piece.shape[1:])
            piece = blocks[:, place.part].reshape(-1, *piece.shape[1:])[own]
        else:
            first = place.part * (size // place.parts)
            cut[place.axis] = slice(own.start + first, own.stop + first)
            piece = tensor[tuple(cut)]
        return piece.T if place.transposed else piece

    def equal(self, one: str, other: str) -> bool:
        """True if two tensors hold the same numbers."""
        return np.array_equal(self._slices[one][:], self._slices[other][:])


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[Tensors]:
    """The tensors of `model.safetensors`, or of the files that its index lists.

    Raises CheckpointError for missing or damaged files, and for pickles, which are never opened.
    """
    wanted = _locate(folder)
    with contextlib.ExitStack() as stack:
        opened = {}
        for name in set(wanted.values()) or {SINGLE}:
            try:
                # Not mapped: pages of a mapping add up to the size of the file in memory.
                file = safe_open(folder / name, "numpy", backend="pread")
                opened[name] = stack.enter_context(file)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
        wanted = wanted or dict.fromkeys(opened[SINGLE].keys(), SINGLE)
        held = {name: set(handle.keys()) for name, handle in opened.items()}
        if lost := [key for key, name in wanted.items() if key not in held[name]]:
            raise CheckpointError(f"{folder / INDEX} lists tensors that its files lack: {lost[:5]}")
        yield Tensors({key: opened[name].get_slice(key) for key, name in wanted.items()})


def _locate(folder: Path) -> dict[str, str]:
    """{tensor key: file name} of the index; empty when there is one file and no index."""
    if (folder / INDEX).is_file():
        try:
            located = dict(read_json(folder / INDEX)["weight_map"])
            names = sorted(set(located.values()))
            # Names only: an index must not point out of its folder, nor to another format.
            bad = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
            bad += [name for name in names if name not in bad and not (folder / name).is_file()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged: {error!r}") from error
        if bad:
            raise CheckpointError(f"{folder} lacks files that {INDEX} lists: {quoted(bad)}")
        return located
    if (folder / SINGLE).is_file():
        return {}
    if found := sorted(path.name for kind in REFUSED for path in folder.glob(f"*.{kind}")):
        raise CheckpointError(
            f"{folder} has its weights only in {found[:5]}. fmjax reads safetensors only, because "
            "opening a pickle can run any code. If you trust it, convert it once with torch and "
            "transformers: AutoModel….from_pretrained(source).save_pretrained(folder)."
        )
    raise CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX}. (From the hub only safetensors are fetched; a "
        "repository that has pytorch_model.bin alone must be converted first.)"
    )
