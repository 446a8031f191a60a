"""Adapters in the format of Hugging Face's PEFT, both ways, without torch.

    peft.write("out", model, params)                   # an adapted model and its parameters
    model, params = peft.read("out", model, params)    # a base model and its parameters

PEFT keeps the transposes: `base_model.model.<module>.lora_A.weight` is (rank, in), `lora_B.weight`
(out, rank); of tables `lora_embedding_A` and `lora_embedding_B`; of DoRA `lora_magnitude_vector`.
`<module>` is the name in transformers (the tables of `fmjax.convert`). A key that PEFT has no place
for it leaves out in silence, and an adapter on another base gives numbers that mean nothing, so we
read back what we write, and beside it lies `BASE`, a digest of the base's parameters.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fmjax import rules, trees
from fmjax.adapters import lora, merge, quantise
from fmjax.adapters.wrapper import Adapted, base
from fmjax.convert.files import Place
from fmjax.convert.writer import family_of
from fmjax.errors import CheckpointError, ConfigError, quoted
from fmjax.snapshot import find, read_json

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."
# What changes outputs and fmjax does not have, with the value that means "not used".
UNUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}
DEFAULTS: dict[str, Any] = {
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}
OTHER_BASES = r"pissa.*|olora|corda|loftq"  # initialisations that change the base they start from


def write(folder: str | Path, model: Adapted, params: trees.Tree, *, heads: str = "") -> None:
    """Writes the adapter, and the heads `head/<name>` whose name matches `heads`, to a new folder.

    Raises ConfigError for what PEFT has no place for, CheckpointError if it reads back otherwise.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; write to a new folder.")
    named = {name: np.asarray(leaf) for name, leaf in trees.unstack(params).items()}
    weights = [f"{path}/{site.weight}" for path, site in model.sites().items()]
    places = _places(model, [*named, *weights])
    modules, saved, tensors = {}, set(), {}
    for path, site in model.sites().items():
        weight = f"{path}/{site.weight}"
        if weight not in places:
            raise ConfigError(f"PEFT has no place for an adapter of {path}: no matrix of its own.")
        module = modules[path] = places[weight].key.rpartition(".")[0]
        for key, value in _to_peft(site, path, named).items():
            tensors[f"{PREFIX}{module}.{key}"] = value
    saving = [name for name in named if re.fullmatch(f"head/({heads})/.*", name)]
    if lost := [name for name in saving if name not in places]:
        raise ConfigError(f"transformers has no place for {lost[0]}, which the adapter needs.")
    for name in saving:
        place = places[name]
        saved.add(place.key.rpartition(".")[0])
        tensors[PREFIX + place.key] = named[name].T if place.transposed else named[name]
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / BASE, {"sha256": digest(params)} | _quantised(model.model))
    # Last, so that a folder that can be opened is complete.
    _write_json(folder / CONFIG, _config(model, modules, sorted(saved)))

    again = trees.unstack(read(folder, model.model, merge.separate(params)[0])[1])
    if wrong := [name for name in named if not _same(name, named[name], again.get(name))]:
        raise CheckpointError(
            f"{folder} was written, but reads back differently: {', '.join(wrong[:5])}. Do not use "
            "it; write to another folder, on another disk if it happens again."
        )


def read(folder: str | Path, model: Any, params: trees.Tree) -> tuple[Adapted, trees.Tree]:
    """(`model`, adapted as the folder says; its parameters on the base `params`).

    Heads that the folder holds replace those of `params`. A model that is stacked is stacked anew,
    since its layers may have become of several kinds.

    Raises ConfigError for an adapter of another kind and CheckpointError for one that does not fit,
    was made for another base, or is damaged.
    """
    folder = find(folder, files=(CONFIG, WEIGHTS, BASE))
    config, named = _read_config(folder), trees.unstack(params)
    _check_base(folder, model, params)
    heads, found = _read_tensors(folder, model, named)
    adapters, targets = {}, []
    for weight, (module, leaves) in found.items():
        path = weight.rpartition("/")[0]
        fresh = _from_peft(weight, quantise.matrix(named, weight), leaves)
        wanted = {"lora_a", "lora_b"} | ({"lora_m"} if config["use_dora"] else set())
        if fresh.keys() != wanted:
            raise CheckpointError(f"{folder}: {module} has {sorted(leaves)}, not one of each kind.")
        pattern, rank = re.escape(path), fresh["lora_b"].shape[0]
        targets.append(lora.Target(pattern, rank, float(_alpha(config, module))))
        adapters |= {f"{path}/{name}": leaf for name, leaf in fresh.items()}
    settings = lora.Lora(
        tuple(targets), config["lora_dropout"], config["use_rslora"], config["use_dora"]
    )
    adapted = Adapted(model, settings)
    stacks = None if model.stacks is None else trees.runs(adapted.kinds)
    named = {name: jnp.asarray(leaf) for name, leaf in (named | heads | adapters).items()}
    return adapted.clone(stacks=stacks), trees.stack(named, stacks)


def digest(params: trees.Tree) -> str:
    """SHA-256 over names, shapes and bytes of all parameters but adapters' and heads'."""
    total = hashlib.sha256()
    for name, leaf in sorted(trees.unstack(merge.separate(params)[0]).items()):
        if not name.startswith("head/"):
            total.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
            total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


def _places(model: Any, names: Iterable[str]) -> dict[str, Place]:
    """{our parameter: where transformers keeps it}, but for those that share a matrix."""
    family = family_of(base(model))
    kind = family.type_of(model.cfg)
    places = {name: family.place(kind, name) for name in names}
    return {name: place for name, place in places.items() if place and place.parts == 1}


def _to_peft(site: lora.Site, path: str, named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    a, b = named[f"{path}/lora_a"], named[f"{path}/lora_b"]
    table = site.weight == "embedding"
    keys = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
    tensors = {keys[0]: a.T, keys[1]: b.T}
    if f"{path}/lora_m" in named:
        norms = np.linalg.norm(quantise.matrix(named, f"{path}/{site.weight}"), axis=0)
        tensors["lora_magnitude_vector"] = norms + named[f"{path}/lora_m"]
    return tensors


def _from_peft(
    name: str, weight: jax.Array, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The inverse of `_to_peft` for the weight `name`."""
    kind = "lora_embedding_" if name.endswith("/embedding") else "lora_"
    leaves = {}
    if f"{kind}A" in tensors and f"{kind}B" in tensors:
        a, b = tensors[f"{kind}A"].T, tensors[f"{kind}B"].T
        if (*a.shape[:1], *b.shape[1:]) != weight.shape or a.shape[1:] != b.shape[:1]:
            raise CheckpointError(
                f"{name} is {weight.shape}, its adapter {a.shape} times {b.shape}: the adapter was "
                "made for a model of another size."
            )
        leaves = {"lora_a": a.astype(np.float32), "lora_b": b.astype(np.float32)}
    if "lora_magnitude_vector" in tensors:
        norms = np.linalg.norm(weight, axis=0)
        leaves["lora_m"] = tensors["lora_magnitude_vector"].reshape(-1).astype(np.float32) - norms
    return leaves


def _read_tensors(
    folder: Path, model: Any, named: Mapping[str, jax.Array]
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, dict[str, np.ndarray]]]]:
    """(heads, {our weight: (module in transformers, {PEFT's name: tensor})})."""
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    names = [name.rpartition("/")[0] if name.endswith("/codes") else name for name in named]
    ours = {place.key: (name, place.transposed) for name, place in _places(model, names).items()}
    heads: dict[str, np.ndarray] = {}
    found: dict[str, tuple[str, dict[str, np.ndarray]]] = {}
    for key, value in tensors.items():
        bare = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.*)\.(lora_\w+)(\.weight)?", bare)
        name, transposed = ours.get(f"{match[1]}.weight" if match else bare, ("", False))
        value = value.T if transposed and not match else value
        if name and match and bare != key:
            found.setdefault(name, (match[1], {}))[1][match[2]] = value
        elif name.startswith("head/") and bare != key and value.shape == named[name].shape:
            heads[name] = value.astype(np.float32)
        else:
            raise CheckpointError(
                f"{folder}: the model has no place for {quoted(key)} {value.shape}: the adapter is "
                f"for another model, or not of PEFT, whose keys begin with {PREFIX!r}."
            )
    if not found:
        raise CheckpointError(f"{folder / WEIGHTS} holds no adapter.")
    return heads, found


def _config(model: Adapted, modules: Mapping[str, str], saved: list[str]) -> dict[str, Any]:
    """adapter_config.json: of all modules the commonest rank and alpha, and the exceptions."""
    lora_, sites = model.adapter, model.sites()
    ranks = {module: sites[path].rank for path, module in modules.items()}
    alphas = {module: lora_.target(path).alpha for path, module in modules.items()}
    commonest = lambda found: max(found.values(), key=list(found.values()).count)
    rank, alpha = commonest(ranks), commonest(alphas)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": lora_.dropout,
        "target_modules": sorted(modules.values()),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "use_rslora": lora_.rslora,
        "use_dora": lora_.dora,
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json with its defaults, checked."""
    try:
        given = read_json(folder / CONFIG)
        kind = given.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / CONFIG} cannot be read: {error!r}") from error
    if kind != "LORA":
        raise ConfigError(f"{folder / CONFIG} has peft_type={quoted(kind)}; fmjax reads 'LORA'.")
    for key, possible in UNUSED.items():
        if given.get(key, possible[0]) not in possible:
            raise ConfigError(f"{folder / CONFIG}: {key}={quoted(given[key])} is not supported.")
    if re.fullmatch(OTHER_BASES, str(given.get("init_lora_weights", True))):
        raise ConfigError(
            f"{folder / CONFIG}: init_lora_weights={given['init_lora_weights']!r} changes the "
            "base, which the folder does not hold: have PEFT convert it to plain LoRA."
        )
    config = {key: given.get(key, default) for key, default in DEFAULTS.items()}
    for key, default in DEFAULTS.items():
        if isinstance(default, float | dict) and config[key] is None:
            config[key] = default
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(config[key], kinds):
            raise ConfigError(f"{folder / CONFIG}: {key}={quoted(config[key])} is not understood.")
    for pattern, alpha in config["alpha_pattern"].items():
        if not (rules.is_regex(pattern) and isinstance(alpha, int | float)):
            raise ConfigError(f"{folder / CONFIG}: alpha_pattern has {quoted((pattern, alpha))}.")
    return config


def _alpha(config: Mapping[str, Any], module: str) -> float:
    """As PEFT finds it: the first expression that matches a whole end of the module's name."""
    for pattern, alpha in config["alpha_pattern"].items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return alpha
    return config["lora_alpha"]


def _quantised(model: Any) -> dict[str, Any]:
    """How the base is quantised, as JSON; nothing if it is not."""
    adapter = getattr(model, "adapter", None)
    if not isinstance(adapter, quantise.Quantised):
        return {}
    return {"quantise": {"name": adapter.name, "targets": adapter.targets}}


def _check_base(folder: Path, model: Any, params: trees.Tree) -> None:
    """Refuses another base than the adapter was made for; PEFT's own folders do not say.

    A whole base that is the right one once it is quantised is accepted.
    """
    if not (folder / BASE).is_file():
        return
    try:
        given = read_json(folder / BASE)
        wanted, how = given["sha256"], given.get("quantise")
        if how and not _quantised(model):
            rules.check({"quantise": how})
            wrapped = quantise.wrap(model, name=how["name"], targets=how["targets"])
            params = wrapped.add(params, jax.random.key(0))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{folder / BASE} cannot be read: {error!r}") from error
    if wanted != (got := digest(params)):
        raise CheckpointError(
            f"{folder} was made for another base: its parameters have the digest "
            f"{quoted(wanted)[:14]}…, those given {got[:12]}…. Outputs would mean nothing."
        )


def _same(name: str, one: np.ndarray, other: Any) -> bool:
    """Equal bits; DoRA's magnitudes, which PEFT keeps with the norms, to rounding."""
    if other is None:
        return False
    if name.endswith("/lora_m"):
        return np.allclose(one, other, rtol=0, atol=1e-5 * max(1.0, float(np.abs(one).max())))
    return np.asarray(other).tobytes() == one.tobytes()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
