"""Feature-based transfer: a classifier of scikit-learn on what a frozen trunk makes of texts.

The vectors are computed once and kept, memory-mapped, under a key of weights, data, layer and
pooling; a second classifier on them starts at once.
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
import xxhash

from fmjax import build, data, embed, logs, pretrained, processes, sharding, trees
from fmjax.data import cache
from fmjax.errors import ConfigError, DataError
from fmjax.objectives import classify

FILE = "probe.jsonl"
DEFAULTS = {"format": "classes", "long": "truncate", "seq_len": 128}


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: fits `config.classifier` on the training split, measures it on `validation`.

    Scores are those of the objective `classify`. Adds a line to probe.jsonl in `workdir`.
    """
    with processes.start(config) as mesh:
        if jax.process_count() > 1:
            raise ConfigError("The task 'probe' works in one process.")
        opened = at_layer(
            pretrained.open_folder(config.folder, mesh, config.precision), config.layer, mesh
        )
        given = {key: value for key, value in config.data.items() if value is not None}
        settings = DEFAULTS | given
        build.check_rows(opened.model, settings)
        sharding.check_batch(mesh, config.batch_size)
        dataset = data.prepare(settings, {"name": str(opened.tokenizer)})
        if missing := {"train", "validation"} - dataset.splits.keys():
            raise DataError(
                f"There are no examples for {sorted(missing)}: see config.data.validation and "
                "config.data.validation_fraction."
            )
        fitted = classifier(config.classifier, config.args.to_dict())
        if dry_run:
            return
        features = {
            name: vectors(opened, dataset, name, config, mesh) for name in ("train", "validation")
        }
    labels = {name: np.asarray(split.labels) for name, split in dataset.splits.items()}
    started = time.monotonic()
    try:
        fitted.fit(features["train"], labels["train"])
    except (TypeError, ValueError) as error:  # scikit-learn's, of arguments that it cannot use
        raise ConfigError(f"config.args={config.args.to_dict()}: {error}") from error
    seconds = time.monotonic() - started
    told = np.zeros((len(labels["validation"]), len(dataset.labels)))
    told[:, fitted.classes_] = fitted.predict_proba(features["validation"])
    right = told.argmax(axis=1) == labels["validation"]
    scores = classify.score({"probabilities": told}, labels["validation"])
    metrics = {"accuracy": float(np.mean(right)), **scores}
    print(f"\n{opened}, {config.classifier} on {features['train'].shape} in {seconds:,.1f} s")
    for name, value in metrics.items():
        print(f"  {name:<16} {value:>12,.4f}")
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "folder": opened.source,
        "step": opened.step,
        "layer": config.layer,
        "pool": config.pool,
        "classifier": config.classifier,
        "args": config.args.to_dict(),
        "data": settings,
        "metrics": metrics,
    }
    path = Path(workdir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(logs.plain(record)) + "\n")
    print(f"added to {path}")


def classifier(name: str, args: Mapping[str, Any]) -> Any:
    """scikit-learn's logistic regression or MLP, on features of mean 0 and variance 1."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kinds = {"logistic": (LogisticRegression, {"max_iter": 1000}), "mlp": (MLPClassifier, {})}
    kind, defaults = kinds[name]
    try:
        return make_pipeline(StandardScaler(), kind(**{"random_state": 0} | defaults | dict(args)))
    except TypeError as error:
        raise ConfigError(f"config.args={dict(args)}: {error}") from error


def at_layer(
    opened: pretrained.Opened, layer: int | None, mesh: jax.sharding.Mesh
) -> pretrained.Opened:
    """The same model, of which `encode` gives the hidden states behind `layer` layers."""
    if layer is None:
        return opened
    depth = opened.model.cfg.depth
    if not 1 <= layer <= depth:
        raise ConfigError(f"config.layer={layer}: the model has layers 1 to {depth}.")
    kinds = [(kind, i < layer) for i, kind in enumerate(opened.model.kinds)]
    stacks = trees.runs(kinds)
    params = jax.jit(lambda params: trees.restack(params, stacks))(opened.params)
    return opened._replace(model=opened.model.clone(stacks=stacks, stop=layer), params=params)


def vectors(
    opened: pretrained.Opened,
    dataset: data.Dataset,
    name: str,
    config: Any,
    mesh: jax.sharding.Mesh,
) -> np.ndarray:
    """[N, D] in float32, memory-mapped: one vector an example of the split, in order."""
    split = dataset.splits[name]
    weights = xxhash.xxh3_128()
    for parameter, value in sorted(trees.unstack(opened.params).items()):
        if not parameter.startswith("head/"):
            weights.update(np.asarray(jax.device_get(value)).tobytes())
    how = repr(dataclasses.astuple(opened.model.cfg)), config.layer, config.pool
    key = [weights.hexdigest(), dataset.digest, dataset.format, name, *how]
    home = cache.root(config.data.cache or "") / f"vectors-{cache.digest(key)}"

    def compute(folder: Path) -> dict:
        shape = len(split), opened.model.cfg.width
        out = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, shape)
        for index, rows in embed.vectors(
            opened, split, config.batch_size, config.pool, False, mesh
        ):
            out[index] = rows
        out.flush()
        return {}

    with cache.lock(home.with_suffix(".lock"), print, lambda: None):
        if cache.verified(home, print) is None:
            cache.build(home, compute)
    return np.load(home / "vectors.npy", mmap_mode="r")
