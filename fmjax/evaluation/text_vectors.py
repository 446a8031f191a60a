"""Vectors of texts: the hidden states of a model, pooled."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fmjax import build, data
from fmjax.checkpoints import pretrained
from fmjax.convert import sentence
from fmjax.data import documents
from fmjax.errors import ConfigError
from fmjax.evaluation import eval_loop
from fmjax.objectives import losses
from fmjax.params import sharding

DEFAULTS = {"format": "texts", "long": "truncate", "seq_len": 128}


class Embedder:
    """Vectors of the texts of `config.data.train` by an opened model.

    `config` has the keys of configs/embed.py. A vector is made as a folder of sentence-transformers
    says (`fmjax.convert.sentence`), else it is the mean over the tokens of the last layer;
    `config.pool` goes before both. With `config.normalize` it has length one. `shape` is that of
    all vectors. Raises ConfigError and DataError where the model and the texts do not fit.
    """

    def __init__(self, config: Any, opened: pretrained.Opened, mesh: jax.sharding.Mesh):
        made, defaults = described(opened, config.pool)
        given = {key: value for key, value in config.data.items() if value is not None}
        settings = DEFAULTS | defaults | given | {"label": "", "validation_fraction": 0}
        if settings.get("source_prefix") and not made.include_prompt:
            raise ConfigError(
                f"{opened} leaves the tokens of a prompt out of its vectors "
                "(include_prompt=False), which is not supported: set --config.data.source_prefix= "
                "to have no prompt."
            )
        if not (settings.get("train") or settings.get("path")):
            raise ConfigError("config.data.train is empty: set it to the file of texts.")
        build.check_rows(opened.model, settings)
        sharding.check_batch(mesh, config.batch_size)
        self.split = opened.prepare(settings).splits["train"]
        if self.split.rows(np.zeros(1, np.int64))["segment_ids"].ndim > 2:
            raise ConfigError(
                f"config.data.columns={settings.get('columns')!r} and config.data.format="
                f"{settings['format']!r} give several texts a record: name one column of texts."
            )
        layers = made.layers + (sentence.Normalize(),) * config.normalize
        self.vectors = made._replace(layers=layers)
        self.shape = len(self.split), made.width(opened.model.cfg.width)
        self.opened, self.mesh, self.settings = opened, mesh, settings
        self.batch_size = config.batch_size

    def __call__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row numbers, their vectors) batch by batch. Raises NumericsError for vectors that are
        not finite."""
        place = lambda row: documents.documents_of(self.settings)[row].where
        arguments = self.batch_size, self.vectors, self.mesh, place
        return vectors(self.opened, self.split, *arguments)


def described(opened: pretrained.Opened, pool: str) -> tuple[sentence.Vectors, dict[str, Any]]:
    """(how vectors are made, what `config.data` is by default) for an opened model, whose folder
    may be one of sentence-transformers; a `pool` that is not empty replaces the folder's."""
    made = None if opened.config is not None else sentence.read(opened.tokenizer)
    defaults: dict[str, Any] = {}
    if made is not None:
        defaults["seq_len"] = min(filter(None, (made.seq_len, opened.model.cfg.max_len)))
        defaults["source_prefix"] = made.prompt
        if made.prompts and not made.prompt and jax.process_index() == 0:
            names = ", ".join(f"{name} {text!r}" for name, text in made.prompts.items())
            print(f"no prompt is put before the texts (config.data.source_prefix); it has {names}")
    made = made or sentence.Vectors()
    return (made._replace(pools=(pool,)) if pool else made), defaults


def vectors(
    opened: pretrained.Opened,
    split: Any,
    batch_size: int,
    made: Callable[[jax.Array, jax.Array], jax.Array],
    mesh: jax.sharding.Mesh,
    place: Callable[[int], str] = "row {:,}".format,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(row numbers, their vectors) batch by batch, in the memory of the host; `made` gives the
    vectors of hidden states and segment ids.

    Raises NumericsError for vectors that are not finite, with the `place` of the first.
    """
    apply = build.apply(opened.model)

    @jax.jit
    def step(params, batch):
        hidden = apply(params, batch, method="encode")
        whole = made(hidden, batch["segment_ids"])
        return batch["index"], losses.real_rows(batch) > 0, whole

    batches = data.eval_batches(
        split,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for batch in sharding.to_device(batches, mesh):
        index, real, rows = eval_loop.on_host(step(opened.params, batch))
        index, rows = index[real], rows[real]
        eval_loop.check_finite(rows, opened.source, lambda i, index=index: place(int(index[i])))
        yield index, rows
