"""The frozen prefix of a model, computed once an example: `config.cache_prefix`.

Where the embeddings and the first layers are frozen and nothing in them is random, their output is
a function of the example alone. It is computed once for each, kept in a memory-mapped file under a
key of weights, data and layer, and training starts after it: the last k layers cost what k layers
cost. With all layers frozen it is training of a head on features.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from fmjax import adapters, build, data
from fmjax.adapters.wrapper import Adapted
from fmjax.data.settings import LABELLED
from fmjax.errors import ConfigError, Preempted
from fmjax.io import disk_cache, progress
from fmjax.io.mapped import MappedFiles
from fmjax.params import groups, paths, sharding
from fmjax.params.precision import DTYPES

STATES = "states"  # the file of a folder: [tokens of the split, D]
BATCH = 64  # examples that go through the prefix at once


class PrefixSplit:
    """A split whose rows hold hidden states of the prefix in the place of token ids."""

    def __init__(self, split: Any, files: MappedFiles, dtype: Any, width: int):
        self.split, self.files = split, files
        self.states = files.raw(STATES, dtype).reshape(-1, width)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.split, name)

    def __len__(self) -> int:
        return len(self.split)

    @property
    def with_tokens(self) -> Any:
        """The split whose rows hold token ids."""
        return self.split

    def rows(
        self, index: np.ndarray, examples: np.ndarray | None = None, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """As the split's own, with `input_ids` [n, T, D] in the dtype of the computation."""
        with self.files.unchanged():
            batch = self.split.rows(index, examples, seed)
            first, last = self.split.extent(index)
            real = batch["segment_ids"] > 0
            states = np.zeros((*real.shape, self.states.shape[1]), self.states.dtype)
            states[real] = np.concatenate(
                [self.states[a:b] for a, b in zip(first, last, strict=True)]
            )
        return batch | {"input_ids": states}


def cached(
    runs: Sequence[Any], params: Any, stop: Callable[[], bool] = lambda: False
) -> tuple[Any, ...]:
    """The runs with their frozen prefix computed; they share it, and `params` are those of the
    first.

    Raises ConfigError where there is no such prefix, or where something in it is random; Preempted
    when `stop()` turned true on the way.
    """
    run = runs[0]
    layers = depth(run)
    made = {
        name: PrefixSplit(
            split,
            MappedFiles(_prepared(run, params, name, split, layers, stop)),
            DTYPES[run.model.cfg.dtype],
            run.model.cfg.width,
        )
        for name, split in run.dataset.splits.items()
    }
    dataset = dataclasses.replace(run.dataset, splits=made)
    behind = lambda run: run._replace(dataset=dataset, model=run.model.clone(start=layers))
    return tuple(map(behind, runs))


def depth(run: Any) -> int:
    """Number of frozen layers, from the first on, with the embeddings; at least one."""
    cfg = run.model.cfg
    refused = "config.cache_prefix=True"
    if jax.process_count() > 1:
        raise ConfigError(f"{refused} works in one process: train in one, or set it to False.")
    rates = {f"model.{key}": getattr(cfg, key) for key in ("dropout", "attention_dropout")}
    if isinstance(run.model, Adapted):
        rates["adapter.dropout"] = run.model.adapter.dropout
    if adapters.positions(run.model):
        raise ConfigError(
            f"{refused}, but config.adapter puts vectors before the tokens: set False."
        )
    if random := [key for key, rate in rates.items() if rate]:
        raise ConfigError(
            f"{refused} needs layers without randomness, but config.{random[0]} is "
            f"{rates[random[0]]}: set it to 0.0."
        )
    if run.config.data.format not in LABELLED or any(o.prepare for o in run.objectives):
        raise ConfigError(
            f"{refused} needs examples that are the same in every epoch: a labelled "
            f"config.data.format ({', '.join(LABELLED)}) and objectives that corrupt nothing."
        )
    moving = groups.trained(run.assigned)
    layers = [place.index for place in map(paths.layer, moving) if place]
    found = min([*layers, run.model.encoded])
    if not found or any(name.startswith("embed/") for name in moving):
        raise ConfigError(
            f"{refused}, but config.groups trains the embeddings or the first layer: nothing is "
            "frozen below what trains."
        )
    return found


def _prepared(run: Any, params: Any, name: str, split: Any, layers: int, stop) -> Path:
    """The cache folder with the hidden states of all examples in order, made or found."""
    weights = xxhash.xxh3_128()
    for parameter, value in sorted(paths.unstack(params).items()):
        if parameter.startswith("embed/") or _layer(parameter) < layers:
            weights.update(np.asarray(jax.device_get(value)).tobytes())
    key = [
        repr(getattr(run.model, "adapter", None)),
        weights.hexdigest(),
        run.dataset.digest,
        run.dataset.format,
        name,
        layers,
    ]
    home = (
        disk_cache.root(run.config.data.cache)
        / f"prefix-{disk_cache.digest([*key, repr(run.model.cfg)])}"
    )
    with disk_cache.lock(home.with_suffix(".lock"), print, lambda: None):
        if disk_cache.verified(home, print) is None:
            disk_cache.build(
                home, lambda folder: _compute(run, params, split, layers, folder, stop)
            )
    return home


def _layer(parameter: str) -> float:
    place = paths.layer(parameter)
    return place.index if place else float("inf")


def _compute(run: Any, params: Any, split: Any, layers: int, folder: Path, stop) -> dict:
    """Writes the states of all examples, real tokens alone, one after the other."""
    apply = build.apply(run.model.clone(stop=layers))

    @jax.jit
    def encode(params, batch):
        flat = lambda x: x.reshape(-1, x.shape[-1])  # several sequences of an example
        inputs = {name: flat(batch[name]) for name in run.model.inputs}
        return apply(params, inputs, method="encode")

    first, last = split.extent(np.arange(len(split)))
    shape = int(last[-1]), run.model.cfg.width
    out = np.memmap(folder / STATES, DTYPES[run.model.cfg.dtype], "w+", shape=shape)
    disk_cache.reserve(folder / STATES)
    steps = data.eval_steps(split, BATCH)
    with progress.part(print) as show:
        for done, batch in enumerate(data.eval_batches(split, batch_size=BATCH), 1):
            if stop():
                raise Preempted(
                    "stopped while the frozen layers were computed; the same command starts again"
                )
            real = batch["segment_ids"] > 0
            states = encode(params, sharding.put(batch, run.batch_sharding))
            states = np.asarray(states).reshape(*real.shape, -1)
            for row, own, each in zip(batch["index"], real, states, strict=True):
                if own.any():
                    out[first[row] : last[row]] = each[own]
            told = min(done * BATCH, len(split))
            show(done / steps, f"{layers} frozen layers: {told:,} of {len(split):,} examples")
    out.flush()
    return {}
