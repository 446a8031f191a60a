"""Rows of `seq_len` tokens: documents are cut into pieces, pieces packed, one segment a piece.

A packed folder holds `train.tokens` [N, T] (the store's dtype) and `train.segments` [N, T]
(1-based, 0 = padding; the smallest unsigned dtype), of conversations also `train.targets` [N, T]
(1 = learnt). Each segment is [CLS] piece [SEP]; with
`frame="document"` it is a piece of <s> document </s>, which begins where the one before has ended.
"""

import bisect
import collections
import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fmjax.data import store
from fmjax.data.token_rows import TokenRows
from fmjax.data.vocabulary import Vocab
from fmjax.errors import DataError
from fmjax.io.mapped import MappedFiles

COUNTS = ("rows", "tokens", "truncated_tokens", "dropped_documents", "dropped_tokens")


class PackedSplit(TokenRows):
    """Rows of one split, memory-mapped."""

    def __init__(self, folder: Path, split: str, seq_len: int, vocab: Vocab, counts: dict):
        self.seq_len, self.tokens, self._rows = seq_len, counts["tokens"], counts["rows"]
        shape = (counts["rows"], seq_len)
        dtype = store.token_dtype(vocab.size)
        self._files = files = MappedFiles(folder)
        self._ids = files.raw(f"{split}.tokens", dtype).reshape(shape)
        self._segments = files.raw(f"{split}.segments", segment_dtype(seq_len)).reshape(shape)
        name = f"{split}.targets"
        self._targets = files.raw(name, np.uint8).reshape(shape) if name in files else None

    def __len__(self) -> int:
        return self._rows

    def rows(
        self, index: np.ndarray, examples: np.ndarray | None = None, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """The rows `index` [n] as int32 [n, T], whatever `examples` and `seed` (pairs use them); of
        conversations with `loss_mask`, 1 where a token is learnt."""
        with self._files.unchanged():
            segments = self._segments[index].astype(np.int32)
            batch = {
                "input_ids": self._ids[index].astype(np.int32),
                "segment_ids": segments,
                "positions": positions(segments),
                "token_types": np.zeros_like(segments),
            }
            if self._targets is not None:
                batch["loss_mask"] = self._targets[index].astype(np.int32)
        return batch


def positions(segments: np.ndarray) -> np.ndarray:
    """Index of each token in its segment; 0 on padding. [n, T] -> int32 [n, T]."""
    column = np.arange(segments.shape[1], dtype=np.int32)
    begins = np.zeros_like(segments)
    begins[:, 1:] = np.where(segments[:, 1:] != segments[:, :-1], column[1:], 0)
    return np.where(segments > 0, column - np.maximum.accumulate(begins, axis=1), 0)


def write(
    folder: Path,
    shards: Path,
    count: int,
    vocab: Vocab,
    *,
    seq_len: int,
    long: str,
    frame: str,
    padded: bool,
    space: int = 0,
    chat: bool = False,
    poll: Callable[[], None],
) -> dict:
    """Pack `count` shards into `folder`; returns the counts of each split.

    `long` and `frame` as in `config.data`; `padded`: one piece a row; `space`: columns left free
    after each; `chat`: of conversations, which have all of their tokens.
    """
    counts, around = {}, ((), ()) if chat else (vocab.first, vocab.last)
    kind = store.Conversations if chat else store.Shard
    for split in store.SPLITS:
        total = collections.Counter(dict.fromkeys(COUNTS, 0))
        with contextlib.ExitStack() as files:
            made = lambda name: files.enter_context(open(folder / name, "wb"))  # noqa: B023
            rows, marks = made(f"{split}.tokens"), made(f"{split}.segments")
            asked = made(f"{split}.targets") if chat else None
            # Shard by shard: bounded memory, sequential writing, and each has pieces enough to
            # pack tightly.
            for shard in store.read(shards, count, split, kind):
                poll()
                if frame == "document":
                    shard, around = framed(shard, vocab), ((), ())
                room = seq_len - sum(map(len, around)) - space
                shared = int(frame == "document")  # so that each token is predicted by one before
                starts, lengths, lost = pieces(shard.documents, room, long, seq_len, shared)
                if chat:
                    starts, lengths, lost = _taught(shard, starts, lengths, lost)
                how = (starts, lengths, seq_len, around)
                tokens, segments = pack(shard.tokens, *how, vocab.pad_id, padded, space)
                rows.write(tokens)
                marks.write(segments)
                if asked:
                    targets, _ = pack(shard.targets, *how, 0, padded, space)
                    asked.write(targets)
                    total.update(learnt_tokens=int(np.count_nonzero(targets)))
                total.update(lost, rows=len(tokens), tokens=int(np.count_nonzero(segments)))
        counts[split] = dict(total)
    return counts


def _taught(
    shard: store.Conversations, starts: np.ndarray, lengths: np.ndarray, lost: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """The pieces without those of which nothing would be learnt: cut before any answer."""
    learnt = np.concatenate([[0], np.cumsum(shard.targets, dtype=np.int64)])
    kept = learnt[starts + lengths] > learnt[starts]
    gone = {"dropped_documents": int((~kept).sum()), "dropped_tokens": int(lengths[~kept].sum())}
    return starts[kept], lengths[kept], dict(collections.Counter(lost) + collections.Counter(gone))


def framed(shard: store.Shard, vocab: Vocab) -> store.Shard:
    """The documents with the tokenizer's tokens around each of them that has any."""
    lengths = np.diff(shard.documents)
    real = np.flatnonzero(lengths)
    before, behind = len(vocab.first), len(vocab.last)
    widths = lengths[real] + before + behind
    bounds = np.concatenate([[0], np.cumsum(widths)])
    tokens = np.empty(bounds[-1], shard.tokens.dtype)
    starts = bounds[:-1]
    for i, token in enumerate(vocab.first):
        tokens[starts + i] = token
    for i, token in enumerate(vocab.last):
        tokens[bounds[1:] - behind + i] = token
    inner = np.repeat(starts + before, lengths[real]) + counter(lengths[real])
    tokens[inner] = shard.tokens  # the others have none
    return shard._replace(tokens=tokens, documents=bounds)


def pieces(
    documents: np.ndarray, limit: int, long: str, seq_len: int, shared: int = 0
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """(starts, lengths, losses) of pieces of at most `limit` tokens of the documents [D + 1], in
    rows of `seq_len`. Each begins with the last `shared` tokens of the one before it."""
    starts, lengths = documents[:-1], np.diff(documents)
    over = lengths > limit
    excess = int((lengths - limit)[over].sum())
    if long == "error" and excess:
        raise DataError(
            f"{int(over.sum())} documents are longer than the {limit} tokens that fit into a row, "
            f"the longest has {lengths.max()}. Set config.data.long to split, truncate or drop, or "
            f"a larger config.data.seq_len (now {seq_len})."
        )
    if long == "truncate":
        return starts, np.minimum(lengths, limit), {"truncated_tokens": excess}
    if long == "drop":
        lost = {"dropped_documents": int(over.sum()), "dropped_tokens": int(lengths[over].sum())}
        return starts[~over], lengths[~over], lost
    step = limit - shared
    number = -(-np.maximum(lengths - shared, lengths > 0) // step)  # pieces of each document
    inner = counter(number) * step  # offset of each piece in its document
    rest = np.repeat(lengths, number) - inner
    return np.repeat(starts, number) + inner, np.minimum(rest, limit), {}


def segment_dtype(seq_len: int) -> np.dtype:
    """The smallest unsigned dtype for segment numbers: a segment has at least one token."""
    return np.min_scalar_type(seq_len)


def counter(counts: np.ndarray) -> np.ndarray:
    """0, 1, … counts[0] - 1, 0, 1, … counts[1] - 1, …"""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece: longest first, each into the fullest row that still takes it.

    Equal pieces are placed together (the fullest row stays the fullest until it is full), so this
    is O(n + T²), not a search a piece. Johnson, "Near-optimal bin packing algorithms" (1973): at
    most 11/9 of the best.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, firsts = np.unique(-lengths[order], return_index=True)
    rows = np.zeros(len(lengths), np.int64)
    total = 0
    free: dict[int, list[np.ndarray]] = {}  # room left -> rows with it
    for size, ids in zip(-sizes, np.split(order, firsts)[1:], strict=True):
        size = int(size)
        levels = sorted(free)
        for room in levels[bisect.bisect_left(levels, size) :]:
            if not len(ids):
                break
            ids = _place(ids, np.concatenate(free.pop(room)), room, size, rows, free)
        if len(ids):
            fresh = np.arange(total, total + -(-len(ids) // (capacity // size)))
            total += len(fresh)
            _place(ids, fresh, capacity, size, rows, free)
    return rows


def _place(ids, candidates, room: int, size: int, rows: np.ndarray, free: dict) -> np.ndarray:
    """Put pieces `ids` of `size` into rows with `room`, filling one after the other; returns those
    left over.
    """
    each = room // size
    used = -(-min(len(ids), each * len(candidates)) // each)
    fitting, left = ids[: each * used], ids[each * used :]
    rows[fitting] = candidates[np.arange(len(fitting)) // each]
    full = len(fitting) // each
    for level, group in (
        (room - each * size, candidates[:full]),
        (room - (len(fitting) - each * full) * size, candidates[full:used]),
        (room, candidates[used:]),
    ):
        if level and len(group):
            free.setdefault(level, []).append(group)
    return left


def pack(
    tokens: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    seq_len: int,
    around: tuple[tuple[int, ...], tuple[int, ...]],
    pad_id: int,
    padded: bool = False,
    space: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N, T], segments [N, T]) of the pieces tokens[starts:starts + lengths], with the
    tokens (before, after) `around` each and `space` columns of padding after."""
    before, behind = around
    widths = lengths + len(before) + len(behind)
    rows = np.arange(len(widths)) if padded else best_fit_decreasing(widths + space, seq_len)
    order = np.argsort(rows, kind="stable")
    rows, starts, lengths, widths = rows[order], starts[order], lengths[order], widths[order]
    per_row = np.bincount(rows) if len(rows) else np.zeros(0, np.int64)
    earlier = np.cumsum(widths + space) - widths - space
    column = earlier - np.repeat(earlier[np.cumsum(per_row) - per_row], per_row)
    target = rows * seq_len + column  # flat position of each piece's first token

    out = np.full((len(per_row), seq_len), pad_id, tokens.dtype)
    segments = np.zeros((len(per_row), seq_len), segment_dtype(seq_len))
    flat = out.reshape(-1)
    inner = counter(lengths)
    text = np.repeat(target + len(before), lengths) + inner
    flat[text] = tokens[np.repeat(starts, lengths) + inner]
    for i, token in enumerate(before):
        flat[target + i] = token
    for i, token in enumerate(behind):
        flat[target + widths - len(behind) + i] = token
    number = counter(per_row) + 1
    segments.reshape(-1)[np.repeat(target, widths) + counter(widths)] = np.repeat(number, widths)
    return out, segments
