"""Texts to vectors: one array in a file."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax.checkpoints import pretrained
from fmjax.distributed import launch
from fmjax.evaluation.text_vectors import Embedder
from fmjax.io import disk_cache


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: `config.output` (.npy, float32 [N, D]) with a vector for each record of
    `config.data.train`, in their order."""
    with launch.start(config) as mesh:
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        embedder = Embedder(config, opened, mesh)
        if dry_run:
            return
        path = Path(config.output or Path(workdir) / "embeddings.npy")
        made = path.with_name(f"{path.name}.tmp")
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            out = np.lib.format.open_memmap(made, "w+", np.float32, embedder.shape)
            disk_cache.reserve(made)
        try:
            for index, rows in embedder():
                if jax.process_index() == 0:
                    out[index] = rows
        except BaseException:  # half of a result is none
            if jax.process_index() == 0:
                made.unlink()
            raise
    if jax.process_index() == 0:
        out.flush()
        made.replace(path)
        count, width = embedder.shape
        print(f"\n{opened}\n{count:,} vectors of {width} written to {path}")
