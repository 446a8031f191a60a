"""Writes a folder that `transformers` loads."""

import functools
import importlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from fmjax.convert.files import INDEX, Place
from fmjax.convert.options import MULTI_LABEL
from fmjax.data import endings
from fmjax.errors import ConfigError
from fmjax.io.snapshot import find, read_json
from fmjax.io.storage import rust_errors
from fmjax.models import TOKEN_HEADS, WHOLE_HEADS
from fmjax.params import paths

_TOKENIZER = (
    "tokenizer*.json", "vocab.txt", "vocab.json", "merges.txt", "*.model",
    "special_tokens_map.json", "added_tokens.json",
    "*.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
_SPECIAL = ("pad", "bos", "eos", "cls", "sep")


def export(
    folder: str | Path,
    model: Any,
    params: paths.Tree,
    tokenizer_dir: str | Path | None = None,
    *,
    labels: Sequence[str] = (),
    several: bool = False,
    stop: Sequence[int] = (),
    max_file_bytes: int = 5 * 10**9,
) -> tuple[str, ...]:
    """Writes config.json, model.safetensors (more files above `max_file_bytes`) and the tokenizer.

    `params` may be stacked and sharded; every process must call, process 0 writes. `labels` are the
    names of the classes of a head, if any, of which `several` may be true at once; `stop` are the
    tokens that end what the model writes, for generation_config.json. Returns the names of the
    heads' parameters that no class of transformers has, and that are left out.

    Raises ConfigError when the folder is not empty or the model has no counterpart in transformers.
    """
    folder = Path(folder)
    if jax.process_index() == 0 and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; export to a new folder.")
    family = family_of(model)
    stored = paths.flatten(params)
    # Where each parameter is stored: path and, in a stack, the layer.
    where = {
        name: (path, layer if paths.is_stacked(path) else None)
        for path in stored
        for layer, name in enumerate(paths.names(path))
    }
    kind = family.type_of(model.cfg)
    _, heads = architecture(model, where)
    left_out = [name for name in where if _head(name) not in {"", *heads}]
    config = family.hf_config(model.cfg, heads, special_ids(tokenizer_dir), labels)
    if several and "problem_type" in config:
        config["problem_type"] = MULTI_LABEL

    # A fused tensor has several parameters; of one with experts each tensor has a part.
    tensors: dict[str, list[tuple[Place, str, int | None]]] = {}
    for name in where.keys() - set(left_out):
        place = family.place(config, name)
        if place is None:
            raise ConfigError(f"The parameter {name!r} has no counterpart in transformers' {kind}.")
        place = place.sized(vars(model.cfg))
        for number, key in enumerate(place.keys()):
            own = number if place.each else None
            tensors.setdefault(key, []).append((place, name, own))
    tensors = {key: sorted(parts) for key, parts in sorted(tensors.items())}

    def value(key: str) -> np.ndarray:
        pieces = []
        for place, name, number in tensors[key]:
            path, layer = where[name]
            index = tuple(i for i in (layer, number) if i is not None)
            piece = _to_host(stored[path][index] if index else stored[path])
            pieces.append(piece.T if place.transposed else piece)
        # A non-contiguous array would be written in the order of its memory, not of its indices.
        return np.ascontiguousarray(_joined(tensors[key][0][0], pieces))

    def nbytes(key: str) -> int:
        total = 0
        for place, name, _ in tensors[key]:
            path, layer = where[name]
            layers = 1 if layer is None else len(stored[path])
            total += stored[path].nbytes // (layers * (place.each or 1))
        return total

    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(tokenizer_dir, folder)
    _write(folder, {key: nbytes(key) for key in tensors}, value, max_file_bytes)
    if jax.process_index() == 0:
        if stop:
            endings.write(folder, stop, config)
        # Last, so that a folder that can be opened is complete.
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tuple(left_out)


def _joined(place: Place, pieces: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor of all its parts."""
    if not place.heads:
        return np.concatenate(pieces, place.axis) if len(pieces) > 1 else pieces[0]
    each = [piece.reshape(place.heads, -1, *piece.shape[1:]) for piece in pieces]
    return np.stack(each, axis=1).reshape(-1, *pieces[0].shape[1:])


def special_ids(tokenizer_dir: str | Path | None) -> dict[str, int]:
    """{"pad": 0, …} from the files of a fast tokenizer.

    `transformers` would tell too, but its tokenizers import torch where that is installed.
    """
    if tokenizer_dir is None:
        return {}
    files = [Path(tokenizer_dir, name) for name in ("tokenizer.json", "tokenizer_config.json")]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise ConfigError(f"A tokenizer folder in transformers' format lacks {missing}.")
    try:
        tokenizer, options = map(read_json, files)
        ids = {token["content"]: int(token["id"]) for token in tokenizer["added_tokens"]}
        tokens = {name: options.get(f"{name}_token") for name in _SPECIAL}
        tokens = {k: t["content"] if isinstance(t, dict) else t for k, t in tokens.items()}
        return {name: ids[token] for name, token in tokens.items() if token in ids}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{tokenizer_dir} is no tokenizer of transformers: {error!r}") from error


def family_of(model: Any) -> ModuleType:
    """The file of name tables beside this one that is called as the model's file."""
    name = type(model).__module__.rpartition(".")[2]
    if not Path(__file__).with_name(f"{name}.py").is_file():
        raise ConfigError(
            f"{type(model).__name__} of {name}.py has no counterpart in transformers."
        )
    return importlib.import_module(f"fmjax.convert.{name}")


def located(model: Any) -> Callable[[str], Place | None]:
    """Where transformers stores a parameter of `model`; None if it has no place for it."""
    return functools.partial(family_of(model).place, _config(model))


def tied(model: Any) -> dict[str, str]:
    """{tensor in transformers: the one that it repeats}."""
    return family_of(model).tied(_config(model))


def _config(model: Any) -> dict[str, Any]:
    """config.json of `model` with the heads that all classes of transformers have."""
    family = family_of(model)
    _, heads = family.ARCHITECTURES[family.type_of(model.cfg)][-1]
    return family.hf_config(model.cfg, heads, {})


def _head(name: str) -> str:
    """The head that a parameter belongs to; empty for the trunk."""
    return name.split("/")[1] if name.startswith("head/") else ""


def architecture(model: Any, names: Iterable[str]) -> tuple[str, frozenset[str]]:
    """(class of transformers, its heads): the richest that a model with parameters of these `names`
    can fill.

    Raises ConfigError if there is none, or if it had none of the heads for tasks of the model.
    """
    family = family_of(model)
    kind = family.type_of(model.cfg)
    present = {_head(name) for name in names} - {""}
    tasks = present & {*WHOLE_HEADS, *TOKEN_HEADS}
    for name, heads in family.ARCHITECTURES[kind]:
        if heads <= present and (heads & tasks or not tasks):
            family.hf_config(model.cfg, heads, {})  # which refuses options that no class has
            return name, heads
    possible = {head for _, heads in family.ARCHITECTURES[kind] for head in heads} - {"pooler"}
    message = f"No class of transformers for {kind} has the heads {sorted(present)}"
    if tasks & possible:
        raise ConfigError(
            f"{message} without the layer that it has before them: set config.init to what this "
            "run started from and train again, which adds the layer."
        )
    raise ConfigError(f"{message}; fmjax writes {kind} with {' or '.join(sorted(possible))} alone.")


def check_pool(model: Any, objectives: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ConfigError for a head on what no class of transformers takes for the whole."""
    family = family_of(model)
    kind = family.type_of(model.cfg)
    possible = family.POOLED[kind]
    for name in dict(model.cfg.classes).keys() & {*WHOLE_HEADS}:
        pool = objectives.get(name, {}).get("pool") or getattr(model.cfg, "pool", "")
        if pool and possible and pool not in possible:
            raise ConfigError(
                f"The run has config.objectives.{name}.pool={pool!r}, but the classes of "
                f"transformers for {kind} take {' or '.join(map(repr, possible))}: outputs would "
                f"differ. Train with config.objectives.{name}.pool={possible[0]} to export."
            )


def _to_host(array: jax.Array) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def copy_tokenizer(source: str | Path | None, folder: Path) -> None:
    if source is not None:
        source = find(source)
        for path in {path for pattern in _TOKENIZER for path in source.glob(pattern)}:
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _write(
    folder: Path, nbytes: Mapping[str, int], value: Callable[[str], np.ndarray], max_bytes: int
) -> None:
    """The tensors in files of at most `max_bytes`, one file in memory at a time."""
    from huggingface_hub import split_state_dict_into_shards_factory  # slow to import

    split = split_state_dict_into_shards_factory(
        dict(nbytes),
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    for name, keys in split.filename_to_tensors.items():
        values = {key: value(key) for key in keys}
        if jax.process_index() == 0:
            with rust_errors():
                save_file(values, folder / name, metadata={"format": "pt"})
    if split.is_sharded and jax.process_index() == 0:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
