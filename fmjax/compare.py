"""Methods of adaptation side by side: one base, one task, as many steps, several seeds.

A method is a config of training. Its seeds are the arms of one program (`fmjax.arms`), each with a
run folder, <method>/arms/<i>. What they come to is in <method>.json, lists with a number a seed:

    metrics               after the last step; of classes also how well calibrated they are
    trainable_parameters  of `parameters` in all
    kept_bytes            of what trains in float32: what is kept of a seed, beside the base (which
                          PiSSA and LoftQ change, too)
    flops                 of the training of a seed, in matrix products
    seconds               of the training steps of a seed; the seeds are computed together
    peak_bytes            of the step of one seed by the compiler, state and temporary, a device
    pretraining           the loss of `config.pretraining` `before` training and `after` it, a list:
                          what is higher has been forgotten

What has its file is not done again, so that the same command goes on.
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fmjax import (
    adapters,
    arms,
    build,
    evaluate,
    plan,
    pretrained,
    processes,
    train,
    trees,
    workdir,
)
from fmjax import config as configs
from fmjax.errors import ConfigError, NumericsError
from fmjax.logs import plain
from fmjax.progress import count, duration, spread, table

MAIN = ("accuracy", "spearman", "f1", "exact_match", "retrieval")  # the first of them is shown


def run(config: Any, workdir_path: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: trains all of `config.methods`, and prints the table.

    Raises ConfigError for a method that cannot be run, before any is, and NumericsError in the end
    where one of them diverged.
    """
    folder = Path(workdir_path)
    methods = {name: method(config, name) for name, _, _ in config.methods}
    if dry_run:
        for name, own in methods.items():
            changed = configs.diff(next(iter(methods.values())), own)
            told = ", ".join(f"{key}={value!r}" for key, _, value in changed)
            print(f"{name:<12} {told}")
        return
    digests = {
        name: configs.digest(ConfigDict({"method": own, "pretraining": config.pretraining}))
        for name, own in methods.items()
    }
    records = {name: kept(folder / f"{name}.json", digest) for name, digest in digests.items()}
    with processes.start(next(iter(methods.values()))) as mesh:
        measure = PretrainingLoss(config.pretraining, config.init, mesh)
        for name, own in methods.items():
            if records[name] is None:  # A mistake in the last is not found hours later.
                measure.check(arms.prepare(own, mesh, lambda: None).wide)
        before = measure(config.init, mesh)
    for name, own in methods.items():
        if records[name] is not None:
            continue
        print(f"\n{name}", flush=True)
        record = {"method": name, "digest": digests[name], "date": time.strftime("%Y-%m-%d")}
        try:
            train.run(own, folder / name)
        except NumericsError as error:
            record["failed"] = str(error)
        else:
            with processes.start(own) as mesh:
                record |= found(own, folder / name, mesh)
                after = [measure(str(arm), mesh) for arm in workdir.of_arms(folder / name, own)]
                record["pretraining"] = {"before": before, "after": after}
        workdir.write_atomic(folder / f"{name}.json", json.dumps(plain(record), indent=2))
        records[name] = kept(folder / f"{name}.json", digests[name])
    show(records)
    print(f"\n{folder} has all of it, a file a method")
    if failed := [name for name, record in records.items() if "failed" in record]:
        raise NumericsError(f"{failed[0]}: {records[failed[0]]['failed']}")


def kept(file: Path, digest: str) -> dict[str, Any] | None:
    """What an earlier command has found of a method; None where there is nothing yet.

    Raises ConfigError where that was another config.
    """
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["digest"] != digest:
        raise ConfigError(
            f"{file} is of another config than config.methods, config.shared, config.data and "
            "config.pretraining make now: use another --workdir, or remove it and the folder "
            "beside it."
        )
    return record


def method(config: Any, name: str) -> Any:
    """The config of one method, with the data, the base, the seeds and the settings of all."""
    file, own = next((file, own) for other, file, own in config.methods if other == name)
    for word in (*config.shared, *own):
        key = word.partition("=")[0]
        if key in ("arms", "seed", "init", "cache_prefix") or key.startswith(("data.", "distrib")):
            raise ConfigError(
                f"config.methods, config.shared: {key} is the same for all methods: set "
                "config.init, config.seeds and config.data. The frozen prefix is not cached, "
                "and one process does all, so that costs compare."
            )
    given = {f"data.{key}": value for key, value in config.data.items() if value is not None}
    given |= {"init": config.init, "arms": (("seed", tuple(config.seeds)),)}
    if len(config.seeds) == 1:
        given |= {"arms": (), "seed": config.seeds[0]}
    words = [*config.shared, *(f"{key}={value}" for key, value in given.items()), *own]
    return configs.load(file, [f"--config.{word}" for word in words])


def found(config: Any, folder: Path, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What the finished arms in `folder` came to, and what one of them costs."""
    singles = configs.arms(config)
    read = lambda arm: json.loads((arm / "summary.json").read_text(encoding="utf-8"))
    each = [read(arm) for arm in workdir.of_arms(folder, config)]
    together = arms.prepare(singles[0], mesh, lambda: None)
    run = together.wide
    moving = run.split(run.abstract.params)[0]
    names = [name for name in each[0]["metrics"] if name.startswith("validation/")]
    return {
        "config": json.loads(configs.to_json(configs.redact(config))),
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


class PretrainingLoss:
    """The loss that `source` was trained with, of a model that was made of it.

    Heads that the model lacks are those of `source`. Texts stand alone in their rows, as a prompt
    has to be before each.
    """

    def __init__(self, settings: Any, source: str, mesh: jax.sharding.Mesh):
        self.base = pretrained.open_folder(source, mesh, settings.precision)
        self.precision = self.base.model.cfg.dtype
        self.measure = evaluate.Measure(settings, self.base, mesh, alone=True)

    def check(self, run: Any) -> None:
        """Refuses a run whose model has no room for these texts."""
        pretrained.check_head(run.config, run.dataset.labels)
        try:
            build.check_rows(run.model, self.measure.settings)
        except ConfigError as error:
            raise ConfigError(f"for config.pretraining: {error}") from error

    def __call__(self, folder: str, mesh: jax.sharding.Mesh) -> float:
        opened = pretrained.open_folder(folder, mesh, self.precision)
        return self.measure(*with_heads(opened, self.base), mesh)["loss"]


def with_heads(opened: pretrained.Opened, base: pretrained.Opened) -> tuple[Any, Any]:
    """The model and parameters of `opened` with the heads of `base` that it has not."""
    own, heads = trees.flatten(opened.params), trees.flatten(base.params)
    lacking = {p: x for p, x in heads.items() if p.startswith("head/") and p not in own}
    classes = dict(base.model.cfg.classes) | dict(opened.model.cfg.classes)
    cfg = dataclasses.replace(
        opened.model.cfg, lm_head=base.model.cfg.lm_head, classes=tuple(classes.items())
    )
    return opened.model.clone(cfg=cfg), trees.unflatten(own | lacking)


def show(records: Mapping[str, Mapping[str, Any]]) -> None:
    """The table: what each method reaches, with deviations over the seeds, and what it takes."""
    done = [record for record in records.values() if "failed" not in record]
    names = {name.rpartition("/")[2]: name for record in done for name in record["metrics"]}
    main = next((names[key] for key in MAIN if key in names), "validation/loss")
    scores = [key for key in ("ece", "brier") if key in names]
    heads = ["", main.removeprefix("validation/"), "trains", "kept", "FLOP", "time", "peak"]
    rows = [[*heads, "forgets", *scores]]
    for name, record in records.items():
        if "failed" in record:
            rows.append([name, "failed", *[""] * (len(rows[0]) - 2)])
            continue
        before, after = record["pretraining"]["before"], record["pretraining"]["after"]
        rows.append(
            [
                name,
                spread(record["metrics"][main]),
                count(record["trainable_parameters"]),
                f"{record['kept_bytes'] / 2**20:,.2f} MiB",
                count(np.mean(record["flops"])),
                duration(np.mean(record["seconds"])),
                f"{record['peak_bytes'] / 2**20:,.0f} MiB",
                spread([float(loss) - float(before) for loss in after]),
                *(spread(record["metrics"][names[key]]) for key in scores),
            ]
        )
    print()
    print(table(rows))
