"""Adapters in the format of Hugging Face's PEFT, both ways, without torch.

    peft.write("out", model, params)                   # an adapted model and its parameters
    model, params = peft.read("out", model, params)    # a base model and its parameters

The tensors of each kind are in `fmjax.adapters.peft_formats`. A key that PEFT has no place for it
leaves out in silence, and an adapter on another base gives numbers that mean nothing, so we read
back what we write, and beside it is `BASE`, a digest of the base's parameters.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fmjax import adapters, convert
from fmjax.adapters import (
    merge,
    peft_formats,
    peft_prompts,
    peft_settings,
    peft_tensors,
    quantise,
)
from fmjax.adapters.peft_formats import FORMATS
from fmjax.adapters.peft_matrices import Held, adapted
from fmjax.adapters.peft_settings import CONFIG
from fmjax.adapters.peft_tensors import WEIGHTS
from fmjax.adapters.wrapper import Adapted
from fmjax.config import rules
from fmjax.errors import CheckpointError, ConfigError, FmjaxError, quoted
from fmjax.io.snapshot import find, read_json
from fmjax.io.storage import rust_errors
from fmjax.params import paths

BASE = "base.json"


def write(
    folder: str | Path, model: Adapted, params: paths.Tree, *, heads: str = "", source: str = ""
) -> dict[str, Any]:
    """Writes the adapter, and the heads `head/<name>` whose name matches `heads`, to a new folder.

    `source` is where the base came from, as `config.init` has it. Returns adapter_config.json.
    Raises ConfigError for what PEFT has no place for, CheckpointError if it reads back otherwise.
    """
    folder, kind = Path(folder), peft_formats.of(model)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; write to a new folder.")
    model, params = peft_prompts.plain(model, params)
    named = {name: np.asarray(leaf) for name, leaf in paths.unstack(params).items()}
    places = peft_tensors.places(model, named)
    held = peft_tensors.held(places)
    beside, sites = {}, ()
    if kind in ("LORA", "IA3"):
        beside, sites = adapted(model, held), model.sites()
    there = {path for one in beside.values() for path in one.paths}
    if lost := [path for path in sites if path not in there]:
        raise ConfigError(f"PEFT has no place for an adapter of {lost[0]}: no matrix of its own.")
    saving = [name for name in named if re.fullmatch(f"head/({heads})/.*", name)]
    saving = [name for name in saving if not re.fullmatch(merge.LEAVES, name)]
    if lost := [name for name in saving if name not in places]:
        raise ConfigError(f"transformers has no place for {lost[0]}, which the adapter needs.")
    own = sorted({name.split("/")[1] for name in saving})
    tensors, config = FORMATS[kind].write(model, named, beside, own)
    before = FORMATS[kind].before
    tensors = {key if key == "prompt_embeddings" else before + key: x for key, x in tensors.items()}
    for name in saving:
        tensors[before + places[name].key] = (
            named[name].T if places[name].transposed else named[name]
        )
    saved = sorted({peft_tensors.module(places[name]) for name in saving})
    origin = peft_settings.origin(source)
    if _is_export(source) and not _is_base(origin["base_model_name_or_path"], model, params):
        origin = dict.fromkeys(origin)  # of another step: PEFT would load it without a word
    common = {
        "peft_type": kind,
        **origin,
        "task_type": peft_settings.task(model, own or dict(model.cfg.classes)),
        "inference_mode": True,
        "modules_to_save": saved or None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    with rust_errors():
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    parts = {module: one.ranks for module, one in beside.items() if len(one.weights) > 1}
    described = {"sha256": digest(params)} | ({"parts": parts} if parts else {})
    _write_json(folder / BASE, described | _quantised(model.model))
    # Last, so that a folder that can be opened is complete.
    written = common | peft_settings.shortened(config, peft_tensors.modules(model, named))
    _write_json(folder / CONFIG, written)

    again = paths.unstack(read(folder, model.model, merge.separate(params)[0])[1])
    if wrong := [name for name in named if not _same(name, named[name], again.get(name))]:
        raise CheckpointError(
            f"{folder} was written, but reads back differently: {', '.join(wrong[:5])}. Do not use "
            "it; write to another folder, on another disk if it happens again."
        )
    return written


def read(folder: str | Path, model: Any, params: paths.Tree) -> tuple[Adapted, paths.Tree]:
    """(`model`, adapted as the folder says; its parameters on the base `params`).

    Heads that the folder holds replace those of `params`. A model that is stacked is stacked anew,
    since its layers may have become of several kinds.

    Raises ConfigError for an adapter of another kind and CheckpointError for one that does not fit,
    was made for another base, or is damaged.
    """
    folder = find(folder, files=(CONFIG, WEIGHTS, BASE))
    config = peft_settings.read(folder, tuple(FORMATS))
    named = paths.unstack(params)
    _check_base(folder, model, params)
    kind = FORMATS[config["peft_type"]]
    heads, tensors = peft_tensors.read(folder, kind.before, model, named)
    held = _with_parts(folder, peft_tensors.held(peft_tensors.places(model, named)))
    settings, leaves = kind.read(folder, config, tensors, model, named, held)
    adapted = Adapted(model, settings)
    stacks = None if model.stacks is None else paths.runs(adapted.kinds)
    named = {name: jnp.asarray(leaf) for name, leaf in (named | heads | leaves).items()}
    return adapted.clone(stacks=stacks), paths.stack(named, stacks)


def digest(params: paths.Tree) -> str:
    """SHA-256 over names, shapes and bytes of all parameters but adapters' and heads'."""
    total = hashlib.sha256()
    for name, leaf in sorted(paths.unstack(merge.separate(params)[0]).items()):
        if not name.startswith("head/"):
            total.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
            total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


def _with_parts(folder: Path, held: Mapping[str, Held]) -> dict[str, Held]:
    """`held`, with the ranks of parts that a folder of ours tells."""
    if not (folder / BASE).is_file():
        return dict(held)
    try:
        parts = read_json(folder / BASE).get("parts", {})
        ranks = {module: tuple(map(int, parts[module])) for module in parts.keys() & held.keys()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / BASE} cannot be read: {error!r}") from error
    if wrong := [m for m, own in ranks.items() if len(own) != len(held[m].weights) or min(own) < 0]:
        raise CheckpointError(
            f"{folder / BASE}: {wrong[0]} has {len(held[wrong[0]].weights)} parts."
        )
    return {name: one._replace(ranks=ranks.get(name)) for name, one in held.items()}


def _is_export(source: str) -> bool:
    """True if `source` is a run, whose base is where the run was exported to."""
    return (Path(source).expanduser() / "checkpoints").is_dir()


def _is_base(folder: str | None, model: Adapted, params: paths.Tree) -> bool:
    """True if a folder has the base of an adapted model, but for its heads."""
    if folder is None:
        return False
    base = merge.separate(params)[0]
    how = dict(packings=adapters.packings(model.model), initial=lambda: base)
    try:
        loaded, _ = convert.load(folder, base, may_miss="head/.*", **how)
    except FmjaxError:
        return False
    return digest(loaded) == digest(params)


def _quantised(model: Any) -> dict[str, Any]:
    """The quantization of the base, as JSON; nothing if it is not quantized."""
    adapter = getattr(model, "adapter", None)
    if not isinstance(adapter, quantise.Quantised):
        return {}
    return {"quantise": {"name": adapter.name, "targets": adapter.targets}}


def _check_base(folder: Path, model: Any, params: paths.Tree) -> None:
    """Raise CheckpointError if the base is not the one the adapter was made for; PEFT's own folders
    do not say.

    A whole base that is the right one once it is quantized is accepted.
    """
    if not (folder / BASE).is_file():
        return
    try:
        given = read_json(folder / BASE)
        wanted, how = given["sha256"], given.get("quantise")
        if how and not _quantised(model):
            rules.check({"quantise": how})
            wrapped = quantise.wrap(model, name=how["name"], targets=how["targets"])
            params = _few(paths.unstack(params), adapters.packings(wrapped))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{folder / BASE} cannot be read: {error!r}") from error
    if wanted != (got := digest(params)):
        raise CheckpointError(
            f"{folder} was made for another base: its parameters have the digest "
            f"{quoted(wanted)[:14]}…, those given {got[:12]}…. Outputs would mean nothing."
        )


def _few(named: dict[str, jax.Array], packings: Mapping[str, Any]) -> paths.Tree:
    """The whole parameters as a folder of them is loaded: one matrix after the other."""
    for name, packing in packings.items():
        arrays = packing.pack(named.pop(name))
        named |= {f"{name}/{part}": x for part, x in arrays.items()}
    return paths.unflatten(named)


def _same(name: str, one: np.ndarray, other: Any) -> bool:
    """Equal bits; DoRA's magnitudes, which PEFT keeps with the norms, to rounding."""
    if other is None:
        return False
    if name.endswith("/lora_m"):
        return np.allclose(one, other, rtol=0, atol=1e-5 * max(1.0, float(np.abs(one).max())))
    return np.asarray(other).tobytes() == one.tobytes()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
