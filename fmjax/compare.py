"""Methods of adaptation side by side: one base, one task, as many steps, several seeds.

A method is a config of training. Its seeds are the arms of one program (`fmjax.arms`), each with a
run folder, <method>/arms/<i>. What they come to is in <method>.json, lists with a number a seed:

    metrics               after the last step; of classes also how well calibrated they are
    trainable_parameters  of `parameters` in all
    kept_bytes            of what trains in float32: what is kept of a seed, beside the base
    flops                 of the training of a seed, in matrix products
    seconds               of the training steps of a seed; the seeds are computed together
    peak_bytes            of the step of one seed by the compiler, state and temporary, a device
    pretraining           the loss of `config.pretraining` `before` training and `after` it, a list:
                          what is higher has been forgotten

What has its file is not done again, so that the same command goes on.
"""

import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fmjax import (
    adapters,
    arms,
    build,
    data,
    evaluate,
    plan,
    pretrained,
    processes,
    setup,
    train,
    trees,
    workdir,
)
from fmjax import config as configs
from fmjax import objectives as losses
from fmjax.logs import plain
from fmjax.progress import count, duration

MAIN = ("accuracy", "spearman", "f1", "exact_match", "retrieval")  # the first of them is shown


def run(config: Any, workdir_path: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: trains all of `config.methods`, and prints the table."""
    folder = Path(workdir_path)
    methods = {name: method(config, name) for name, _, _ in config.methods}
    if dry_run:
        for name, own in methods.items():
            changed = configs.diff(next(iter(methods.values())), own)
            told = ", ".join(f"{key}={value!r}" for key, _, value in changed)
            print(f"{name:<12} {told}")
        return
    remaining = [own for name, own in methods.items() if not (folder / f"{name}.json").exists()]
    for own in remaining:  # A mistake in the last is not found hours later.
        with processes.start(own) as mesh:
            setup.setup(configs.arms(own)[0], mesh)
    measure = None
    records = {}
    for name, own in methods.items():
        file = folder / f"{name}.json"
        if not file.exists():
            print(f"\n{name}", flush=True)
            started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            train.run(own, folder / name)
            with processes.start(own) as mesh:
                measure = measure or pretraining_loss(config.pretraining, own.init, mesh)
                record = {"method": name, "started": started, **found(own, folder / name, mesh)}
                after = [measure(str(arm), mesh) for arm in _folders(folder / name, config.seeds)]
                record["pretraining"] = {"before": measure(own.init, mesh), "after": after}
            workdir.write_atomic(file, json.dumps(plain(record), indent=2))
        records[name] = json.loads(file.read_text(encoding="utf-8"))
    show(records)
    print(f"\n{folder} has all of it, a file a method")


def method(config: Any, name: str) -> Any:
    """The config of one method, with the data, the base, the seeds and the settings of all."""
    file, own = next((file, own) for other, file, own in config.methods if other == name)
    given = {f"data.{key}": value for key, value in config.data.items() if value is not None}
    given |= {"init": config.init, "arms": (("seed", tuple(config.seeds)),)}
    if len(config.seeds) == 1:
        given |= {"arms": (), "seed": config.seeds[0]}
    words = [*config.shared, *(f"{key}={value}" for key, value in given.items()), *own]
    return configs.load(file, [f"--config.{word}" for word in words])


def found(config: Any, folder: Path, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What the finished arms in `folder` came to, and what one of them costs."""
    singles = configs.arms(config)
    each = [
        json.loads((arm / "summary.json").read_text(encoding="utf-8"))
        for arm in _folders(folder, singles)
    ]
    together = arms.prepare(singles[0], mesh, lambda: None)
    run = together.wide
    moving = run.split(run.abstract.params)[0]
    names = [name for name in each[0]["metrics"] if name.startswith("validation/")]
    return {
        "config": configs.to_json(configs.redact(config)),
        "digest": configs.digest(config),
        "seeds": [single.seed for single in singles],
        "steps": run.total,
        "metrics": {name: [one["metrics"][name] for one in each] for name in names},
        "parameters": adapters.parameters(run.model, run.abstract.params),
        "trainable_parameters": trees.size(moving),
        "kept_bytes": trees.nbytes(moving),
        "flops": [one["metrics"]["flops"] for one in each],
        "seconds": [one["goodput"]["step"] / len(each) for one in each],
        "peak_bytes": plan.peak_bytes(plan.compiled(together)),
        "environment": each[0]["environment"],
    }


def pretraining_loss(
    settings: Any, source: str, mesh: jax.sharding.Mesh
) -> Callable[[str, jax.sharding.Mesh], float]:
    """A function (folder, mesh) that gives the loss of the objectives that `source` was trained
    with, of a model that was made of it; heads that it lacks are those of `source`."""
    base = pretrained.open_folder(source, mesh, settings.precision)
    chosen, goals, batch_size = evaluate.settings_of(settings, base)
    dataset = data.prepare(chosen, {"name": str(base.tokenizer)})
    split = evaluate.split_of(dataset, settings.split, base)
    objectives = losses.build(goals, target=dataset.target, vocab=dataset.vocab)

    @functools.cache  # the source is asked for beside every method
    def measure(folder: str, mesh: jax.sharding.Mesh) -> float:
        opened = pretrained.open_folder(folder, mesh, settings.precision)
        model, params = with_heads(opened, base, goals)
        step = jax.jit(evaluate.make_step(build.apply(model), objectives))
        batches = data.eval_batches(split, batch_size=batch_size, limit=settings.limit)
        totals, _ = evaluate.collect(step, params, batches, mesh, keep=False)
        return losses.mean(totals, objectives)["loss"]

    return measure


def with_heads(
    opened: pretrained.Opened, base: pretrained.Opened, goals: Iterable[str]
) -> tuple[Any, Any]:
    """The model and parameters of `opened` with the heads of `base` that it has not.

    Raises ConfigError where the objectives `goals` need one that `base` has not.
    """
    for name in goals:
        base.require_head(name)
    own, heads = trees.flatten(opened.params), trees.flatten(base.params)
    lacking = {p: x for p, x in heads.items() if p.startswith("head/") and p not in own}
    classes = dict(base.model.cfg.classes) | dict(opened.model.cfg.classes)
    cfg = dataclasses.replace(
        opened.model.cfg, lm_head=base.model.cfg.lm_head, classes=tuple(classes.items())
    )
    return opened.model.clone(cfg=cfg), trees.unflatten(own | lacking)


def show(records: Mapping[str, Mapping[str, Any]]) -> None:
    """The table: what each method reaches, with deviations over the seeds, and what it takes."""
    first = next(iter(records.values()))
    names = {name.rpartition("/")[2]: name for name in first["metrics"]}
    main = next((names[key] for key in MAIN if key in names), "validation/loss")
    rows = [["", main.removeprefix("validation/"), "trains", "kept", "FLOP", "time", "peak"]]
    rows[0] += ["forgets"] + [key for key in ("ece", "brier") if key in names]
    for name, record in records.items():
        before, after = record["pretraining"]["before"], record["pretraining"]["after"]
        rows.append(
            [
                name,
                spread(record["metrics"][main]),
                count(record["trainable_parameters"]),
                f"{record['kept_bytes'] / 2**20:,.2f} MiB",
                count(statistics.mean(record["flops"])),
                duration(statistics.mean(record["seconds"])),
                f"{record['peak_bytes'] / 2**20:,.0f} MiB",
                spread([loss - before for loss in after]),
                *(
                    spread(record["metrics"][names[key]])
                    for key in ("ece", "brier")
                    if key in names
                ),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for name, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *padded]))


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def _folders(folder: Path, seeds: Sequence[Any]) -> list[Path]:
    if len(seeds) == 1:
        return [folder]
    return [folder / "arms" / str(arm) for arm in range(len(seeds))]
