"""Training: `loop` is the only loop there is, and the only place that knows the order of things.

A batch walks: data -> mesh -> train step (corrupt, forward, backward, update) -> log -> evaluate
-> save.
"""

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from fmjax import (
    build,
    checkpoint,
    data,
    evaluate,
    flops,
    frozen,
    groups,
    interrupt,
    optim,
    plan,
    prefix,
    pretrained,
    processes,
    report,
    sharding,
    state,
    trees,
    workdir,
)
from fmjax import config as configs
from fmjax.errors import CheckpointError, ConfigError, NumericsError, Preempted, did_you_mean
from fmjax.monitor import Monitor
from fmjax.setup import Run, batch_spec, setup
from fmjax.state import TrainState
from fmjax.step import make_gradient, make_train_step


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
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(interrupt.catch())

        def poll():
            if stop.signal:
                raise Preempted(
                    f"stopped by {stop.signal} while preparing data; the same command goes on"
                )

        mesh = stack.enter_context(processes.start(config, stop))
        if dry_run:
            parts = setup(config, mesh, poll)
            pretrained.check_head(parts.config, parts.dataset.labels)
            with contextlib.closing(train_batches(parts)) as batches:
                return plan.show(parts, next(batches))
        if table := sharding.table(mesh):
            print(table)
        writes = jax.process_index() == 0
        folder = stack.enter_context(
            workdir.open(workdir_path, config, fresh=fresh, writes=writes, first=processes.first)
        )
        with processes.together(folder.close), workdir.memory_errors():
            loop(setup(config, mesh, poll), folder, stop, started, changed)


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
        mode = "min" if config.best.endswith(("loss", "perplexity")) else "max"
        saver = checkpoint.Checkpointer(
            folder.path,
            keep=config.keep,
            keep_best=config.keep_best,
            best=config.best,
            best_mode=mode,
        )
        cleanup.callback(saver.close)
        begin = time.monotonic()
        current, saved, still = start(run, folder, saver)
        restore_sec = time.monotonic() - begin if saved else 0.0
        run = prefix.cached(run, current.params, stop.poll)
        batches = train_batches(run)
        cleanup.callback(batches.close)
        if saved:
            batches.restore(saved["data"])
        step = int(current.step)
        if step == run.total and folder.finished:
            print(f"{folder.path}: already finished at step {step}; --fresh starts over")
            return
        monitor = cleanup.enter_context(Monitor(run, folder, step, saved, started, restore_sec))
        train_step, eval_step = compiled(run, monitor)
        save = lambda: monitor.save(
            saver, step, moving(run, current), meta(run, batches, monitor, still)
        )
        if due("eval") and monitor.owes_evaluation(step):
            monitor.evaluated(step, validate(run, eval_step, current, stop, monitor))
        while step < run.total and not stop.poll():
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
                save()
        if stop.requested and step > monitor.first:
            save()
        with monitor.timed("saving"):
            saver.wait()
        done = step == run.total and not monitor.owes_evaluation(step)
        monitor.finish(step, "" if done else stop.signal, changed)
    processes.meet()  # An error ends all: not before the last has saved.
    if not done:
        where = f"after step {step}, which is saved" if step else "before the first step"
        raise Preempted(f"stopped by {stop.signal} {where}; the same command goes on")


def train_batches(run: Run) -> Any:
    """This process's part of the endless stream of training batches."""
    return data.batches(
        run.dataset.splits["train"],
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        skip=run.config.data.skip,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def moving(run: Run, state: TrainState) -> TrainState:
    """The state without the frozen parameters: what checkpoints hold."""
    return state.replace(params=run.split(state.params)[0])


def start(
    run: Run, folder: workdir.Folder, saver: checkpoint.Checkpointer
) -> tuple[TrainState, dict[str, Any], str]:
    """(state, meta) of the newest verified checkpoint, else (new state, {}); and the digest of the
    frozen parameters as they are saved, "" for none."""
    checkpoints = folder.path / "checkpoints"

    def same_data(saved):
        data.check_fingerprint(saved["fingerprint"], fingerprint(run))

    restored = saver.restore(moving(run, run.abstract), check=same_data)
    if restored is not None:
        state_, saved = restored
        still = saved["frozen"]
        if still:
            rest = frozen.restore(checkpoints, run.split(run.abstract.params)[1], still)
            state_ = state_.replace(params=groups.merge(state_.params, rest))
        return state_, saved, still
    if folder.previous.get("checkpoint"):
        raise CheckpointError(
            f"{folder.path} had a checkpoint of step {folder.previous['checkpoint']}, which is no "
            "longer there. Put checkpoints/ back, or start from zero with --fresh."
        )
    if jax.process_index() == 0:
        # The run folder reads alone: evaluation, export and people need the tokenizer.
        source = run.dataset.tokenizer_dir
        shutil.copytree(source, folder.path / "tokenizer", dirs_exist_ok=True)
    pretrained.check_head(run.config, run.dataset.labels)
    params = pretrained.initial(run.config, run.model, run.abstract.params)
    create = functools.partial(state.create, run.abstract, run.model, run.optimizer.tx)
    created = create(run.split, run.config.seed, params)
    rest = run.split(created.params)[1]
    return created, {}, frozen.save(checkpoints, rest) if jax.tree.leaves(rest) else ""


def fingerprint(run: Run) -> dict[str, Any]:
    return data.fingerprint(run.dataset, seed=run.config.seed, batch_size=run.config.batch_size)


def meta(run: Run, batches: Any, monitor: Monitor, still: str) -> dict[str, Any]:
    """What a checkpoint holds beside arrays: where the data stands, what made the run, and the
    digest of the frozen parameters, `still`."""
    return {
        "frozen": still,
        "data": batches.state(),
        "fingerprint": fingerprint(run),
        "model": pretrained.identity(run.model),
        "config": configs.flatten(configs.redact(run.config)),
        "versions": report.environment(),
        **monitor.saved(),
    }


def compiled(run: Run, monitor: Monitor) -> tuple[Callable, Callable]:
    """The train step, with the state donated, and the jitted evaluation step; the former is
    compiled when the first batch of each width comes."""
    apply = build.apply(run.model)
    train_step = make_train_step(
        apply, run.objectives, run.optimizer.tx, run.split, run.config.accumulate
    )
    eval_step = jax.jit(evaluate.make_step(apply, run.objectives))
    jitted, programs = jax.jit(train_step, donate_argnums=0), {}

    def program(state, batch):
        width = batch["segment_ids"].shape[-1]
        if width not in programs:
            spec = batch_spec(run, width)
            with monitor.timed("compile"):
                traced = jitted.trace(run.abstract, spec)
                monitor.flops[width] = flops.of_step(run, spec, traced)
                lowered = traced.lower()
                scores = [f"{o.name}/{score}" for o in run.objectives for score in o.scores]
                check_best(run.config.best, [*lowered.out_info[1]["sums"], *scores])
                programs[width] = lowered.compile()
        return programs[width](state, batch)

    return program, eval_step


def check_best(best: str, metrics: Iterable[str]) -> None:
    """Refuses a `config.best` that no evaluation will bring, before the first step."""
    names = dict.fromkeys(("loss", *metrics), 0.0)
    possible = [f"validation/{name}" for name in (*names, *evaluate.perplexity(names))]
    if best and best not in possible:
        raise ConfigError(f"config.best = {best!r} is no metric.{did_you_mean(best, possible)}")


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
        params = groups.merge(average, run.split(params)[1])
    split = run.dataset.splits["validation"]
    # Numbers do not depend on it: evaluation needs no more memory than a microbatch.
    batch_size = run.config.batch_size // run.config.accumulate
    batches = data.eval_batches(
        split,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    steps, show = data.eval_steps(split, batch_size), monitor.part("evaluation")
    with monitor.timed("evaluation"):
        return evaluate.evaluate(
            eval_step,
            params,
            batches,
            run.objectives,
            run.mesh,
            stop.poll,
            lambda done: show(done / steps),
            names=run.dataset.labels,
            split=split,
        )


def numerics_error(
    run: Run, folder: workdir.Folder, current: TrainState, monitor: Monitor
) -> NumericsError:
    """Writes down what went wrong at the last bad step: which examples, which layers."""
    step, batch = monitor.last_bad
    gradient = make_gradient(
        build.apply(run.model), run.objectives, run.split, run.config.accumulate
    )

    def norms(state, batch):
        (loss, _), grads = gradient(state.replace(step=step - 1), batch)
        return loss, {name: jnp.linalg.norm(g) for name, g in trees.unstack(grads).items()}

    loss, gradients = jax.device_get(jax.jit(norms)(current, batch))
    dump = folder.path / "dumps" / f"step_{step}.json"
    facts = {
        "step": step,
        "loss": str(loss),
        "examples": multihost_utils.process_allgather(batch["index"], tiled=True).tolist(),
        "gradient_norms": {name: str(norm) for name, norm in gradients.items()},
    }
    if jax.process_index() == 0:
        dump.parent.mkdir(exist_ok=True)
        dump.write_text(json.dumps(facts, indent=2))
    return NumericsError(
        f"{monitor.bad_in_a_row} updates in a row were not finite, the last at step {step}; none "
        f"was applied or saved. {dump} names the examples and each layer's gradient norm. Lower "
        "config.optim.lr, raise config.optim.warmup, or leave examples out with config.data.skip."
    )
