"""From a config to the things that tasks share: devices, model, initial parameters."""

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from fmjax import checkpoint, convert, sharding, state
from fmjax.errors import ConfigError


def cache_dir() -> Path:
    """$FMJAX_CACHE, else ~/.cache/fmjax: tokenised data and compiled programs, shared by runs."""
    return Path(os.environ.get("FMJAX_CACHE") or Path.home() / ".cache" / "fmjax")


def start_jax(config: Any) -> jax.sharding.Mesh:
    """Joins the other processes if the config says so, turns on the compilation cache, makes the mesh."""
    distributed = config.distributed
    if distributed.auto:
        jax.distributed.initialize()
    elif distributed.num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            distributed.coordinator, distributed.num_processes, distributed.process_id
        )
    folder = cache_dir() / "xla"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return sharding.make_mesh(**config.mesh)


def model(config: Any, vocab_size: int) -> nn.Module:
    """The model of a config, sized for a vocabulary.

    `config.model.vocab_size = 0` takes the tokenizer's size; a larger one leaves unused rows. Raises ConfigError where
    vocabulary or sequence length do not fit the model.
    """
    fields = config.model.to_dict()
    name, wanted = fields.pop("name"), fields.pop("vocab_size")
    if 0 < wanted < vocab_size:
        raise ConfigError(
            f"config.model.vocab_size={wanted} is smaller than the tokenizer's {vocab_size}: its ids would have no row. "
            f"Set it to 0 (the tokenizer's size) or at least {vocab_size}."
        )
    built = importlib.import_module(f"fmjax.models.{name}").Model(
        **fields, vocab_size=wanted or vocab_size, dtype=config.precision
    )
    if config.data.seq_len > built.cfg.max_len:
        raise ConfigError(
            f"config.data.seq_len={config.data.seq_len} is longer than the {built.cfg.max_len} positions of "
            f"config.model.name={name!r}: lower it or raise config.model.max_len."
        )
    return built


def apply(model: nn.Module) -> Callable:
    """`apply(params, *arrays, method=…)`, what objectives call."""

    def applied(params, *args, method):
        return model.apply({"params": params}, *args, method=method)

    return applied


def initial(config: Any, model: nn.Module, abstract: Any) -> Any:
    """Parameters to start from: None (fresh) unless `config.init` names a run folder, a folder in Hugging Face format
    or a hub id (`id@revision`). Heads that the source does not have start fresh, and are named."""
    if not config.init:
        return None
    folder = Path(config.init)
    if (folder / "checkpoints").is_dir():
        params, saved = checkpoint.load_params(folder, abstract=abstract)
        print(f"starting from step {saved['step']} of {folder}")
        return params
    fresh = functools.partial(state.init_params, model, jax.random.key(config.seed))
    params, report = convert.load(
        convert.find(config.init), abstract, may_miss=r"head/.*", initial=fresh
    )
    print(f"starting from {config.init}: {report}")
    return params


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s that the vendor states for a device, None where unknown (CPUs)."""
    kinds = {
        "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
        "v4": 275e12, "v5 lite": 197e12, "v5e": 197e12, "v5p": 459e12, "v6 lite": 918e12,
    }  # fmt: skip
    return next((peak for kind, peak in kinds.items() if kind in device.device_kind), None)


