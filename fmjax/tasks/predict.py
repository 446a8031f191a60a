"""Predictions of a fine-tuned model for each record of a file: labels, probabilities, values."""

import os
from pathlib import Path
from typing import Any

import jax

from fmjax.checkpoints import pretrained
from fmjax.distributed import launch, processes
from fmjax.evaluation.predictions import Predictor
from fmjax.evaluation.readable import cut, readable
from fmjax.io import results

SHOWN = 5  # records that the terminal gets


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: a line of JSON for each record of `config.data.train`, in their order.

    A line holds the columns that the model reads, and the output of each objective of the run.
    Records need no label. Written to `config.output`, else predictions.jsonl in `workdir`.
    """
    with launch.start(config) as mesh:
        path = Path(config.output or Path(workdir) / "predictions.jsonl")
        processes.first(lambda: results.check_file(path, results.OUTPUT))
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        predictor = Predictor(config, opened, mesh)
        if dry_run:
            return
        records = predictor()
    if jax.process_index() != 0:
        return
    results.write_lines(path, (fields | output for fields, output in records), results.OUTPUT)
    print(f"\n{opened}")
    for fields, output in records[:SHOWN]:
        texts = " | ".join(cut(str(value)) for value in fields.values())
        print(f"  {texts}\n    {readable(output)}")
    print(f"{len(records):,} predictions written to {path}")
