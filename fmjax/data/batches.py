"""Batches as a pure function of (seed, step), read ahead by Grain from a position one can save."""

from collections.abc import Iterator, Sequence

import numpy as np

from fmjax.data import order
from fmjax.data.dataset import Dataset, Split
from fmjax.errors import ConfigError, DataError

Ranges = Sequence[Sequence[int]]  # (first, last + 1) each, in ascending order and apart
EVALUATION = 0x45564C  # the key of the order of evaluation, which no seed changes
DRAWN = 0x44524157  # the key of which examples a run sees, beside its seed


class Batches:
    """Endless iterator over the steps, made by `batches`. Close it: it reads ahead in threads."""

    def __init__(self, source: "_Steps", start: int):
        import grain  # brings jax along where it is installed, so not at the top

        self._source = source
        data = grain.MapDataset.source(source)
        # Numpy holds the interpreter's lock most of the time: a second thread hides page faults,
        # more do nothing.
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        self._iterator = iter(data.to_iter_dataset(options))
        self._go(start)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def next(self, state: object) -> dict[str, np.ndarray]:
        """The next batch, whatever the training state."""
        return next(self)

    def state(self) -> dict:
        """The position, as JSON: {"next_index": the step of the next batch, "skip": the ranges}."""
        skip = [list(span) for span in self._source.skip]
        return {"next_index": int(self._iterator.get_state()["next_index"]), "skip": skip}

    def restore(self, state: dict) -> None:
        """Go on at a position that `state` gave, on any number of processes.

        What is skipped may have changed, but not in the past: `DataError`.
        """
        step = int(state["next_index"])
        self._source.check_past(step, state.get("skip", ()))
        self._go(step)

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()

    def _go(self, step: int) -> None:
        self._iterator.set_state({"next_index": step})


def batches(
    split: Split,
    *,
    batch_size: int,
    seeds: Sequence[int],
    process_index: int = 0,
    process_count: int = 1,
    start: int = 0,
    skip: Ranges = (),
    drawn: int = 0,
) -> Batches:
    """Training batches from step `start` on; every epoch visits each row once, in its own order.

    `batch_size` counts all processes, and each gets its block of rows. A batch may span two epochs.
    Examples whose `index` is in `skip` are passed over: those after them move up. Of several
    `seeds` each has its own order, and arrays get an axis of seeds in front. Each draws the rows
    that it sees, where `drawn` says how many; fewer are a part of more.
    """
    rows = check_drawn(split, drawn)
    if rows < batch_size:
        raise DataError(
            f"The training split has {rows} rows, fewer than one batch. Set "
            f"config.batch_size to at most {rows}, or use more data or smaller rows (now of "
            f"{split.row_size})."
        )
    mine = _block(batch_size, process_index, process_count)
    return Batches(_Steps(split, batch_size, seeds, mine, skip, rows), start)


def check_drawn(split: Split, drawn: int) -> int:
    """Number of rows that a run sees if it draws so many, 0: all. Raises DataError for more than
    all."""
    if drawn > len(split):
        raise DataError(
            f"config.data.examples={drawn}, but the training split has {len(split)} rows."
        )
    return drawn or len(split)


def examples(step: int, *, batch_size: int, skip: Ranges = ()) -> tuple[int, int]:
    """(first, last + 1) of the examples in the batch of `step`, as `skip` and `index` count them.

    Where `skip` cuts a batch, what it skips is in between.
    """
    first, last = order.outside(np.array([0, batch_size - 1]) + step * batch_size, skip)
    return int(first), int(last) + 1


def eval_batches(
    split: Split,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    limit: int = 0,
    alike: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, at most `limit` batches (0: all); the last batch is filled with empty rows
    (all zero).

    One fixed permutation decides which rows the first `limit` batches have, so that they are a fair
    sample. Rows that need as many columns come together, the longest first, unless `alike` is
    False, for losses that compare the rows of a batch. All processes get the same number of
    batches, and the same rows whatever their number.
    """
    mine = _block(batch_size, process_index, process_count)
    places = np.arange(eval_steps(split, batch_size, limit) * batch_size)
    rows = order.permuted(places[places < len(split)], len(split), EVALUATION)
    if alike:
        rows = rows[np.argsort(-split.widths(rows), kind="stable")]
    for start in range(0, len(places), batch_size):
        taken = rows[start : start + batch_size]
        inside = np.arange(batch_size) < len(taken)
        filled = np.concatenate([taken, np.zeros(batch_size - len(taken), taken.dtype)])
        width, own, inside = int(split.widths(taken).max()), filled[mine], inside[mine]
        batch = _arrays(split, split.rows(own), own, width)
        for array in batch.values():
            array[~inside] = 0
        yield batch


def eval_steps(split: Split, batch_size: int, limit: int = 0) -> int:
    """Number of batches that `eval_batches` gives."""
    steps = -(-len(split) // batch_size)
    return min(steps, limit) if limit else steps


def fingerprint(dataset: Dataset, *, seed: int, batch_size: int) -> dict:
    """Facts that must not change during a run for its position to mean the same data."""
    return {**dataset.identity, "seed": seed, "batch_size": batch_size}


def check_fingerprint(saved: dict, now: dict) -> None:
    """`DataError` naming every field in which the data of a checkpoint differ from this run's."""
    different = [
        f"  {key}: {saved.get(key, 'absent')} in the checkpoint, {now.get(key, 'absent')} now"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
    if different:
        raise DataError(
            "The run cannot resume: its data differ, so the saved position would mean other "
            "examples.\n"
            + "\n".join(different)
            + "\nUse the checkpoint's settings, or start anew with --fresh or another --workdir."
        )


class _Steps:
    """The source that Grain indexes: item `step` is this process's whole batch."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seeds: Sequence[int],
        mine: np.ndarray,
        skip: Ranges,
        rows: int,
    ):
        self.split, self.batch_size, self.seeds, self.mine = split, batch_size, seeds, mine
        self.rows = rows  # of the split that each seed sees
        self.skip = [(first, end) for first, end in skip]

    def __len__(self) -> int:
        return 2**62  # endless; every place below is computed

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        # Of the whole batch, so that all processes agree on its width.
        places = order.outside(step * self.batch_size + np.arange(self.batch_size), self.skip)
        epoch, place = np.divmod(places, self.rows)
        rows = [order.permuted(place, self.rows, seed, epoch) for seed in self.seeds]
        if self.rows < len(self.split):
            drawn = lambda one, seed: order.permuted(one, len(self.split), seed, DRAWN)
            rows = [drawn(one, seed) for one, seed in zip(rows, self.seeds, strict=True)]
        width, places = int(self.split.widths(np.concatenate(rows)).max()), places[self.mine]
        batches = [
            self._batch(step, width, mine[self.mine], places, seed)
            for mine, seed in zip(rows, self.seeds, strict=True)
        ]
        if len(batches) == 1:
            return batches[0]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    def _batch(self, step, width, rows, places, seed):
        try:
            return _arrays(self.split, self.split.rows(rows, places, seed), places, width)
        except Exception as error:  # raised in a thread: say where
            raise DataError(
                f"Reading the batch of step {step} (rows {rows[:4]}…) failed: {error}"
            ) from error

    def check_past(self, steps: int, skipped: Ranges) -> None:
        """Raise DataError if the steps so far skipped other examples than `skip` says they did."""
        seen = int(order.outside(steps * self.batch_size - 1, skipped)) + 1 if steps else 0
        past = lambda ranges: [(first, end) for first, end in ranges if first < seen]
        if past(skipped) != past(self.skip):
            raise DataError(
                f"config.data.skip={self.skip} would change the past: of the {seen} examples "
                f"before step {steps} the checkpoint skipped {past(skipped)}. Skip later ones, go "
                "back by removing the newest folders of checkpoints/, or start anew with --fresh."
            )

    def __repr__(self) -> str:  # Grain prints it in its errors
        return f"Steps(rows={self.rows}, batch_size={self.batch_size}, seeds={self.seeds})"


def full_row(split: Split) -> dict[str, np.ndarray]:
    """The first row of a split at its full width, as a batch of one."""
    zero = np.zeros(1, np.int64)
    return _arrays(split, split.rows(zero), zero)


def _arrays(
    split: Split, rows: dict[str, np.ndarray], number: np.ndarray, width: int | None = None
) -> dict[str, np.ndarray]:
    """A batch: rows trimmed to `width`, the `units` of each and their `index`."""
    batch = rows if width is None else split.trim(rows, width)
    # int32 for the accelerator; after 2^31 examples the masks keyed by it repeat, which harms
    # nobody.
    index = (number & 0x7FFFFFFF).astype(np.int32)
    return {**batch, "units": split.units(batch), "index": index}


def _block(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """The rows of the global batch that this process holds: contiguous, as jax lays out a sharded
    batch.
    """
    if batch_size % process_count:
        raise ConfigError(
            f"config.batch_size={batch_size} must be a multiple of the {process_count} processes."
        )
    local = batch_size // process_count
    return np.arange(process_index * local, (process_index + 1) * local)
