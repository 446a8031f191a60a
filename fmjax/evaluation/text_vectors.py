"""Vectors of texts, in the memory of the host."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fmjax import build, data
from fmjax.checkpoints import pretrained
from fmjax.evaluation import eval_loop
from fmjax.objectives import losses
from fmjax.params import sharding


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
        names = ("input_ids", "segment_ids", "positions", "token_types")
        hidden = apply(params, *(batch[name] for name in names), method="encode")
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
