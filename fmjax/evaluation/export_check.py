"""An exported folder, read back and compared with what it was made of."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from fmjax import adapters, build, convert
from fmjax.checkpoints import pretrained
from fmjax.distributed import processes
from fmjax.errors import CheckpointError, ConfigError, FmjaxError
from fmjax.evaluation import measurement
from fmjax.models import TOKEN_HEADS, AnyModel
from fmjax.params import paths


def check(
    output: Path, opened: pretrained.Opened, left_out: tuple[str, ...], abstract: Any
) -> None:
    """Raises CheckpointError unless the folder holds every bit of the parameters exported."""
    processes.meet()  # process 0 may still be writing
    kept = {p: x for p, x in paths.flatten(opened.params).items() if p not in left_out}
    like = {path: leaf for path, leaf in paths.flatten(abstract).items() if path in kept}
    again, _ = convert.load(output, paths.unflatten(like))
    again = paths.flatten(again)
    if wrong := [path for path in kept if not _same_bits(kept[path], again[path])]:
        raise CheckpointError(
            f"what was written to {output} reads back differently: {', '.join(wrong[:5])}. Set "
            "config.output to another folder, on another disk if it happens again."
        )


def divergence(
    opened: pretrained.Opened, model: AnyModel, params: Any, rows: int = 16
) -> dict[str, float]:
    """{head: KL(merged || unmerged) in nats}, the mean over rows of random tokens; `model` and
    `params` are the merged ones. A head of one output is compared as the odds of yes and no."""
    cfg = model.cfg
    rng, time = np.random.default_rng(0), min(64, cfg.max_len - adapters.positions(opened.model))
    ids = jnp.asarray(rng.integers(0, cfg.vocab_size, (rows, time)), jnp.int32)
    ones, places = jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(time)[None], ids.shape)

    def outputs(model, params):
        apply = build.apply(model)
        hidden = apply(params, ids, ones, places, jnp.zeros_like(ids), method="encode")
        found = {}
        for name, _ in cfg.classes:
            if name in TOKEN_HEADS:
                found[name] = apply(params, hidden, name, method="project")
            else:
                found[name] = apply(params, hidden, ones, name, method="classify")
        return found | (
            {"vocabulary": apply(params, hidden, method="logits")} if cfg.lm_head else {}
        )

    @jax.jit
    def compare(params, whole):
        both = outputs(opened.model, params), outputs(model, whole)
        return {name: _nats(both[1][name], both[0][name]) for name in both[0]}

    return {name: float(x) for name, x in compare(opened.params, params).items()}


def _nats(logits: jax.Array, others: jax.Array) -> jax.Array:
    if logits.shape[-1] == 1:
        logits, others = (jnp.concatenate([x, jnp.zeros_like(x)], -1) for x in (logits, others))
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))


def _check_merged(apart: dict[str, float], most: float) -> None:
    told = ", ".join(f"{head} {nats:.1e}" for head, nats in apart.items())
    if jax.process_index() == 0:
        print(f"KL(merged || unmerged) on random tokens, nats: {told or 'the run has no head'}")
    if worst := [head for head, nats in apart.items() if not nats <= most]:
        raise ConfigError(
            f"Merged, the head {worst[0]} gives other outputs: {told} nats, above config.max_kl="
            f"{most}. Keep the run's folder, or export the adapter alone with config.merge=False."
        )


def _compare(
    opened: pretrained.Opened, model: AnyModel, params: Any, mesh: jax.sharding.Mesh, limit: int
) -> None:
    """Prints what the run's own validation measures before and after merging; `model` and `params`
    are the merged ones."""
    if not limit:
        return
    config = opened.config
    as_trained = dict(data={}, objectives=None, batch_size=config.batch_size // config.accumulate)
    settings = ConfigDict(as_trained | dict(split="validation", limit=limit))
    measure, problem = None, "another process lacks the data"
    try:
        measure = measurement.Measure(settings, opened, mesh)
    except FmjaxError as error:
        problem = error
    told = f"not measured on the run's validation split: {problem}"
    if all(multihost_utils.process_allgather(np.array([measure is not None])).flat):
        before = measure(opened.model, opened.params, mesh)
        after = measure(model, params, mesh)
        pairs = (f"{name} {before[name]:.6g} -> {after[name]:.6g}" for name in before)
        told = f"merged, on {measure.rows:,} rows of its validation split: {', '.join(pairs)}"
    if jax.process_index() == 0:
        print(told)


def _same_bits(one: jax.Array, other: jax.Array) -> bool:
    """Compares what this process holds, as bits: NaN equals itself, -0 differs from 0."""
    return all(
        np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
        for a, b in zip(one.addressable_shards, other.addressable_shards, strict=True)
    )
