"""Texts to vectors: one array in a file."""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax.checkpoints import pretrained
from fmjax.distributed import launch, processes
from fmjax.evaluation.text_vectors import Embedder
from fmjax.io import disk_cache, results


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: `config.output` (.npy, float32 [N, D]) with a vector for each record of
    `config.data.train`, in their order."""
    with launch.start(config) as mesh, contextlib.ExitStack() as stack:
        path = Path(config.output or Path(workdir) / "embeddings.npy")
        processes.first(lambda: results.check_file(path, results.OUTPUT))
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        embedder = Embedder(config, opened, mesh)
        if dry_run:
            return
        if jax.process_index() == 0:
            made = stack.enter_context(results.replacing(path, results.OUTPUT))
            out = np.lib.format.open_memmap(made, "w+", np.float32, embedder.shape)
            disk_cache.reserve(made)
        for index, rows in embedder():
            if jax.process_index() == 0:
                out[index] = rows
        if jax.process_index() == 0:
            out.flush()
    if jax.process_index() == 0:
        count, width = embedder.shape
        print(f"\n{opened}\n{count:,} vectors of {width} written to {path}")
