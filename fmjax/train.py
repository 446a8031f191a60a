"""Training: everything is put together in `setup`, and `loop` is the only loop there is.

A batch walks: data -> mesh -> train_step (corrupt, forward, backward, update) -> log -> evaluate ->
save.
"""

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax import (
    build,
    checkpoint,
    data,
    evaluate,
    flops,
    interrupt,
    optim,
    plan,
    report,
    sharding,
    state,
    trees,
    workdir,
)
from fmjax import config as configs
from fmjax import objectives as losses
from fmjax.errors import NumericsError, Preempted
from fmjax.monitor import Monitor
from fmjax.state import TrainState


class Run(NamedTuple):
    """What a config means: every part that the loop uses, nothing yet computed."""

    config: Any
    mesh: jax.sharding.Mesh
    dataset: data.Dataset
    model: nn.Module
    objectives: list[losses.Objective]
    assigned: dict[str, str]  # parameter name -> group
    optimizer: optim.Optimizer
    abstract: TrainState
    total: int  # steps
    steps: Callable[[Any], int]  # duration -> steps

    def split(self, params: Any) -> tuple[Any, Any]:
        return optim.split(params, self.assigned)

    @property
    def batch_sharding(self) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(self.mesh, sharding.BATCH)


def run(
    config: Any,
    workdir_path: str | os.PathLike,
    *,
    dry_run: bool = False,
    fresh: bool = False,
    changed: Sequence[tuple[str, Any, Any]] = (),
) -> None:
    """Trains until `config.total`, resuming from the newest verified checkpoint of the folder.

    `changed` are the (key, default, value) in which the config differs from its file, for the
    report.
    """
    started = time.monotonic()
    with interrupt.catch() as stop:
        mesh = build.start_jax(config)
        if dry_run:
            with jax.set_mesh(mesh):
                return plan.show(setup(config, mesh, stop))
        with workdir.open(
            workdir_path, config, fresh=fresh, process_index=jax.process_index()
        ) as folder:
            with jax.set_mesh(mesh):
                loop(setup(config, mesh, stop), folder, stop, started, changed)


def setup(config: Any, mesh: jax.sharding.Mesh, stop: interrupt.Stop) -> Run:
    """Builds and checks all parts of a run; compiles nothing."""

    def poll():
        if stop.requested:
            raise Preempted(
                f"stopped by {stop.signal} while preparing data; the same command goes on"
            )

    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    dataset = data.prepare(config.data.to_dict(), config.tokenizer.to_dict(), poll=poll)
    build.check_tokenizer(config, dataset.tokenizer_dir)
    train = dataset.splits["train"]
    sizes = dict(
        steps_per_epoch=max(len(train) // config.batch_size, 1),
        tokens_per_step=config.batch_size * config.data.seq_len,
    )
    total = configs.steps(config.total, total=None, **sizes)
    steps = functools.partial(configs.steps, total=total, **sizes)

    model = build.model(config, dataset.vocab.size)
    objectives = losses.build(config.objectives.to_dict(), vocab=dataset.vocab)
    model, assigned = grouped(model, config.groups)
    trainable, _ = optim.split(state.abstract_params(model), assigned)
    optimizer = optim.make(
        trainable,
        assigned,
        steps=steps,
        depth=model.cfg.depth,
        optim=config.optim.to_dict(),
        group_optim=config.group_optim.to_dict(),
    )
    split = functools.partial(optim.split, assigned=assigned)
    abstract = state.abstract(model, optimizer.tx, split, mesh)
    return Run(
        config, mesh, dataset, model, objectives, assigned, optimizer, abstract, total, steps
    )


def grouped(model: nn.Module, groups: Any) -> tuple[nn.Module, dict[str, str]]:
    """The model, stacked where neighbouring layers train alike, and {parameter name: group}."""
    canonical = model.clone(stacks=trees.runs(model.kinds))
    names = list(trees.unstack(state.abstract_params(canonical)))
    assigned = optim.assign(names, groups)
    stacks = optim.stacks(model.kinds, assigned) if model.cfg.scan else None
    return model.clone(stacks=stacks), assigned


def make_train_step(
    apply: Callable,
    objectives: list[losses.Objective],
    tx: optax.GradientTransformation,
    split: Callable,
    accumulate: int = 1,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, Any]]]:
    """`step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    metrics: "sums" {name: (sum, weight)}, "loss", "grad_norm" (of what trains, before clipping) and
    "skipped" (1.0 when loss or gradient was not finite: parameters and optimizer then stay, the
    step still counts), "tokens" (not padding).
    """

    def train_step(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        trainable, frozen = split(state.params)

        def forward(trainable, part):
            params = optim.merge(trainable, frozen)
            return losses.metrics(objectives, apply, params, part, rng, train=True)

        def loss_fn(trainable, part, weights):
            found = forward(trainable, part)
            weights = weights or {name: weight for name, (_, weight) in found.items()}
            return losses.loss(objectives, found, weights), found

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulate == 1:
            (loss, sums), grads = gradient(trainable, batch, None)
        else:
            # Only the weights of this forward pass are used, and they do not depend on the
            # parameters: the compiler removes the pass.
            weights = {name: weight for name, (_, weight) in forward(trainable, batch).items()}
            (loss, sums), grads = _accumulated(
                lambda part: gradient(trainable, part, weights), batch, accumulate
            )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, trainable)
        moved = optax.apply_updates(trainable, updates)
        # Selected, never multiplied: 0 * NaN is NaN.
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        state = state.replace(
            step=state.step + 1,
            params=optim.merge(keep(moved, trainable), frozen),
            opt_state=keep(opt_state, state.opt_state),
        )
        return state, {
            "sums": sums,
            "loss": loss,
            "grad_norm": norm,
            "skipped": 1.0 - finite.astype(jnp.float32),
            "tokens": jnp.sum(batch["segment_ids"] > 0),
        }

    return train_step


def _accumulated(gradient: Callable, batch: Mapping[str, jax.Array], parts: int) -> Any:
    """The sum of `gradient(part)` over microbatches, one at a time in memory.

    Part i holds the rows i, i + parts, …, so that every device keeps the rows it has.
    """

    def cut(x):
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    micro = {name: cut(x) for name, x in batch.items()}
    first = jax.eval_shape(gradient, {name: x[0] for name, x in micro.items()})
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None)
    return jax.lax.scan(add, zero, micro)[0]


def loop(
    run: Run,
    folder: workdir.Folder,
    stop: interrupt.Stop,
    started: float,
    changed: Sequence[tuple[str, Any, Any]] = (),
) -> None:
    """Batch, step, log, evaluate, save; until the end, a signal, or too many bad steps in a row."""
    config = run.config
    every = {name: run.steps(config[f"{name}_every"]) for name in ("log", "eval", "save")}
    due = lambda name: step == run.total or (every[name] and step % every[name] == 0)
    with contextlib.ExitStack() as cleanup:
        saver = checkpoint.Checkpointer(folder.path, keep=config.keep, best=config.best)
        cleanup.callback(saver.close)
        batches = train_batches(run)
        cleanup.callback(batches.close)
        current, saved = start(run, folder, saver, batches)
        step = int(current.step)
        if step == run.total and folder.finished:
            print(f"{folder.path}: already finished at step {step}; --fresh starts over")
            return
        monitor = cleanup.enter_context(Monitor(run, folder, step, saved, started))
        train_step, eval_step = compiled(run, monitor)
        if due("eval") and monitor.owes_evaluation(step):
            monitor.evaluated(step, validate(run, eval_step, current, stop, monitor))
        while step < run.total and not stop.requested:
            with monitor.timed("data_wait"):
                batch = sharding.put(next(batches), run.batch_sharding)
            current, found = train_step(current, batch)
            step += 1
            if monitor.step(step, found, batch) >= config.max_skipped:
                raise numerics_error(run, folder, current, monitor)
            if due("log"):
                monitor.log(step)
            if due("eval"):
                monitor.evaluated(step, validate(run, eval_step, current, stop, monitor))
            if due("save") or due("eval") or saver.check():
                monitor.save(saver, step, current, meta(run, batches, monitor))
        if stop.requested and step > monitor.first:
            monitor.save(saver, step, current, meta(run, batches, monitor))
        with monitor.timed("saving"):
            saver.wait()
        done = step == run.total and not monitor.owes_evaluation(step)
        monitor.finish(step, "" if done else stop.signal, changed)
    if not done:
        where = f"after step {step}, which is saved" if step else "before the first step"
        raise Preempted(f"stopped by {stop.signal} {where}; the same command goes on")


def train_batches(run: Run) -> Any:
    """This process's part of the endless stream of training batches."""
    return data.batches(
        run.dataset.splits["train"],
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def start(
    run: Run, folder: workdir.Folder, saver: checkpoint.Checkpointer, batches: Any
) -> tuple[TrainState, dict[str, Any]]:
    """(state, meta) of the newest verified checkpoint, data where it stood; else (new state,
    {})."""

    def same_data(saved):
        data.check_fingerprint(saved["fingerprint"], fingerprint(run))

    restored = saver.restore(run.abstract, check=same_data)
    if restored is not None:
        batches.restore(restored[1]["data"])
        return restored
    if jax.process_index() == 0:
        # The run folder reads alone: evaluation, export and people need the tokenizer.
        source = run.dataset.tokenizer_dir
        shutil.copytree(source, folder.path / "tokenizer", dirs_exist_ok=True)
    params = build.initial(run.config, run.model, run.abstract.params)
    create = functools.partial(state.create, run.abstract, run.model, run.optimizer.tx)
    return create(run.split, run.config.seed, params), {}


def fingerprint(run: Run) -> dict[str, Any]:
    return data.fingerprint(run.dataset, seed=run.config.seed, batch_size=run.config.batch_size)


def meta(run: Run, batches: Any, monitor: Monitor) -> dict[str, Any]:
    """What a checkpoint holds beside arrays: where the data stands and what made the run."""
    return {
        "data": batches.state(),
        "fingerprint": fingerprint(run),
        "config": configs.flatten(configs.redact(run.config)),
        "versions": report.environment(),
        **monitor.saved(),
    }


def compiled(run: Run, monitor: Monitor) -> tuple[Callable, Callable]:
    """The jitted train and evaluation steps; the former is compiled now, with the state donated."""
    apply = build.apply(run.model)
    train_step = make_train_step(
        apply, run.objectives, run.optimizer.tx, run.split, run.config.accumulate
    )
    eval_step = jax.jit(evaluate.make_step(apply, run.objectives))
    spec = batch_spec(run)
    monitor.flops = flops.count(train_step, run.abstract, spec)
    with monitor.timed("compile"):
        lowered = jax.jit(train_step, donate_argnums=0).lower(run.abstract, spec)
        return lowered.compile(), eval_step


def batch_spec(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and layout of one global training batch."""
    rows = next(data.eval_batches(run.dataset.splits["train"], batch_size=1))
    return {
        name: jax.ShapeDtypeStruct(
            (run.config.batch_size, *x.shape[1:]), x.dtype, sharding=run.batch_sharding
        )
        for name, x in rows.items()
    }


def validate(
    run: Run, eval_step: Callable, current: TrainState, stop: interrupt.Stop, monitor: Monitor
) -> dict[str, float] | None:
    """Metrics over the validation split, with averaged parameters where the config keeps them.

    None if a signal ended it early, {} if there is no validation split.
    """
    if "validation" not in run.dataset.splits:
        return {}
    params, average = current.params, optim.averaged(current.opt_state)
    if average is not None:
        params = optim.merge(average, run.split(params)[1])
    batches = data.eval_batches(
        run.dataset.splits["validation"],
        batch_size=run.config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with monitor.timed("evaluation"):
        return evaluate.evaluate(
            eval_step, params, batches, run.objectives, run.mesh, lambda: stop.requested
        )


def numerics_error(
    run: Run, folder: workdir.Folder, current: TrainState, monitor: Monitor
) -> NumericsError:
    """Writes down what went wrong at the last bad step: which examples, which layers."""
    step, batch = monitor.last_bad

    def norms(state, batch):
        trainable, frozen = run.split(state.params)
        apply, rng = build.apply(run.model), jax.random.fold_in(state.rng, step - 1)

        def loss_fn(trainable):
            params = optim.merge(trainable, frozen)
            found = losses.metrics(run.objectives, apply, params, batch, rng, train=True)
            weights = {name: weight for name, (_, weight) in found.items()}
            return losses.loss(run.objectives, found, weights)

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        return loss, {name: jnp.linalg.norm(g) for name, g in trees.unstack(grads).items()}

    loss, gradients = jax.device_get(jax.jit(norms)(current, batch))
    dump = folder.path / "dumps" / f"step_{step}.json"
    dump.parent.mkdir(exist_ok=True)
    facts = {
        "step": step,
        "loss": str(loss),
        "examples": np.asarray(batch["index"]).tolist(),
        "gradient_norms": {name: str(norm) for name, norm in gradients.items()},
    }
    dump.write_text(json.dumps(facts, indent=2))
    return NumericsError(
        f"{monitor.bad_in_a_row} updates in a row were not finite, the last at step {step}; none "
        f"was applied or saved. {dump} names the examples and each layer's gradient norm. Lower "
        "config.optim.lr, raise config.optim.warmup, or look at the data."
    )
