"""Rows of tokens: what the splits of texts have in common."""

from collections.abc import Mapping

import numpy as np


class TokenRows:
    """Base of splits whose rows are tokens (`fmjax.data.dataset.Split`)."""

    seq_len: int
    tokens: int  # of all rows, without padding
    per_token = ("input_ids", "segment_ids", "positions", "token_types", "loss_mask")

    @property
    def unit_count(self) -> int:
        """Number of tokens of all rows, without padding."""
        return self.tokens

    @property
    def row_units(self) -> int:
        return self.seq_len

    @property
    def row_size(self) -> str:
        """Size of a row in words."""
        return f"{self.seq_len} tokens"

    def widths(self, index: np.ndarray) -> np.ndarray:
        """Columns that each of the rows `index` needs: all, as nearly every row is full."""
        return np.full(len(index), self.seq_len)

    def units(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """int32 [n], the number of tokens of each row of a batch, without padding."""
        segments = batch["segment_ids"]
        return np.sum(segments > 0, axis=tuple(range(1, segments.ndim)), dtype=np.int32)

    def trim(self, batch: Mapping[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
        """The batch with `width` columns of tokens, after which there is only padding, and as large
        a share of the columns of targets."""
        segments = batch["segment_ids"]

        def trimmed(name: str, array: np.ndarray) -> np.ndarray:
            if name.startswith("target_"):
                return array[:, : -(-width * array.shape[1] // segments.shape[-1])]
            if name in self.per_token:
                return array[(slice(None),) * (segments.ndim - 1) + (slice(width),)]
            return array

        return {name: trimmed(name, array) for name, array in batch.items()}
