"""Prompts and prefixes in PEFT's format: what it puts before a model for a task.

Both are written without the network that makes them, as PEFT does, and read as plain ones.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax.adapters import peft_settings, prefix, prompt
from fmjax.adapters.wrapper import Adapted, base
from fmjax.errors import CheckpointError, ConfigError
from fmjax.params import paths

Tensors = dict[str, np.ndarray]


def plain(model: Adapted, params: paths.Tree) -> tuple[Adapted, paths.Tree]:
    """A prompt or prefix as the network makes it, without the network; others as they are."""
    adapter = model.adapter
    if not (getattr(adapter, "encoder", "") or getattr(adapter, "hidden", 0)):
        return model, params
    prepared = adapter.prepare(params, model.places(params))
    named = {name: jnp.asarray(leaf) for name, leaf in paths.unstack(prepared).items()}
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
    return dataclasses.replace(model, adapter=bare), paths.stack(rest | made, model.stacks)


def write_prompt(model, named, held, heads):
    adapter = model.adapter
    config = _virtual(model, adapter.length, heads)
    if adapter.whole != (there := _whole(config, model)):
        raise ConfigError(
            f"The run has config.adapter.whole={adapter.whole!r}, but in PEFT the head of a "
            f"{config['task_type']} sees the other state: train with {there!r} to write its format."
        )
    return {"prompt_embeddings": named[f"{prompt.TABLE}/prompt_tokens"]}, config


def read_prompt(folder, config, tensors, model, named, held):
    values = _embeddings(folder, tensors, named[f"{prompt.TABLE}/embedding"].shape[1])
    settings = prompt.Prompt(len(values), init="normal", whole=_whole(config, model))
    return settings, {f"{prompt.TABLE}/prompt_tokens": values}


def _whole(config: Mapping[str, Any], model: Any) -> str:
    """The vector whose state comes first for the head of a task, `Prompt.whole`; in a causal model
    the last one stands for all."""
    first = config.get("task_type") == "SEQ_CLS" and not model.causal
    return "prompt" if first else "token"


def write_prefix(model, named, held, heads):
    rows = [named[f"{path}/prefix_values"] for path in _memories(model)]
    values = np.stack(rows).transpose(2, 0, 1, 3)  # (P, L, 2, D)
    flat = values.reshape(len(values), -1)
    _, keys, size = model.sites()[_memories(model)[0]]
    return {"prompt_embeddings": flat}, _virtual(model, model.adapter.length, heads) | {
        "prefix_projection": False,
        "token_dim": keys * size,  # of keys and values, which may have fewer heads than queries
        "num_attention_heads": keys,
    }


def read_prefix(folder, config, tensors, model, named, held):
    made = prefix.wrap(model, length=1)
    sites = {path: made.sites()[path] for path in _memories(made)}
    width = {heads * size for _, heads, size in sites.values()}.pop()
    values = _embeddings(folder, tensors, 2 * len(sites) * width)
    layers = values.reshape(len(values), len(sites), 2, width).transpose(1, 2, 0, 3)
    leaves = {f"{path}/prefix_values": x for path, x in zip(sites, layers, strict=True)}
    return prefix.Prefix(len(values)), leaves


def _virtual(model: Adapted, length: int, heads: list[str]) -> dict[str, Any]:
    if model.decodes:
        raise ConfigError(
            "PEFT puts prompts before an encoder–decoder in a form of its own, which fmjax does "
            "not have: keep the run's folder, or train another adapter."
        )
    cfg, task = base(model).cfg, peft_settings.task(model, heads)
    if task is None:
        raise ConfigError(
            "PEFT puts a prompt before a model for one of its tasks only, and the run has none of "
            f"the heads {', '.join(peft_settings.TASKS)}, nor does it write text."
        )
    return {
        "task_type": task,
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
