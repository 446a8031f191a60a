"""Interface between prepared data of any kind and a run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fmjax.io import disk_cache


@runtime_checkable
class Split(Protocol):
    """Rows that training and evaluation read by number; all arrays are numpy."""

    @property
    def unit_count(self) -> int:
        """Number of units (`Dataset.unit`) of all rows."""

    @property
    def row_units(self) -> int:
        """Largest number of units of a row."""

    @property
    def row_size(self) -> str:
        """Size of a row in words, such as "128 tokens"."""

    def __len__(self) -> int: ...

    def rows(
        self, index: np.ndarray, examples: np.ndarray | None = None, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """Arrays [n, …] of the rows `index` [n]. In training `examples` [n] says which examples of
        the run they are, and what is random is a function of `seed` and it; in evaluation it is
        None, and nothing is random."""

    def widths(self, index: np.ndarray) -> np.ndarray:
        """int [n], the width that each of the rows `index` needs; rows of equal width come together
        in evaluation, and a batch is trimmed to the largest."""

    def trim(self, batch: Mapping[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
        """The batch, as `rows` gives it, without what is wider."""

    def units(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """int32 [n], at least 1, the number of units of each row of a batch."""


@runtime_checkable
class Source(Protocol):
    """Stream of training batches of this process: numpy arrays, with `index` and `units` [n]."""

    def next(self, state: Any) -> dict[str, np.ndarray]:
        """The next batch, for the training state that it will be used in; `Batches` does not need
        it, a source that generates its batches does."""

    def state(self) -> dict[str, Any]:
        """The position, as JSON, for a checkpoint."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at a position that `state` gave."""

    def close(self) -> None:
        """Free what is held."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Prepared data, or a stand-in that has what a config tells before anything is read."""

    splits: Mapping[
        str, Any
    ]  # a `Split` each: "train"; "validation" if there is any; {} of a stand-in
    digest: str  # of the contents, whatever the rows made of them
    format: str  # of the rows
    counts: Mapping[str, Any]  # for the log and the report: of each split, and what was left out
    target: str = ""  # meaning of the labels: "classes", "values", …; "" without labels
    labels: tuple[str, ...] = ()  # names of the classes

    unit = "rows"  # what rows are counted in: throughput, durations, and the log

    @property
    def rows_digest(self) -> str:
        """Digest of the contents and of the rows made of them: other rows are other examples."""
        return disk_cache.digest([self.digest, self.format])

    @property
    def facts(self) -> dict[str, Any]:
        """Keyword arguments that models and objectives may ask for by name."""
        return {"target": self.target, "labels": self.labels}

    @property
    def identity(self) -> dict[str, Any]:
        """JSON of what must not change during a run for its position to mean the same examples."""
        return {
            "data": self.digest,
            "format": self.format,
            "rows": len(self.splits["train"]),
            "labels": list(self.labels),
        }

    @property
    def processors(self) -> Mapping[str, Path]:
        """{name: folder} of what makes arrays of raw data, which a run keeps under these names."""
        return {}

    @property
    def digests(self) -> Mapping[str, str]:
        """{name: hex digits} of what else processes must have alike, such as the vocabulary."""
        return {}

    def source(self, run: Any) -> Source | None:
        """The source of the training batches of a `run` (`fmjax.training.setup.Run`); None: the
        rows of the split "train", in an order that the seed draws."""
        return None

    def example(self, batch: Mapping[str, Any], prepared: Mapping[str, Any]) -> str:
        """Text that shows a person the first row of a batch, and of the batch as the objectives
        have `prepared` it for the model."""
        shapes = {name: tuple(array.shape[1:]) for name, array in batch.items()}
        return f"arrays of a row: {shapes}"

    def texts(self, batch: Mapping[str, np.ndarray]) -> list[str]:
        """Each row of a batch, with the rows' numbers as `index`, as text for lists of examples."""
        return [f"row {number}" for number in batch["index"].tolist()]
