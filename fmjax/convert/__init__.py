"""Hugging Face checkpoints, both ways, without torch.

    folder = convert.find("google-bert/bert-base-uncased", revision="<commit>")
    name, options = convert.describe(folder)         # "bert", arguments of fmjax.models.bert.Model
    params, report = convert.load(folder, abstract)  # straight into the shardings of `abstract`
    convert.export("out", model, params, tokenizer_dir)

`load` reads for each device only what it holds; a stack of layers, which the files keep layer by
layer, is assembled piece by piece. The names of a family are tables in a file of their own, called
as the model's (`bert.py`).
"""

import functools
import importlib
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from fmjax.config import rules
from fmjax.convert import files, options
from fmjax.convert.files import Place, Tensors
from fmjax.convert.options import MULTI_LABEL, check_architecture
from fmjax.convert.writer import (
    architecture,
    check_pool,
    copy_tokenizer,
    export,
    family_of,
    located,
)
from fmjax.errors import CheckpointError, ConfigError, did_you_mean, quoted
from fmjax.io.snapshot import find, read_json
from fmjax.params import paths

__all__ = [
    "copy_tokenizer",
    "Report",
    "architecture",
    "check_class",
    "check_pool",
    "describe",
    "export",
    "family_of",
    "find",
    "labels",
    "load",
    "located",
    "several_labels",
]

# `model_type` of config.json -> the file in fmjax/models and in fmjax/convert
_LLAMA = "llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text olmo2 olmo3 "
_LLAMA += "mixtral qwen2_moe qwen3_moe olmo smollm3 bloom"
_BERTS = "bert roberta xlm-roberta camembert distilbert electra modernbert"
MODEL_TYPES = {
    **dict.fromkeys(_BERTS.split(), "bert"),
    "gpt2": "gpt2",
    **dict.fromkeys(("t5", "mt5", "umt5"), "t5"),
    **dict.fromkeys(_LLAMA.split(), "llama"),
}


class Report(NamedTuple):
    """Parameters that `load` did not find, and tensors that it did not need."""

    kept: tuple[str, ...]  # parameters that the files lack and that have their initialisation
    unused: tuple[str, ...]  # tensors of the files that the model has no place for

    def __str__(self) -> str:
        lines = [f"newly initialised: {_some(_by_block(self.kept))}"] if self.kept else []
        lines += [f"in the files but not used: {_some(self.unused)}"] if self.unused else []
        return "; ".join(lines) or "every parameter loaded, every tensor used"


def describe(source: str | Path) -> tuple[str, dict[str, Any]]:
    """(model name, arguments of its `Model`) of a checkpoint, from its config.json.

    Raises ConfigError for an architecture or an option that fmjax does not have.
    """
    folder = find(source)
    hf, family = _read_config(folder)
    return MODEL_TYPES[hf["model_type"]], _options(folder, hf, family)


def check_class(source: str | Path) -> None:
    """Raises ConfigError for a checkpoint of a class with a head that fmjax does not read."""
    folder = find(source)
    hf, family = _read_config(folder)
    try:
        check_architecture(hf, family.ARCHITECTURES[hf["model_type"]])
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    except TypeError as error:
        raise ConfigError(f"{folder}/config.json has no names in architectures: {error}") from error


def labels(source: str | Path) -> tuple[str, ...]:
    """The names of the classes of a checkpoint's head, from its config.json; () if it has none."""
    folder = find(source)
    hf, family = _read_config(folder)
    try:
        return family.labels(hf)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(f"{folder}/config.json has no id2label of names: {error!r}") from error


def several_labels(source: str | Path) -> bool:
    """True if several classes of a checkpoint's head may be true at once, each by itself."""
    folder = find(source)
    hf, family = _read_config(folder)
    return hf.get("problem_type") == MULTI_LABEL and "classify" in _options(folder, hf, family).get(
        "classes", {}
    )


def load(
    source: str | Path,
    like: paths.Tree,
    *,
    may_miss: str = "",
    leave: str = "",
    packings: Mapping[str, Any] = MappingProxyType({}),
    initial: Callable[[], paths.Tree] | None = None,
) -> tuple[paths.Tree, Report]:
    """The parameters of a checkpoint with the paths, shapes, dtypes and shardings of `like`.

    `like`: a stored tree, layers stacked or not, of arrays or of ShapeDtypeStructs (one without a
    sharding goes to the first device).
    `may_miss`: regex of parameter names that the files may lack (a stack whole or not at all). They
    are taken from `initial()`, which gives a whole tree; it is traced, and only they are computed.
    `packings`: {parameter: (its shape, pack)} of those that `like` has as the arrays `pack` makes
    of one layer's; they are read and packed one by one.
    `leave`: regex of those among them that are not read from the files even if they are there.

    Raises CheckpointError listing what is missing or has another shape, with both shapes, and
    ConfigError as `describe` does.
    """
    folder = find(source)
    hf, family = _read_config(folder)
    sizes = _options(folder, hf, family)
    with files.open_folder(folder) as found_tensors:
        keys = _canonical_keys(family, hf, found_tensors)
        tensors = found_tensors.renamed(keys)
        others = family.SHARED - sizes.get("classes", {}).keys()

        def located(name: str) -> Place | None:
            place = family.place(hf, name)
            of_another = name.startswith("head/") and name.split("/")[1] in others
            if place is None or of_another or re.fullmatch(leave, name):
                return None
            place = place.sized(sizes)
            # A config.json can ask for any number of experts: theirs are counted before named.
            enough = place.each <= len(keys)
            return place if enough and keys.keys() >= set(place.keys()) else None

        problems, missing, places, packed = [], {}, {}, {}
        for path, leaf in paths.flatten(like).items():
            whole, _, last = path.rpartition("/")
            if paths.names(whole)[0] in packings:
                packed.setdefault(whole, {})[last] = leaf
                continue
            names = paths.names(path)
            found = {name: located(name) for name in names}
            if not any(found.values()) and all(re.fullmatch(may_miss, name) for name in names):
                missing[path] = leaf
                continue
            shape = leaf.shape[1:] if paths.is_stacked(path) else leaf.shape
            wrong = [_problem(name, place, shape, tensors) for name, place in found.items()]
            problems += filter(None, wrong)
            places[path] = leaf, list(found.values())
        for path in packed:
            row = [(name, located(name), packings[name]) for name in paths.names(path)]
            wrong = [_problem(name, place, how.shape, tensors) for name, place, how in row]
            problems += filter(None, wrong)
            packed[path] = packed[path], [(place, how) for _, place, how in row]
        if missing and initial is None:
            problems += [
                f"{path}: not in the files, and there is no initialisation" for path in missing
            ]
        if problems:
            raise CheckpointError(
                f"{folder} does not fit the model:\n  " + _some(problems, "\n  ") + "\n"
                f"Its options (config.model) are {json.dumps(sizes)}."
            )
        loaded = {path: _read(path, leaf, row, tensors) for path, (leaf, row) in places.items()}
        for path, (leaves, row) in packed.items():
            loaded |= _packed(path, leaves, row, tensors)
        used = {key for _, row in places.values() for place in row for key in place.keys()}
        used |= {key for _, row in packed.values() for place, _ in row for key in place.keys()}
    if missing:
        loaded |= _initialise(initial, missing)
    kept = [name for path in missing for name in paths.names(path)]
    unused = sorted(key for name, key in keys.items() if name not in used)
    return paths.unflatten(loaded), Report(tuple(kept), tuple(unused))


def _read_config(folder: Path) -> tuple[dict[str, Any], ModuleType]:
    """config.json and the tables of its family."""
    try:
        hf = read_json(folder / "config.json")
        model_type = hf["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} has no config.json that names a model_type: {error!r}"
        ) from error
    if not (isinstance(model_type, str) and model_type in MODEL_TYPES):
        raise ConfigError(
            f"{folder}/config.json has model_type={quoted(model_type)}, which fmjax does not have."
            + did_you_mean(str(model_type), MODEL_TYPES)
        )
    family = importlib.import_module(f"fmjax.convert.{MODEL_TYPES[model_type]}")
    try:
        return options.renamed(hf, family.ALIASES.get(model_type, {})), family
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error


def _options(folder: Path, hf: Mapping[str, Any], family: ModuleType) -> dict[str, Any]:
    """The arguments of `Model` for config.json, which anybody may have written."""
    try:
        found = family.model_options(hf)
        rules.check({"model": found})
        if empty := [name for name, value in found.items() if value is None]:
            raise ConfigError(f"config.json has no value for what is config.model.{empty[0]} here.")
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ConfigError(f"{folder}/config.json is not one of a model: {error!r}") from error
    return found


def _canonical_keys(family: ModuleType, hf: Mapping[str, Any], tensors: Tensors) -> dict[str, str]:
    """{key as the tables have it: key in the files}, without constants and tied repetitions."""
    keys = {
        family.canonical(hf["model_type"], key): key
        for key in tensors.keys()
        if not re.fullmatch(family.BUFFERS, key)
    }
    for copy, original in family.tied(hf).items():
        if copy not in keys:
            continue
        if keys.setdefault(original, keys[copy]) != keys[copy]:
            if not tensors.equal(keys[original], keys[copy]):
                raise CheckpointError(
                    f"The tensors {keys[original]!r} and {keys[copy]!r} differ: the output is "
                    "not tied to the embedding, as tie_word_embeddings in config.json says."
                )
        del keys[copy]
    borrowed = family.borrowed(hf) if hasattr(family, "borrowed") else {}
    return {name: keys[key] for name, key in borrowed.items() if key in keys} | keys


def _problem(name: str, place: Place | None, shape: tuple[int, ...], tensors: Tensors) -> str:
    """Why the parameter cannot be loaded; empty when it can."""
    if place is None:
        return f"{name}: {shape} in the model, not in the files"
    if tensors.shape(place) != shape:
        return f"{name}: {shape} in the model, {tensors.shape(place)} in the files ({place.key})"
    for key in place.keys():
        if tensors.dtype(key) not in files.FLOATS:
            return f"{name}: {tensors.dtype(key)} in the files, not one of {files.FLOATS}"
    return ""


def _read(path: str, leaf: Any, places: list[Place], tensors: Tensors) -> jax.Array:
    """The array of one stored path, each device's piece read from the files on its own."""
    pieces: dict[tuple, np.ndarray] = {}  # replicas share one

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True))
        bounds = tuple((s.start, s.stop) for s in index)
        if bounds not in pieces:
            out = np.empty([stop - start for start, stop in bounds], leaf.dtype)
            if paths.is_stacked(path):
                for row, place in zip(out, places[index[0]], strict=True):
                    row[...] = tensors.read(place, index[1:])
            else:
                out[...] = tensors.read(places[0], index)
            pieces[bounds] = out
        return pieces[bounds]

    sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(leaf.shape, sharding, piece)


def _packed(
    path: str, leaves: Mapping[str, Any], row: list[tuple[Place, Any]], tensors: Tensors
) -> dict[str, jax.Array]:
    """The arrays that the parameter of one stored path is kept as, read a layer at a time."""
    layers = []
    for place, how in row:
        whole = tensors.read(place, tuple(slice(0, size) for size in how.shape))
        layers.append(jax.device_get(how.pack(np.asarray(whole, np.float32))))
    found = {}
    for name, leaf in leaves.items():
        each = [layer[name] for layer in layers]
        array = np.stack(each) if paths.is_stacked(path) else each[0]
        sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
        piece = functools.partial(operator.getitem, array)
        found[f"{path}/{name}"] = jax.make_array_from_callback(leaf.shape, sharding, piece)
    return found


def _initialise(
    initial: Callable[[], paths.Tree], missing: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """The missing paths of a fresh tree; what is not asked for is not computed."""

    def some():
        tree = paths.flatten(initial())
        return {path: tree[path].astype(leaf.dtype) for path, leaf in missing.items()}

    return jax.jit(some, out_shardings={path: leaf.sharding for path, leaf in missing.items()})()


def _by_block(names: Iterable[str]) -> list[str]:
    """The names; one for what several blocks have: "block_00…05/attn/query/lora_a"."""
    alike: dict[str, list[str]] = {}
    for name in names:
        place = paths.layer(name)
        alike.setdefault(f"{place.trunk}/{place.rest}" if place else name, []).append(name)
    return [paths.span(same[0], same[-1]) for same in alike.values()]


def _some(lines: Iterable[str], separator: str = ", ", limit: int = 20) -> str:
    lines = list(lines)
    more = [f"… and {len(lines) - limit} more"] if len(lines) > limit else []
    return separator.join(lines[:limit] + more)
