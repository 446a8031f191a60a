"""The kinds of adapters that PEFT and fmjax both have: tensors and settings, both ways.

| peft_type | tensors |
|---|---|
| LORA | `<module>.lora_A.weight` (rank, in), `lora_B.weight` (out, rank); of tables `lora_embedding_A` and `_B`; of DoRA `lora_magnitude_vector` |
| IA3 | `<module>.ia3_l`: (out, 1), or (1, in) where the input is scaled |
| PROMPT_TUNING, P_TUNING | `prompt_embeddings` (length, width): of P-tuning what its network gives |
| PREFIX_TUNING | `prompt_embeddings` (length, layers · 2 · width): keys and values by layer |

`<module>` is the name in transformers. Prompts and prefixes are written without the network that
makes them, as PEFT does, and read as plain ones.
"""  # noqa: E501  a row of a table is one line

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import rules, trees
from fmjax.adapters import ia3, lora, prefix, prompt, quantise
from fmjax.adapters.wrapper import Adapted, base
from fmjax.errors import CheckpointError, ConfigError, quoted

Named = Mapping[str, Any]  # our parameters by name
Tensors = dict[str, np.ndarray]
# What changes outputs and fmjax does not have, with the values that mean "not used".
UNUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "num_transformer_submodules": (1, None),
}
DEFAULTS: dict[str, Any] = {
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}
OTHER_BASES = r"pissa.*|olora|corda|loftq"  # initialisations that change the base they start from
TASKS = dict(classify="SEQ_CLS", regress="SEQ_CLS", tag="TOKEN_CLS", span="QUESTION_ANS")


class Format(NamedTuple):
    """How one kind of adapter is kept."""

    before: str  # what PEFT writes before the name of a module
    # (model, parameters, {adapted path: module in transformers}, heads) -> (tensors, config)
    write: Callable[[Adapted, Named, Mapping[str, str], list[str]], tuple[Tensors, dict[str, Any]]]
    # (folder, config, tensors, model, parameters, {module: our weight}) -> (settings, leaves)
    read: Callable[..., tuple[Any, Tensors]]


def of(model: Adapted) -> str:
    """The peft_type of an adapter. Raises ConfigError for one that PEFT does not have."""
    kinds = {lora.Lora: "LORA", ia3.Ia3: "IA3", prefix.Prefix: "PREFIX_TUNING"}
    if isinstance(model.adapter, prompt.Prompt):
        return "P_TUNING" if model.adapter.encoder else "PROMPT_TUNING"
    if type(model.adapter) not in kinds:
        raise ConfigError(
            f"PEFT has no adapters of the kind {type(model.adapter).__name__}: keep the run's own."
        )
    return kinds[type(model.adapter)]


def plain(model: Adapted, params: trees.Tree) -> tuple[Adapted, trees.Tree]:
    """A prompt or prefix as the network makes it, without the network; others as they are."""
    adapter = model.adapter
    if not (getattr(adapter, "encoder", "") or getattr(adapter, "hidden", 0)):
        return model, params
    prepared = adapter.prepare(params, model.places(params))
    named = {name: jnp.asarray(leaf) for name, leaf in trees.unstack(prepared).items()}
    made: dict[str, jax.Array] = {}
    if isinstance(adapter, prompt.Prompt):
        leaf = lambda name: named[f"{prompt.TABLE}/{name}"]
        made[f"{prompt.TABLE}/prompt_tokens"] = adapter.vectors(leaf)
        bare = dataclasses.replace(adapter, encoder="")
    else:
        for path in _memories(model):
            leaf = lambda name, path=path: named[f"{path}/{name}"]
            made[f"{path}/prefix_values"] = adapter.values(leaf)
        bare = dataclasses.replace(adapter, hidden=0)
    rest = {name: x for name, x in named.items() if not re.search(r"/(prompt|prefix)_\w+$", name)}
    return dataclasses.replace(model, adapter=bare), trees.stack(rest | made, model.stacks)


# --- LoRA ---


def _write_lora(model, named, modules, heads):
    adapter, sites, tensors = model.adapter, model.sites(), {}
    for path, module in modules.items():
        table = sites[path].weight == "embedding"
        ends = ("embedding_A", "embedding_B") if table else ("A.weight", "B.weight")
        for end, leaf in zip(ends, ("lora_a", "lora_b"), strict=True):
            tensors[f"{module}.lora_{end}"] = named[f"{path}/{leaf}"].T
        if adapter.dora:
            norms = np.linalg.norm(quantise.matrix(named, f"{path}/{sites[path].weight}"), axis=0)
            tensors[f"{module}.lora_magnitude_vector"] = norms + named[f"{path}/lora_m"]
    # Of all modules the commonest rank and alpha, and the exceptions.
    ranks = {module: sites[path].rank for path, module in modules.items()}
    alphas = {module: adapter.target(path).alpha for path, module in modules.items()}
    commonest = lambda found: max(found.values(), key=list(found.values()).count)
    rank, alpha = commonest(ranks), commonest(alphas)
    return tensors, {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(modules.values()),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _read_lora(folder, config, tensors, model, named, ours):
    settings = _lora_settings(folder, config)
    found: dict[str, Tensors] = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(.*)\.(lora_\w+)(\.weight)?", key)
        found.setdefault(_module(folder, key, match, ours), {})[match[2]] = value
    targets, leaves = [], {}
    wanted = {"lora_a", "lora_b"} | ({"lora_m"} if settings["use_dora"] else set())
    for module, parts in found.items():
        weight, path = ours[module], ours[module].rpartition("/")[0]
        fresh = _lora_leaves(weight, quantise.matrix(named, weight), parts)
        if fresh.keys() != wanted:
            raise CheckpointError(f"{folder}: {module} has {sorted(parts)}, not one of each kind.")
        rank, alpha = fresh["lora_b"].shape[0], float(_alpha(settings, module))
        targets.append(lora.Target(re.escape(path), rank, alpha))
        leaves |= {f"{path}/{name}": leaf for name, leaf in fresh.items()}
    how = settings["lora_dropout"], settings["use_rslora"], settings["use_dora"]
    return lora.Lora(tuple(targets), *how), leaves


def _lora_leaves(name, weight, tensors):
    """The inverse of `_write_lora` for the weight `name`."""
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


def _lora_settings(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of adapter_config.json with their defaults, checked."""
    if re.fullmatch(OTHER_BASES, str(given.get("init_lora_weights", True))):
        raise ConfigError(
            f"{folder}: init_lora_weights={given['init_lora_weights']!r} changes the base, which "
            "the folder does not hold: have PEFT convert it to plain LoRA."
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


def _write_ia3(model, named, modules, heads):
    sides = {module: model.sites()[path][0] for path, module in modules.items()}
    tensors = {}
    for path, module in modules.items():
        shape = (1, -1) if sides[module] == "input" else (-1, 1)
        tensors[f"{module}.ia3_l"] = named[f"{path}/ia3_scale"].reshape(shape)
    return tensors, {
        "target_modules": sorted(sides),
        "feedforward_modules": sorted(m for m, side in sides.items() if side == "input"),
        "fan_in_fan_out": False,
    }


def _read_ia3(folder, config, tensors, model, named, ours):
    targets, leaves = [], {}
    for key, value in tensors.items():
        module = _module(folder, key, re.fullmatch(r"(.*)\.ia3_l", key), ours)
        weight, path = ours[module], ours[module].rpartition("/")[0]
        side = "input" if value.shape[0] == 1 else "output"
        scale = value.reshape(-1).astype(np.float32)
        if (width := quantise.matrix(named, weight).shape[ia3.SIDES.index(side)]) != len(scale):
            raise CheckpointError(
                f"{folder}: {module} has {len(scale)} {side}s there, {width} in the model: the "
                "adapter was made for a model of another size."
            )
        targets.append((re.escape(path), side))
        leaves[f"{path}/ia3_scale"] = scale
    return ia3.Ia3(tuple(targets)), leaves


# --- prompts and prefixes ---


def _write_prompt(model, named, modules, heads):
    adapter = model.adapter
    config = _virtual(model, adapter.length, heads)
    if adapter.whole != (there := _whole(config)):
        raise ConfigError(
            f"The run has config.adapter.whole={adapter.whole!r}, but in PEFT the head of a "
            f"{config['task_type']} sees the other state: train with {there!r} to write its format."
        )
    return {"prompt_embeddings": named[f"{prompt.TABLE}/prompt_tokens"]}, config


def _read_prompt(folder, config, tensors, model, named, ours):
    values = _embeddings(folder, tensors, named[f"{prompt.TABLE}/embedding"].shape[1])
    settings = prompt.Prompt(len(values), init="normal", whole=_whole(config))
    return settings, {f"{prompt.TABLE}/prompt_tokens": values}


def _whole(config: Mapping[str, Any]) -> str:
    """Whose state stands first for the head of a task: `Prompt.whole`."""
    return "prompt" if config.get("task_type") == "SEQ_CLS" else "token"


def _write_prefix(model, named, modules, heads):
    rows = [named[f"{path}/prefix_values"] for path in _memories(model)]
    values = np.stack(rows).transpose(2, 0, 1, 3)  # (P, L, 2, D)
    flat = values.reshape(len(values), -1)
    return {"prompt_embeddings": flat}, _virtual(model, model.adapter.length, heads) | {
        "prefix_projection": False
    }


def _read_prefix(folder, config, tensors, model, named, ours):
    made = prefix.wrap(model, length=1)
    sites = {path: made.sites()[path] for path in _memories(made)}
    width = {heads * size for _, heads, size in sites.values()}.pop()
    values = _embeddings(folder, tensors, 2 * len(sites) * width)
    layers = values.reshape(len(values), len(sites), 2, width).transpose(1, 2, 0, 3)
    leaves = {f"{path}/prefix_values": x for path, x in zip(sites, layers, strict=True)}
    return prefix.Prefix(len(values)), leaves


def _virtual(model: Adapted, length: int, heads: list[str]) -> dict[str, Any]:
    cfg = base(model).cfg
    if not (tasks := {TASKS[head] for head in heads if head in TASKS}):
        raise ConfigError(
            "PEFT puts a prompt before a model for one of its tasks only, and the run has none of "
            f"the heads {', '.join(TASKS)}."
        )
    return {
        "task_type": tasks.pop(),
        "num_virtual_tokens": length,
        "token_dim": cfg.width,
        "num_transformer_submodules": 1,
        "num_attention_heads": cfg.heads,
        "num_layers": cfg.depth,
    }


def _embeddings(folder: Path, tensors: Tensors, width: int) -> np.ndarray:
    values = tensors.pop("prompt_embeddings", None)
    if values is None or tensors:
        raise CheckpointError(f"{folder} is no prompt: it has {sorted(tensors)[:3]}.")
    if values.ndim != 2 or values.shape[1] != width:
        raise CheckpointError(
            f"{folder}: its vectors are {values.shape}, those of the model {width} wide: they were "
            "made for a model of another size."
        )
    return values.astype(np.float32)


def _memories(model: Adapted) -> list[str]:
    """Paths of the attentions that have a prefix, in the order of the layers."""
    return sorted(path for path, (kind, *_) in model.sites().items() if kind == "layer")


def _module(folder: Path, key: str, match: re.Match | None, ours: Mapping[str, str]) -> str:
    """The module in transformers that a tensor belongs to."""
    if match is None or match[1] not in ours:
        raise CheckpointError(
            f"{folder}: the model has no place for {quoted(key)}: the adapter is for another model."
        )
    return match[1]


MODULE = "base_model.model."
FORMATS = {
    "LORA": Format(MODULE, _write_lora, _read_lora),
    "IA3": Format(MODULE, _write_ia3, _read_ia3),
    "PROMPT_TUNING": Format("base_model.", _write_prompt, _read_prompt),
    "P_TUNING": Format("base_model.", _write_prompt, _read_prompt),
    "PREFIX_TUNING": Format("base_model.", _write_prefix, _read_prefix),
}
