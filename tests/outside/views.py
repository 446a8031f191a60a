"""Pairs of arrays: two noisy views of one pattern each."""

import dataclasses

import numpy as np

from fmjax.data.dataset import Dataset

SIDE, PATTERNS = 8, 48
KEYS = ("format", "noise", "examples", "skip")  # of config.data


@dataclasses.dataclass(frozen=True)
class ViewsDataset(Dataset):
    unit = "pairs"

    @property
    def facts(self):
        return super().facts | {"image_shape": (SIDE, SIDE, 1)}


class Views:
    """The rows of a split: `left` and `right`, float32 [n, 8, 8, 1]."""

    row_units, row_size = 1, "2 x 8 x 8"

    def __init__(self, first: int, stop: int, noise: float):
        self.first, self.stop, self.noise = first, stop, noise

    @property
    def unit_count(self):
        return len(self)

    def __len__(self):
        return self.stop - self.first

    def widths(self, index):
        return np.ones(len(index), int)

    def trim(self, batch, width):
        return batch

    def units(self, batch):
        return np.ones(len(batch["left"]), np.int32)

    def rows(self, index, examples=None, seed=0):
        numbers = index + self.first
        clean = np.stack([np.random.default_rng(i).normal(size=(SIDE, SIDE, 1)) for i in numbers])
        views = {}
        for side, name in enumerate(("left", "right")):
            keys = np.zeros_like(numbers) if examples is None else examples + 1
            noise = [
                np.random.default_rng((seed, side, number, key)).normal(size=(SIDE, SIDE, 1))
                for number, key in zip(numbers, keys, strict=True)
            ]
            views[name] = (clean + self.noise * np.stack(noise)).astype(np.float32)
        return views


def _checked(data):
    assert set(data) <= set(KEYS), data
    return data["noise"]


class Pairs:
    """The kind of data `outside.views:Pairs`."""

    @staticmethod
    def stand_in(data, tokenizer):
        _checked(data)
        return ViewsDataset({}, "", "views", {})

    @classmethod
    def prepare(cls, data, tokenizer, *, embedding_rows=None, log=print, poll=lambda: None):
        noise = _checked(data)
        splits = {"train": Views(0, 32, noise), "validation": Views(32, PATTERNS, noise)}
        counts = {name: {"pairs": len(split), "rows": len(split)} for name, split in splits.items()}
        return cls.dataset(splits, f"{noise}", "views", counts)

    dataset = ViewsDataset


class GeneratedDataset(ViewsDataset):
    """The same pairs, but training makes its own batches of them (generated.py)."""

    def source(self, run):
        from outside.generated import Source

        return Source(run, self.splits["train"])


class Generated(Pairs):
    """The kind of data `outside.views:Generated`."""

    dataset = GeneratedDataset
