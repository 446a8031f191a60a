"""A run folder as a folder that `transformers` loads, an adapter merged into its base."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from fmjax import (
    adapters,
    build,
    conversations,
    convert,
    evaluate,
    export_tokenizer,
    groups,
    pretrained,
    processes,
    state,
    trees,
)
from fmjax.adapters import peft, peft_formats, peft_loading
from fmjax.adapters.lora import Lora
from fmjax.adapters.wrapper import Adapted
from fmjax.data import tokenizer as tokenizers
from fmjax.errors import CheckpointError, ConfigError, FmjaxError
from fmjax.models import TOKEN_HEADS, AnyModel


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: writes the run `config.folder` to `config.output`, reads it back and compares."""
    with processes.start(config) as mesh:
        # Parameters are float32: what is compared must not drown in the rounding of a run's dtype.
        opened = pretrained.open_folder(config.folder, mesh, "float32", config.step)
        if opened.config is None:
            raise ConfigError(
                f"config.folder={config.folder!r} is in Hugging Face format already; "
                "give the folder of a run."
            )
        output = Path(config.output or Path(config.folder) / "export")
        _check_class(opened)
        if dry_run:
            if jax.process_index() == 0:
                print(f"would export {opened} to {output}")
            return
        if not config.merge:
            _adapter(output, opened)
            return
        model, params = adapters.merged(opened.model, opened.params)
        if isinstance(opened.model, Adapted):
            apart = divergence(opened, model, params)
            _check_merged(apart, config.max_kl)
            _compare(opened, model, params, mesh, config.limit)
        opened = opened._replace(model=model, params=params)
        with export_tokenizer.prepared(opened, mesh) as complete:
            left_out = convert.export(
                output,
                complete.model,
                complete.params,
                complete.tokenizer,
                labels=complete.labels,
                several=complete.several,
                stop=_stop_tokens(complete),
            )
            write_template(complete, output)
            check(output, complete, left_out, state.abstract_params(complete.model, mesh))
    if jax.process_index() != 0:
        return
    files = [path for path in output.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"exported {opened} to {output}: {len(files)} files, {size:,.1f} MiB")
    print("read back: equal to the run's parameters bit by bit")
    if heads := ", ".join(sorted({name.rpartition("/")[0] for name in left_out})):
        print(f"left out, as transformers has no class with them beside the rest: {heads}")
    (architecture,) = json.loads((output / "config.json").read_text())["architectures"]
    if getattr(opened.model.cfg, "prefix", False):
        print("the model reads a prompt in both directions, but with transformers only forwards")
    print(f"to load: transformers.{architecture}.from_pretrained({str(output)!r})")


def _stop_tokens(opened: pretrained.Opened) -> tuple[int, ...]:
    """The tokens that end what the model writes, where it does."""
    if not opened.model.causal and not opened.model.decodes:
        return ()
    return conversations.stop_tokens(opened, tokenizers.load(opened.tokenizer))


def write_template(opened: pretrained.Opened, output: Path) -> None:
    """The chat template that the run was trained with, which may be another than its tokenizer's,
    or the only one."""
    if jax.process_index() == 0 and conversations.learnt_to_answer(opened):
        _, template, _ = conversations.template_of(opened, tokenizers.load(opened.tokenizer))
        (output / "chat_template.jinja").write_text(template, encoding="utf-8")


def _check_class(opened: pretrained.Opened) -> None:
    """Raises ConfigError for a run with heads that no class of transformers has."""
    model = adapters.base(opened.model)
    convert.check_pool(model, opened.config.objectives.to_dict())
    convert.architecture(model, trees.unstack(opened.params))


def _adapter(output: Path, opened: pretrained.Opened) -> None:
    """The run's adapter and the heads that it trained in PEFT's format, with the tokenizer."""
    if not isinstance(opened.model, Adapted) or opened.model.adapter.keeps:
        raise ConfigError(
            f"config.merge=False writes an adapter alone, but {opened.source} has none: leave it "
            "at True."
        )
    peft_formats.of(opened.model)
    init = getattr(opened.model.adapter, "init", "uniform")
    if isinstance(opened.model.adapter, Lora) and init != "uniform":
        raise ConfigError(
            f"The run has config.adapter.init={init!r}, which changed its base: its adapter fits "
            "no other. Leave config.merge at True."
        )
    names = list(trees.unstack(opened.params))
    moving = groups.trained(groups.assign(names, opened.config.groups))
    apart = re.compile(rf"head/.*|{adapters.LEAVES}")
    if others := [name for name in moving if not apart.fullmatch(name)]:
        raise ConfigError(
            f"The run trained {others[0]} beside its adapter (config.groups), which an adapter's "
            "folder has no place for. Leave config.merge at True."
        )
    whole = [name for name in moving if not re.fullmatch(adapters.LEAVES, name)]
    heads = sorted({name.split("/")[1] for name in whole})
    written = peft.write(
        output,
        opened.model,
        opened.params,
        heads="|".join(map(re.escape, heads)),
        source=opened.config.init,
    )
    convert.copy_tokenizer(opened.tokenizer, output)
    write_template(opened, output)
    size = sum(path.stat().st_size for path in output.iterdir() if path.is_file()) / 2**20
    print(f"wrote the adapter of {opened} and the heads {heads} to {output}: {size:,.1f} MiB")
    print("read back: equal to the run's parameters bit by bit")
    print(peft_loading.command(str(output), written, opened))


def check(
    output: Path, opened: pretrained.Opened, left_out: tuple[str, ...], abstract: Any
) -> None:
    """Raises CheckpointError unless the folder holds every bit of the parameters exported."""
    kept = {p: x for p, x in trees.flatten(opened.params).items() if p not in left_out}
    like = {path: leaf for path, leaf in trees.flatten(abstract).items() if path in kept}
    again, _ = convert.load(output, trees.unflatten(like))
    again = trees.flatten(again)
    if wrong := [path for path in kept if not _same_bits(kept[path], again[path])]:
        raise CheckpointError(
            f"{output} was written, but reads back differently: {', '.join(wrong[:5])}. Do not use "
            "it; set config.output to another folder, on another disk if it happens again."
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
        measure = evaluate.Measure(settings, opened, mesh)
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
