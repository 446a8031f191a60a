"""Texts to vectors: what a model's trunk makes of each, as one array in a file."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import build
from fmjax.checkpoints import pretrained
from fmjax.convert import sentence
from fmjax.data import documents
from fmjax.distributed import launch
from fmjax.errors import ConfigError, NumericsError
from fmjax.evaluation.text_vectors import vectors
from fmjax.io import disk_cache
from fmjax.params import sharding

DEFAULTS = {"format": "texts", "long": "truncate", "seq_len": 128}


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: `config.output` (.npy, float32 [N, D]) with a vector for each record of
    `config.data.train`, in their order.

    A vector is made as a folder of sentence-transformers says (`fmjax.convert.sentence`), else it
    is the mean over the tokens of the last layer; `config.pool` goes before both. With
    `config.normalize` it has length one.
    """
    with launch.start(config) as mesh:
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
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
        split = opened.prepare(settings).splits["train"]
        if split.rows(np.zeros(1, np.int64))["segment_ids"].ndim > 2:
            raise ConfigError(
                f"config.data.columns={settings.get('columns')!r} and config.data.format="
                f"{settings['format']!r} give several texts a record: name one column of texts."
            )
        if dry_run:
            return
        path = Path(config.output or Path(workdir) / "embeddings.npy")
        shape = (len(split), made.width(opened.model.cfg.width))
        layers = made.layers + (sentence.Normalize(),) * config.normalize
        place = lambda row: documents.documents_of(settings)[row].where
        how = config.batch_size, made._replace(layers=layers), mesh, place
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            out = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            disk_cache.reserve(path)
        try:
            for index, rows in vectors(opened, split, *how):
                if jax.process_index() == 0:
                    out[index] = rows
        except NumericsError:  # half of a result is none
            if jax.process_index() == 0:
                path.unlink()
            raise
    if jax.process_index() == 0:
        out.flush()
        print(f"\n{opened}\n{shape[0]:,} vectors of {shape[1]} written to {path}")


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
