"""LoRA and IA³ in PEFT's format.

GPT-2 holds queries, keys and values in one matrix, W = [Q, K, V] along the outputs, beside which
PEFT has one pair A, B, and we one for each part:

    x [A₁ B₁, 0, A₃ B₃]  =  x [A₁, A₃] [[B₁, 0, 0], [0, 0, B₃]]       written: the sum of the ranks
    x A [B₁, B₂, B₃]     =  [x A B₁, x A B₂, x A B₃]                  read: each has a copy of A

Both are exact. What we have written, and nobody has trained since, is taken apart again.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax.adapters import ia3, lora, quantise
from fmjax.config import rules
from fmjax.errors import CheckpointError, ConfigError, quoted

Tensors = dict[str, np.ndarray]
DEFAULTS: dict[str, Any] = {
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}
# Initialisations that leave the base as it is; others take what they start with out of it.
SAME_BASE = ("true", "false", "gaussian", "eva", "orthogonal", "mica")


class Held(NamedTuple):
    """Parameters of one module of transformers."""

    weights: tuple[str, ...]  # our parameters, beside each other along the outputs; mostly one
    conv: bool  # whether it is a Conv1D, which keeps (in, out)
    ranks: tuple[int, ...] | None = None  # where we wrote its adapter: of each part, 0 for none

    @property
    def paths(self) -> list[str]:
        return [weight.rpartition("/")[0] for weight in self.weights]


def adapted(model: Any, held: Mapping[str, Held]) -> dict[str, Held]:
    """Those that the model's adapter stands beside, with the ranks of the parts."""
    sites = model.sites()
    rank = lambda path: getattr(sites[path], "rank", 1) if path in sites else 0
    found = {name: one._replace(ranks=tuple(map(rank, one.paths))) for name, one in held.items()}
    return {name: one for name, one in found.items() if any(one.ranks)}


# --- LoRA ---


def write_lora(model, named, held, heads):
    adapter, tensors, ranks, alphas = model.adapter, {}, {}, {}
    for module, one in held.items():
        table = one.weights[0].endswith("/embedding")
        ends = ("embedding_A", "embedding_B") if table else ("A.weight", "B.weight")
        own = [path for path, rank in zip(one.paths, one.ranks, strict=True) if rank]
        a = np.concatenate([named[f"{path}/lora_a"] for path in own], 1)
        tensors[f"{module}.lora_{ends[0]}"] = a.T
        tensors[f"{module}.lora_{ends[1]}"] = _diagonal(one, named).T
        if adapter.dora:
            tensors[f"{module}.lora_magnitude_vector"] = np.concatenate(
                [_norms(named, weight) + named.get(f"{path}/lora_m", 0)
                 for weight, path in zip(one.weights, one.paths, strict=True)]
            )  # fmt: skip
        ranks[module] = sum(one.ranks)
        alphas[module] = _one_alpha(model, module, own, ranks[module])
    # Of all modules the commonest rank and alpha, and the exceptions.
    commonest = lambda found: max(found.values(), key=list(found.values()).count)
    rank, alpha = commonest(ranks), commonest(alphas)
    return tensors, {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(held),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "bias": "none",
        "fan_in_fan_out": any(one.conv for one in held.values()),
    }


def _diagonal(one: Held, named: Mapping[str, Any]) -> np.ndarray:
    """(sum of the ranks, outputs): the B of each part in rows and columns of its own."""
    shapes = [quantise.matrix(named, weight).shape for weight in one.weights]
    whole = np.zeros((sum(one.ranks), sum(shape[-1] for shape in shapes)), np.float32)
    for path, rows, columns in zip(one.paths, *_blocks(one.ranks, shapes), strict=True):
        if rows.start < rows.stop:
            whole[rows, columns] = named[f"{path}/lora_b"]
    return whole


def _blocks(
    ranks: Sequence[int], shapes: Sequence[tuple[int, ...]]
) -> tuple[list[slice], list[slice]]:
    """(rows, columns) of each part's B in that of the whole."""
    cut = lambda sizes: [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    return cut(ranks), cut([shape[-1] for shape in shapes])


def _norms(named: Mapping[str, Any], weight: str) -> np.ndarray:
    return np.linalg.norm(quantise.matrix(named, weight), axis=0)


def _one_alpha(model: Any, module: str, paths: Sequence[str], rank: int) -> float:
    """The alpha that gives the whole, of rank `rank`, the scale of its parts."""
    sites = model.sites()
    scales = {path: sites[path].scale for path in paths}
    if len(set(scales.values())) > 1:
        raise ConfigError(
            f"PEFT has one adapter with one scale beside {module}, but the run has several there: "
            f"{scales} (alpha over the rank). Give them one rank in config.adapter.targets, or "
            "leave config.merge at True."
        )
    more = rank / sites[paths[0]].rank
    target = model.adapter.target(paths[0])
    return target.alpha * (math.sqrt(more) if model.adapter.rslora else more)


def read_lora(folder, config, tensors, model, named, held):
    settings = _lora_settings(folder, config)
    found: dict[str, Tensors] = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(.*)\.(lora_\w+)(\.weight)?", key)
        found.setdefault(_module(folder, key, match, held), {})[match[2]] = value
    targets, leaves = [], {}
    wanted = {"lora_a", "lora_b"} | ({"lora_m"} if settings["use_dora"] else set())
    for module, parts in found.items():
        whole = _lora_leaves(held[module], named, parts)
        if whole.keys() != wanted:
            raise CheckpointError(f"{folder}: {module} has {sorted(parts)}, not one of each kind.")
        rank, alpha = len(whole["lora_b"]), float(_alpha(settings, module))
        for path, own in _apart(held[module], named, whole).items():
            less = len(own["lora_b"]) / rank
            less = math.sqrt(less) if settings["use_rslora"] else less
            targets.append(lora.Target(re.escape(path), len(own["lora_b"]), alpha * less))
            leaves |= {f"{path}/{name}": leaf for name, leaf in own.items()}
    how = settings["lora_dropout"], settings["use_rslora"], settings["use_dora"]
    return lora.Lora(tuple(targets), *how), leaves


def _lora_leaves(held: Held, named: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The leaves of the whole matrix, with magnitudes as they are: the inverse of `write_lora`."""
    name = held.weights[0]
    shapes = [quantise.matrix(named, weight).shape for weight in held.weights]
    shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    kind = "lora_embedding_" if name.endswith("/embedding") else "lora_"
    leaves = {}
    if f"{kind}A" in tensors and f"{kind}B" in tensors:
        a, b = tensors[f"{kind}A"].T, tensors[f"{kind}B"].T
        if (*a.shape[:1], *b.shape[1:]) != shape or a.shape[1:] != b.shape[:1]:
            raise CheckpointError(
                f"{name} is {shape}, its adapter {a.shape} times {b.shape}: the adapter was "
                "made for a model of another size."
            )
        leaves = {"lora_a": a.astype(np.float32), "lora_b": b.astype(np.float32)}
    if "lora_magnitude_vector" in tensors:
        norms = np.concatenate([_norms(named, weight) for weight in held.weights])
        leaves["lora_m"] = tensors["lora_magnitude_vector"].reshape(-1).astype(np.float32) - norms
    return leaves


def _apart(held: Held, named: Mapping[str, Any], whole: Tensors) -> dict[str, Tensors]:
    """{path of a part: its leaves}, of the whole matrix's."""
    shapes = [quantise.matrix(named, weight).shape for weight in held.weights]
    a, b = whole["lora_a"], whole["lora_b"]
    ranks = held.ranks or ()
    rows, columns = _blocks(ranks, shapes)
    ours = sum(ranks) == len(b)
    if ours:
        inside = np.zeros(b.shape, bool)
        for one, other in zip(rows, columns, strict=True):
            inside[one, other] = True
        ours = not b[~inside].any()
    found = {}
    for i, path in enumerate(held.paths):
        own = rows[i] if ours else slice(None)
        if len(b[own]):
            found[path] = {"lora_a": a[:, own], "lora_b": b[own, columns[i]]}
            found[path] |= {"lora_m": whole["lora_m"][columns[i]]} if "lora_m" in whole else {}
    return found


def _lora_settings(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of adapter_config.json with their defaults, checked."""
    initial = given.get("init_lora_weights")
    if initial is not None and str(initial).lower() not in SAME_BASE:
        raise ConfigError(
            f"{folder}: init_lora_weights={quoted(initial)} changes the base, which the folder "
            "does not hold, or is not known: have PEFT convert it to plain LoRA "
            "(path_initial_model_for_weight_conversion)."
        )
    config = {key: given.get(key, default) for key, default in DEFAULTS.items()}
    for key, default in DEFAULTS.items():
        if isinstance(default, float | dict) and config[key] is None:
            config[key] = default
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(config[key], kinds):
            raise ConfigError(f"{folder}: {key}={quoted(config[key])} is not understood.")
    for pattern, alpha in config["alpha_pattern"].items():
        if not (rules.is_regex(pattern) and isinstance(alpha, int | float)):
            raise ConfigError(f"{folder}: alpha_pattern has {quoted((pattern, alpha))}.")
    return config


def _alpha(config: Mapping[str, Any], module: str) -> float:
    """As PEFT finds it: the first expression that matches a whole end of the module's name."""
    for pattern, alpha in config["alpha_pattern"].items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return alpha
    return config["lora_alpha"]


# --- IA³ ---


def write_ia3(model, named, held, heads):
    tensors, inputs = {}, []
    for module, one in held.items():
        sides = {model.sites()[path][0] for path in one.paths if path in model.sites()}
        scales = [named.get(f"{path}/ia3_scale") for path in one.paths]
        if sides == {"output"}:
            ones = [np.ones(quantise.matrix(named, w).shape[1], np.float32) for w in one.weights]
            pairs = zip(scales, ones, strict=True)
            scale = np.concatenate([other if own is None else own for own, other in pairs])
            tensors[f"{module}.ia3_l"] = scale.reshape(-1, 1)
        elif len(scales) == 1:
            inputs.append(module)
            tensors[f"{module}.ia3_l"] = scales[0].reshape(1, -1)
        else:
            raise ConfigError(
                f"PEFT scales the input of all of {module}, which holds {', '.join(one.paths)}: "
                "scale their outputs (config.adapter.targets), or keep the run's folder."
            )
    return tensors, {
        "target_modules": sorted(held),
        "feedforward_modules": sorted(inputs),
        "fan_in_fan_out": any(one.conv for one in held.values()),
    }


def read_ia3(folder, config, tensors, model, named, held):
    targets, leaves = [], {}
    for key, value in tensors.items():
        one = held[_module(folder, key, re.fullmatch(r"(.*)\.ia3_l", key), held)]
        side = "input" if value.shape[0] == 1 else "output"
        scale = value.reshape(-1).astype(np.float32)
        shapes = [quantise.matrix(named, weight).shape for weight in one.weights]
        columns = _blocks((), shapes)[1]
        width = shapes[0][0] if side == "input" else columns[-1].stop
        if width != len(scale):
            raise CheckpointError(
                f"{folder}: {one.weights[0]} has {len(scale)} {side}s there, {width} in the model: "
                "the adapter was made for a model of another size."
            )
        for path, rank, own in zip(one.paths, one.ranks or one.paths, columns, strict=True):
            if rank:
                targets.append((re.escape(path), side))
                leaves[f"{path}/ia3_scale"] = scale if side == "input" else scale[own]
    return ia3.Ia3(tuple(targets)), leaves


def _module(folder: Path, key: str, match: re.Match | None, held: Mapping[str, Held]) -> str:
    """The module in transformers that a tensor belongs to."""
    if match is None or match[1] not in held:
        raise CheckpointError(
            f"{folder}: the model has no place for {quoted(key)}: the adapter is for another "
            "model, or for a module that fmjax does not adapt."
        )
    return match[1]
