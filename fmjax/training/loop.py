"""The only loop there is, and the only place that knows the order of things."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fmjax import build, data
from fmjax.checkpoints import checkpointer, pretrained
from fmjax.config import load as configs
from fmjax.data.dataset import Source
from fmjax.distributed import processes, signals
from fmjax.errors import CheckpointError, ConfigError, NumericsError, Preempted, did_you_mean
from fmjax.evaluation import eval_loop, in_training, sample_predictions
from fmjax.io import atomic, environment, storage, workdir
from fmjax.io.cleanup import FirstError
from fmjax.io.progress import FALLING
from fmjax.params import groups, paths, sharding
from fmjax.training import (
    feature_cache,
    monitor,
    optim,
    restore,
    setup,
)
from fmjax.training.monitor import Monitor
from fmjax.training.setup import Run
from fmjax.training.state import TrainState
from fmjax.training.step import make_gradient
from fmjax.training.vmapped_runs import VmappedRuns


def loop(
    vmapped: VmappedRuns,
    folders: Sequence[workdir.Folder],
    stop: signals.Stop,
    started: float,
    changed: Sequence[tuple[str, Any, Any]] = (),
) -> None:
    """Batch, step, log, evaluate, save; until the end, a signal, or too many bad steps in a row.

    Each run has its folder, log and checkpoints. Of several one may fail, and the others continue.
    """
    runs, total = vmapped.runs, vmapped.padded_run.total
    config = vmapped.padded_run.config  # for what the runs share
    every = {
        name: vmapped.padded_run.steps(config[f"{name}_every"]) for name in ("log", "eval", "save")
    }
    due = lambda name: step == total or (every[name] and step % every[name] == 0)
    with FirstError() as cleanup:
        mode = "min" if config.best.endswith(FALLING) else "max"
        kept = dict(keep=config.keep, keep_best=config.keep_best, best=config.best, best_mode=mode)
        run_folders = [folder.path for folder in folders]
        savers = [
            checkpointer.Checkpointer(path, **kept, beside=run_folders) for path in run_folders
        ]
        for saver in savers:
            cleanup.callback(saver.close)
        since = time.monotonic()
        state, metas, frozen_digest = restore.states(vmapped, folders, savers)
        restore_sec = time.monotonic() - since if metas[0] else 0.0
        if config.cache_prefix:
            runs = feature_cache.cached(runs, vmapped.unstack(state, 0).params, stop.poll)
            vmapped = VmappedRuns(runs)
        batches = train_batches(vmapped)
        cleanup.callback(batches.close)
        if metas[0]:
            batches.restore(metas[0]["data"])
        step = int(state.step)
        for folder, meta_ in zip(folders, metas, strict=True):
            if reason := meta_.get("failure"):
                folder.failure = NumericsError(reason)
                if vmapped.alone:
                    raise folder.failure
        if step == total and all(folder.finished for folder in folders):
            where = folders[0].path if vmapped.alone else folders[0].path.parent.parent
            print(f"{where}: already finished at step {step}; --fresh starts over")
            return
        progress = monitor.show(vmapped.padded_run, step)
        monitors = [
            cleanup.enter_context(
                Monitor(run, folder, step, meta, started, restore_sec, progress, arm)
            )
            for run, folder, meta, arm in zip(runs, folders, metas, vmapped.numbers, strict=True)
        ]
        timed = functools.partial(monitor.timed, monitors)
        benchmarks = [
            in_training.TrainingBenchmarks(run.config, run.model, run.dataset) for run in runs
        ]
        train_step, eval_step = compiled(vmapped, monitors, benchmarks[0].names, stop)

        def evaluate_all():
            params = measured_params(vmapped.padded_run, state)
            measured = dataclasses.replace(state, params=params)
            results = validate(vmapped, eval_step, params, stop, monitors)
            for arm, (one, (metrics, *examples)) in enumerate(zip(monitors, results, strict=True)):
                if metrics is not None and benchmarks[arm].items:
                    with timed("evaluation"):
                        scores = benchmarks[arm](vmapped.unstack(measured, arm).params, stop.poll)
                    metrics = None if scores is None else metrics | scores
                one.evaluated(step, metrics, *examples)

        def save_all():
            with timed("saving"):
                for arm, (run, one, saver) in enumerate(zip(runs, monitors, savers, strict=True)):
                    own = restore.moving(run, vmapped.unstack(state, arm))
                    one.save(saver, step, own, meta(run, batches, one, frozen_digest))

        stop.plan = signals.STEPPING
        if due("eval") and any(one.owes_evaluation(step) for one in monitors):
            evaluate_all()
        while step < total and not stop.poll():
            with stop.stepping():
                with timed("data_wait"):
                    batch = sharding.put(batches.next(state), vmapped.batch_sharding)
                state, found = train_step(state, batch)
                step += 1
                bad = [one.step(step, found, batch) >= config.max_skipped for one in monitors]
            if any(bad):
                give_up(vmapped, folders, state, monitors, step, bad)
            if due("log"):
                for one in monitors:
                    one.log(step)
            if due("eval"):
                evaluate_all()
            if due("save") or due("eval") or any([saver.check() for saver in savers]):
                save_all()
        if stop.requested and step > monitors[0].first:
            save_all()
        with timed("saving"):
            for saver in savers:
                saver.wait()
        done = step == total and not any(one.owes_evaluation(step) for one in monitors)
        signal = "" if done else stop.signal
        for one in monitors:
            one.end(step, signal)
        for one in monitors:
            one.finish(signal, changed)
    processes.meet()  # An error ends all: not before the last has saved.
    if not done:
        where = f"after step {step}, which is saved" if step else "before the first step"
        raise Preempted(f"stopped by {stop.signal} {where}; the same command goes on")


def train_batches(vmapped: VmappedRuns) -> Source:
    """This process's part of the endless stream of training batches.

    Raises ConfigError where several runs would share a source that depends on the parameters.
    """
    run = vmapped.padded_run
    if source := run.dataset.source(run):
        if not vmapped.alone:
            raise ConfigError(
                "config.arms: the data are generated from the parameters, and arms have their own: "
                "start a run for each."
            )
        return source
    return data.batches(
        run.dataset.splits["train"],
        batch_size=run.config.batch_size,
        seeds=vmapped.seeds,
        skip=run.config.data.skip,
        drawn=run.config.data.examples,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def meta(run: Run, batches: Any, monitor: Monitor, frozen_digest: str) -> dict[str, Any]:
    """Metadata of a checkpoint: the position in the data, what made the run, and the digest of the
    frozen parameters, `frozen_digest`."""
    return {
        "frozen": frozen_digest,
        "data": batches.state(),
        "fingerprint": restore.fingerprint(run),
        "model": pretrained.identity(run.model),
        "processors": restore.processor_digests(monitor.folder.path, tuple(run.dataset.processors)),
        "config": configs.flatten(configs.redact(run.config)),
        "versions": environment.environment(),
        **monitor.saved(),
    }


def compiled(
    vmapped: VmappedRuns, monitors: Sequence[Monitor], asked: Sequence[str], stop: signals.Stop
) -> tuple[Callable, Callable]:
    """The train step, with the state donated, and the evaluation step; both are compiled when the
    first batch of each shape comes. `asked` are metrics of `exams`."""
    run = vmapped.padded_run
    jitted, programs = jax.jit(vmapped.train_step(), donate_argnums=0), {}
    measure, measured = jax.jit(vmapped.eval_step()), set()

    def program(state, batch):
        shapes = setup.shapes(batch)
        if shapes not in programs:
            with (
                monitor.timed(monitors, "compile"),
                monitors[0].doing("compiling …"),
                stop.compiling(),
            ):
                spec = jax.tree.map(_abstract, dict(batch))
                traced = jitted.trace(vmapped.abstract, spec)
                for one, flops in zip(monitors, vmapped.flops(spec, traced), strict=True):
                    one.flops[shapes] = flops
                lowered = traced.lower()
                scores = [f"{o.name}/{score}" for o in run.objectives for score in o.scores]
                check_best(run.config.best, [*lowered.out_info[1]["sums"], *scores, *asked])
                programs[shapes] = lowered.compile()
            processes.meet()  # some compile faster
        return programs[shapes](state, batch)

    def evaluation(params, batch, rng):
        shapes = setup.shapes(batch)
        with contextlib.nullcontext() if shapes in measured else stop.compiling():
            measured.add(shapes)
            return measure(params, batch, rng)

    return program, evaluation


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def check_best(best: str, metrics: Iterable[str]) -> None:
    """Raise ConfigError for a `config.best` that no evaluation brings, before the first step."""
    names = dict.fromkeys(("loss", *metrics), 0.0)
    possible = [f"validation/{name}" for name in (*names, *eval_loop.perplexity(names))]
    if best and best not in possible:
        raise ConfigError(f"config.best = {best!r} is no metric.{did_you_mean(best, possible)}")


def measured_params(run: Run, state: TrainState) -> Any:
    """The parameters that are evaluated: averaged ones where the config keeps them."""
    average = optim.averaged(state.opt_state)
    if average is None:
        return state.params
    return groups.merge(average, run.split(state.params)[1])


def validate(
    vmapped: VmappedRuns,
    eval_step: Callable,
    params: Any,
    stop: signals.Stop,
    monitors: Sequence[Monitor],
) -> list[tuple[dict[str, float] | None, dict[str, np.ndarray], Callable[[], list]]]:
    """(metrics, what each example adds to them, what gives a few samples) of each run over the
    validation split.

    Metrics are None if a signal ended it early, {} if there is no validation split.
    """
    run = vmapped.padded_run
    if "validation" not in run.dataset.splits:
        return [({}, {}, list) for _ in monitors]
    split = run.dataset.splits["validation"]
    # Evaluation needs no more memory than a microbatch; numbers do not depend on the batch, but for
    # losses that compare its examples.
    whole_batch = any(objective.whole_batch for objective in run.objectives)
    batch_size = run.config.batch_size // (1 if whole_batch else run.config.accumulate)
    batches = data.eval_batches(
        split,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        alike=not whole_batch,
    )
    steps, show = data.eval_steps(split, batch_size), monitors[0].part("evaluation")
    with monitor.timed(monitors, "evaluation"):
        with stop.stepping():
            found = eval_loop.collect(
                eval_step,
                params,
                batches,
                run.mesh,
                eval_loop.keeps(run.objectives),
                stop.poll,
                lambda done: show(done / steps),
            )
        if found is None:
            return [(None, {}, list) for _ in monitors]
        about = dict(names=run.dataset.labels, split=split)
        each = [vmapped.measured(*found, arm) for arm in range(len(monitors))]
        return [
            (
                eval_loop.measured(totals, kept, run.objectives, **about),
                eval_loop.by_example(kept, run.objectives, split),
                functools.partial(sample_predictions.of, run, kept),
            )
            for totals, kept in each
        ]


def give_up(
    vmapped: VmappedRuns,
    folders: Sequence[workdir.Folder],
    state: TrainState,
    monitors: Sequence[Monitor],
    step: int,
    bad: Sequence[bool],
) -> None:
    """Ends the runs in which too many updates in a row were `bad`; raises where none is left."""
    for arm, folder in enumerate(folders):
        if bad[arm] and not folder.failure:
            error = numerics_error(vmapped, folder, state, monitors[arm], arm)
            if vmapped.alone:
                raise error
            monitors[arm].fail(step, error)
    if all(folder.failure for folder in folders):
        raise folders[-1].failure


def numerics_error(
    vmapped: VmappedRuns, folder: workdir.Folder, state: TrainState, monitor: Monitor, arm: int
) -> NumericsError:
    """Writes down what went wrong at the last bad step: which examples, which layers."""
    run, state = vmapped.runs[arm], vmapped.unstack(state, arm)
    step, batch = monitor.last_bad
    batch = vmapped.batch(batch, arm)
    gradient = make_gradient(
        build.apply(run.model), run.objectives, run.split, run.config.accumulate
    )

    def norms(state, batch):
        (loss, _), grads = gradient(state.replace(step=step - 1), batch)
        return loss, {name: jnp.linalg.norm(g) for name, g in paths.unstack(grads).items()}

    loss, gradients = jax.device_get(jax.jit(norms)(state, batch))
    dump = folder.path / "dumps" / f"step_{step}.json"
    facts = {
        "step": step,
        "loss": str(loss),
        "examples": multihost_utils.process_allgather(batch["index"], tiled=True).tolist(),
        "gradient_norms": {name: str(norm) for name, norm in gradients.items()},
    }
    where = f"{dump} names the examples and each layer's gradient norm."
    if jax.process_index() == 0:
        try:
            with storage.writing(dump):
                dump.parent.mkdir(exist_ok=True)
            atomic.write_atomic(dump, json.dumps(facts, indent=2))
        except CheckpointError as error:  # The numbers are what ended the run.
            where = f"{error}."
    return NumericsError(
        f"{monitor.bad_in_a_row} updates in a row were not finite, the last at step {step}; none "
        f"was applied or saved. {where} Lower config.optim.lr, raise config.optim.warmup, or leave "
        "examples out with config.data.skip."
    )
