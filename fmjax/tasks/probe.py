"""Feature-based transfer: a classifier of scikit-learn on what a frozen trunk makes of texts.

The vectors are computed once and kept, memory-mapped, under a key of weights, data, layer and
pooling; a second classifier on them starts at once. What a trunk is worth shows beside
`features="words"`: the tokens of each text are counted, in no order, and no trunk is used.
"""

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

from fmjax import build, data
from fmjax.checkpoints import pretrained
from fmjax.distributed import launch
from fmjax.errors import ConfigError, DataError
from fmjax.evaluation import eval_loop, text_vectors
from fmjax.io import disk_cache, environment, metrics_log, results
from fmjax.io.atomic import write_arrays, write_atomic
from fmjax.io.mapped import MappedFiles
from fmjax.io.workdir import EXAMPLES
from fmjax.models import text_pooling
from fmjax.objectives import classify
from fmjax.params import paths, sharding

FILE = "summary.json"
COUNTED = 1024  # examples at a time
DEFAULTS = {"format": "classes", "long": "truncate", "seq_len": 128}


class Features(NamedTuple):
    """Rows of numbers, one an example, which are read in a block of `unchanged()`."""

    rows: Any
    unchanged: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: fits `config.classifier` on the training split, measures it on `validation`.

    Scores are those of the objective `classify`, under the names that training gives them in
    summary.json, which is written to `workdir`, with examples.npz beside it.
    """
    if (Path(workdir) / "config.json").exists():
        raise ConfigError(
            f"--workdir={workdir} holds a training run, whose {FILE} would be lost: use another "
            "one, and --config.folder for the run that features are taken of."
        )
    with launch.start(config) as mesh:
        if jax.process_count() > 1:
            raise ConfigError("The task 'probe' works in one process.")
        path = Path(workdir) / FILE
        results.check_file(path)
        opened = at_layer(
            pretrained.open_folder(config.folder, mesh, config.precision), config.layer, mesh
        )
        given = {key: value for key, value in config.data.items() if value is not None}
        settings = DEFAULTS | given
        build.check_rows(opened.model, settings)
        sharding.check_batch(mesh, config.batch_size)
        dataset = opened.prepare(settings)
        if missing := {"train", "validation"} - dataset.splits.keys():
            raise DataError(
                f"There are no examples for {sorted(missing)}: see config.data.validation and "
                "config.data.validation_fraction."
            )
        words = config.features == "words"
        if words and config.layer is not None:
            raise ConfigError(
                f"config.layer={config.layer} means nothing with config.features='words'."
            )
        fitted = classifier(config.classifier, config.args.to_dict(), words)
        if dry_run:
            return
        make = functools.partial(vectors, opened, dataset, config=config, mesh=mesh)
        if words:
            make = lambda name: Features(counts(dataset, name))
        train, validation = make("train"), make("validation")
    labels = {name: np.asarray(split.labels) for name, split in dataset.splits.items()}
    started = time.monotonic()
    with train.unchanged(), validation.unchanged():
        try:
            fitted.fit(train.rows, labels["train"])
        except (TypeError, ValueError) as error:  # scikit-learn's, of arguments that it cannot use
            raise ConfigError(f"config.args={config.args.to_dict()}: {error}") from error
        seconds = time.monotonic() - started
        told = np.zeros((len(labels["validation"]), len(dataset.labels)))
        told[:, fitted.classes_] = fitted.predict_proba(validation.rows)
    name_row = "row {:,} of the validation split".format
    eval_loop.check_finite(told, f"config.classifier={config.classifier!r}", name_row)
    right = told.argmax(axis=1) == labels["validation"]
    scores = classify.score({"probabilities": told}, labels["validation"])
    metrics = {"accuracy": float(np.mean(right)), **scores}
    shape = train.rows.shape
    print(f"\n{opened}, {config.classifier} on {config.features} {shape} in {seconds:,.1f} s")
    for name, value in metrics.items():
        print(f"  {name:<16} {value:>12,.4f}")
    kept = weights(fitted[-1])
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "folder": opened.source,
        "step": opened.step,
        "data": settings,
        "data_digest": dataset.digest,
        "rows_digest": dataset.rows_digest,
        "trainable_parameters": sum(x.size for x in kept),
        "kept_bytes": sum(x.nbytes for x in kept),
        "metrics": {f"validation/classify/{name}": value for name, value in metrics.items()},
        "seconds": seconds,
        "environment": environment.environment(),
        **{key: config[key] for key in ("features", "layer", "pool", "classifier")},
        "args": config.args.to_dict(),
    }
    results.make_folder(path.parent)
    write_atomic(path, json.dumps(metrics_log.plain(record), indent=2))
    each = {"label": labels["validation"], "classify/accuracy": right}
    write_arrays(path.with_name(EXAMPLES), each)
    print(f"written to {path}")


def classifier(name: str, args: Mapping[str, Any], words: bool = False) -> Any:
    """scikit-learn's logistic regression or MLP, on features of mean 0 and variance 1; on counts of
    `words` by their tf-idf, with logarithms of the counts."""
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kinds = {"logistic": (LogisticRegression, {"max_iter": 1000}), "mlp": (MLPClassifier, {})}
    kind, defaults = kinds[name]
    first = TfidfTransformer(sublinear_tf=True) if words else StandardScaler()
    try:
        return make_pipeline(first, kind(**{"random_state": 0} | defaults | dict(args)))
    except TypeError as error:
        raise ConfigError(f"config.args={dict(args)}: {error}") from error


def weights(fitted: Any) -> list[np.ndarray]:
    """The arrays that the classifier has learned."""
    if hasattr(fitted, "coefs_"):
        return [*fitted.coefs_, *fitted.intercepts_]
    return [fitted.coef_, fitted.intercept_]


def counts(dataset: data.Dataset, name: str) -> Any:
    """[N, V], sparse: how often each token is in each example of the split, in order."""
    from scipy.sparse import csr_matrix, vstack

    split, size, found = dataset.splits[name], dataset.vocab.size, []
    for start in range(0, len(split), COUNTED):
        rows = split.rows(np.arange(start, min(start + COUNTED, len(split))))
        example, place = np.nonzero(rows["segment_ids"])
        shape = len(rows["input_ids"]), size
        tokens = rows["input_ids"][example, place]
        found.append(csr_matrix((np.ones(len(tokens)), (example, tokens)), shape))
    return vstack(found, format="csr")


def at_layer(
    opened: pretrained.Opened, layer: int | None, mesh: jax.sharding.Mesh
) -> pretrained.Opened:
    """The same model, of which `encode` gives the hidden states after `layer` layers."""
    if layer is None:
        return opened
    depth = opened.model.cfg.depth
    if not 1 <= layer <= depth:
        raise ConfigError(f"config.layer={layer}: the model has layers 1 to {depth}.")
    kinds = [(kind, i < layer) for i, kind in enumerate(opened.model.kinds)]
    stacks = paths.runs(kinds)
    params = jax.jit(lambda params: paths.restack(params, stacks))(opened.params)
    return opened._replace(model=opened.model.clone(stacks=stacks, stop=layer), params=params)


def vectors(
    opened: pretrained.Opened,
    dataset: data.Dataset,
    name: str,
    config: Any,
    mesh: jax.sharding.Mesh,
) -> Features:
    """[N, D] in float32, memory-mapped: one vector an example of the split, in order."""
    split = dataset.splits[name]
    weights = xxhash.xxh3_128()
    for parameter, value in sorted(paths.unstack(opened.params).items()):
        if not parameter.startswith("head/"):
            weights.update(np.asarray(jax.device_get(value)).tobytes())
    how = repr(dataclasses.astuple(opened.model.cfg)), config.layer, config.pool
    key = [weights.hexdigest(), dataset.digest, dataset.format, name, *how]
    home = disk_cache.root(config.data.cache or "") / f"vectors-{disk_cache.digest(key)}"

    def compute(folder: Path) -> dict:
        shape = len(split), opened.model.cfg.width
        out = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, shape)
        disk_cache.reserve(folder / "vectors.npy")
        made = functools.partial(text_pooling.pooled, pool=config.pool)
        for index, rows in text_vectors.vectors(opened, split, config.batch_size, made, mesh):
            out[index] = rows
        out.flush()
        return {}

    with disk_cache.lock(home.with_suffix(".lock"), print, lambda: None):
        if disk_cache.verified(home, print) is None:
            disk_cache.build(home, compute)
        files = MappedFiles(home)
        return Features(files.npy("vectors.npy"), files.unchanged)
