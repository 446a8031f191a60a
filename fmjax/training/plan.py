"""`--dry_run`: what a run would be, before it costs anything."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import adapters, convert, objectives
from fmjax.data import check_drawn, full_row
from fmjax.distributed import collective_bytes
from fmjax.errors import ConfigError
from fmjax.io.progress import count
from fmjax.params import paths
from fmjax.training import flops
from fmjax.training.loop import train_batches
from fmjax.training.setup import batch_spec
from fmjax.training.vmapped_runs import VmappedRuns


def show(vmapped: VmappedRuns) -> None:
    """Prints data, parameters with groups, what a step costs, and the first batch, or where batches
    are generated from the parameters a row of the data."""
    run = vmapped.padded_run
    config, dataset = run.config, run.dataset
    split = dataset.splits["train"]
    print(f"\ndata        {len(split):,} rows of {split.row_size}", end="")
    print(f"; {split.unit_count:,} {dataset.unit} an epoch")
    seen = check_drawn(split, config.data.examples)
    drawn = f" of {seen:,} that are drawn" if seen < len(split) else ""
    epochs = run.total * config.batch_size / seen
    print(
        f"run         {run.total:,} steps of {config.batch_size} rows = {epochs:.2f} epochs{drawn}"
    )
    print(f"mesh        {dict(run.mesh.shape)} on {jax.device_count()} x {jax.devices()[0]}")
    if not vmapped.alone:
        print(f"arms        {len(vmapped.runs)} in one program; what follows is of the widest,")
        print("            time and memory of the step of all")
    print(f"export      {_export(run)}")
    _parameters(run)
    _cost(vmapped)
    if run.dataset.source(run):
        return _batch(run, full_row(split))
    with contextlib.closing(train_batches(vmapped)) as batches:
        _batch(run, vmapped.batch(next(batches), 0))


def _export(run: Any) -> str:
    """The class of transformers that the run could be exported as, or why there is none."""
    model, names = adapters.base(run.model), paths.unstack(run.abstract.params)
    try:
        convert.check_pool(model, run.config.objectives.to_dict())
        return f"transformers.{convert.architecture(model, names)[0]}"
    except ConfigError as error:
        return f"none. {error}"


def _parameters(run: Any) -> None:
    """One line a kind of parameter: layers of one shape and group are counted together."""
    print(f"\n{'parameters':<44} {'shape':>16} {'number':>12}  group")
    rows: dict[tuple, int] = {}
    for path, leaf in paths.flatten(run.abstract.params).items():
        names = paths.names(path)
        stacked = paths.is_stacked(path)
        # block_00/… for one layer, block_00…11/… for a stack of them.
        shown = paths.span(names[0], names[-1])
        shape = leaf.shape[1:] if stacked else leaf.shape
        rows[(shown, shape, run.assigned[names[0]])] = len(names)
    total = {}
    for (name, shape, group), layers in rows.items():
        size = layers * int(np.prod(shape))
        total[group] = total.get(group, 0) + size
        times = f"{layers} x " if layers > 1 else ""
        print(f"{name:<44} {times + str(shape):>16} {size:>12,}  {group}")
    everything = sum(total.values())
    for group, size in total.items():
        print(f"{group:<44} {'':>16} {size:>12,}  {size / everything:.2%}")


def _cost(vmapped: VmappedRuns) -> None:
    run, abstract = vmapped.padded_run, vmapped.abstract
    step = compiled(vmapped)
    memory = step.memory_analysis()
    operations = flops.of_step(run, batch_spec(run))
    split, unit = run.dataset.splits["train"], run.dataset.unit
    units = run.config.batch_size * split.row_units
    every, moving = run.abstract.params, run.split(run.abstract.params)[0]
    frozen = adapters.parameters(run.model, every) - paths.size(moving)
    each = count(operations / units)
    print(f"\nstep        {count(operations)}FLOP in matrix products, {each} per {unit[:-1]}")
    cost = step.cost_analysis() or {}
    told = count(cost.get("flops", 0))
    print(f"            {told}FLOP by the compiler, which counts a scanned layer once")
    for name, size in {
        "state": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }.items():
        print(f"memory      {size / 2**20:,.1f} MiB {name} a device")
    print(f"            {paths.nbytes(abstract.opt_state) / 2**20:,.1f} MiB optimizer in all")
    if run.mesh.size > 1:
        print(f"sent        {_sent(step.as_text())}")
    print(f"frozen      {frozen:,} parameters")


def compiled(vmapped: VmappedRuns) -> jax.stages.Compiled:
    """The step on batches of the full width."""
    step = jax.jit(vmapped.train_step(), donate_argnums=0)
    return step.lower(vmapped.abstract, vmapped.batch_spec()).compile()


def peak_bytes(step: jax.stages.Compiled) -> int:
    """Peak memory of one device, by the compiler: the state and the batch, and temporary arrays."""
    memory = step.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _sent(program: str) -> str:
    """The bytes that a device sends the others in a step, the largest part first."""
    try:
        sent = collective_bytes.sent(program)
    except ValueError as error:
        return f"unknown. {error}"
    kinds = sorted(sent.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{kind} {size / 2**20:,.1f}" for kind, size in kinds)
    return f"{sum(sent.values()) / 2**20:,.1f} MiB by a device ({parts})"


def _batch(run: Any, batch: Mapping[str, np.ndarray]) -> None:
    """The first row of the first batch as the model sees it."""
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}  # of several processes, this one's
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.config.seed), 1), 0)
    _, phases = objectives.phases(run.objectives)
    prepared = objectives.prepare(phases[0], arrays, rng, True, jnp.int32(0))
    print(f"\nfirst row of the first batch\n{run.dataset.example(batch, prepared)}")
