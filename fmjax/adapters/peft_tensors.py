"""The tensors of PEFT's adapter_model.safetensors, sorted: the adapter's, heads, and copies of the
base's own, which PEFT writes with an adapter of the table of tokens or of the output."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fmjax.adapters import quantise
from fmjax.adapters.peft_matrices import Held
from fmjax.adapters.wrapper import base
from fmjax.convert import writer
from fmjax.convert.files import Place
from fmjax.errors import CheckpointError, quoted

WEIGHTS = "adapter_model.safetensors"


def read(
    folder: Path, before: str, model: Any, named: Mapping[str, jax.Array]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(heads by our names, the adapter's tensors by their names in transformers).

    `before` is what PEFT writes before the name of a module. Raises CheckpointError for a tensor
    that the model has no place for, and for a copy of the base's that differs from `named`.
    """
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    located = {name: place for name, place in _located(model, named).items() if place.parts == 1}
    names = {place.key: name for name, place in located.items()}
    tied = writer.tied(base(model))
    heads, adapter = {}, {}
    for key, value in tensors.items():
        bare = key.removeprefix(before)
        whole = bare.replace(".base_layer.", ".")
        name = names.get(tied.get(whole, whole), "")
        own = value.T if name and located[name].transposed else value
        if not name and (bare != key or key == "prompt_embeddings"):
            _check_not_tied(folder, bare, tied)
            adapter[bare] = value
        elif not name or bare == key:
            raise CheckpointError(
                f"{folder}: the model has no place for {quoted(key)} {value.shape}: the adapter is "
                f"for another model, or not of PEFT, whose keys begin with {before!r}."
            )
        elif name.startswith("head/") and bare == whole:
            if own.shape != named[name].shape:
                raise CheckpointError(
                    f"{folder}: {bare} is {own.shape}, but {name} of the model is "
                    f"{named[name].shape}: the adapter has another number of classes or tokens."
                )
            heads[name] = own.astype(np.float32)
        else:
            _check_copy(folder, bare, own, quantise.matrix(named, name))
    if not adapter:
        raise CheckpointError(f"{folder / WEIGHTS} holds no adapter.")
    return heads, adapter


def places(model: Any, named: Iterable[str]) -> dict[str, Place]:
    """{our parameter: where transformers keeps it}; a quantized one as the whole that it was. Not
    those that are several matrices there, or strewn over one, nor an encoder–decoder's table of
    tokens, of which transformers looks rows up in copies."""
    found = _located(model, named)
    if model.decodes:
        found.pop("embed/token/embedding", None)
    return found


def module(place: Place) -> str:
    return place.key.rpartition(".")[0]


def modules(model: Any, named: Iterable[str]) -> set[str]:
    """All modules of transformers that hold a parameter of the model, of experts a pattern."""
    locate = writer.located(base(model))
    names = {name.partition("/codes")[0] for name in named}
    return {module(place) for name in names if (place := locate(name))}


def held(found: Mapping[str, Place]) -> dict[str, Held]:
    """{module in transformers: what it holds}."""
    parts: dict[str, dict[int, str]] = {}
    for name, place in found.items():
        if name.endswith(("/kernel", "/embedding")):
            parts.setdefault(module(place), {})[place.part] = name
    return {
        owner: Held(
            tuple(weights[part] for part in sorted(weights)),
            weights[0].endswith("/kernel") and not found[weights[0]].transposed,
        )
        for owner, weights in parts.items()
    }


def _located(model: Any, named: Iterable[str]) -> dict[str, Place]:
    locate = writer.located(base(model))
    names = [name.rpartition("/")[0] if name.endswith("/codes") else name for name in named]
    whole = lambda place: place and not place.each and not place.heads
    return {name: place for name in names if whole(place := locate(name))}


def _check_not_tied(folder: Path, key: str, tied: Mapping[str, str]) -> None:
    """Raises CheckpointError for an adapter of an output that repeats the table of tokens."""
    owner = key.partition(".lora_")[0]
    if f"{owner}.weight" in tied:
        raise CheckpointError(
            f"{folder} adapts {owner}, which in this model is the table "
            f"{tied[f'{owner}.weight']} once more: fmjax has no adapter of it. Train one without "
            "it, or have PEFT merge it (merge_and_unload) into a model whose output is not tied."
        )


def _check_copy(folder: Path, key: str, copy: np.ndarray, own: Any) -> None:
    """Raises CheckpointError where the folder's copy of a parameter is not the base's `own`."""
    if copy.shape != own.shape:
        raise CheckpointError(
            f"{folder} holds {key} of the shape {copy.shape}, the base one of {own.shape}: the "
            "adapter was trained on a base with another number of tokens. Use that base, saved "
            "after its table was resized, with its tokenizer."
        )
    # PEFT writes the table in the dtype that the base had when it trained.
    if not np.array_equal(copy, np.asarray(own).astype(copy.dtype)):
        raise CheckpointError(
            f"{folder} holds another {key} than the base: it was trained or replaced with the "
            "adapter, or the adapter is for another base. Have PEFT merge all of it "
            "(merge_and_unload), save that and use it in its place."
        )
