"""The file that measurements of a folder are added to."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fmjax.checkpoints import pretrained
from fmjax.distributed import processes
from fmjax.io import results
from fmjax.io.storage import WORKDIR

COPY = "config.folder, such as a copy of it"


class ResultsLog:
    """JSON lines in the file `name` of the folder `source` where that is a run's, else of
    `workdir`. Raises CheckpointError where nothing can be added."""

    def __init__(self, source: str, workdir: str | os.PathLike, name: str):
        is_run = pretrained.is_run(source)
        self.path, self._key = Path(source if is_run else workdir) / name, WORKDIR
        if is_run:
            self._key = COPY
        processes.first(lambda: results.check_growing(self.path, self._key))

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line, and says so."""
        if jax.process_index() == 0:
            results.append(self.path, record, self._key)
            print(f"added to {self.path}")
