"""Sentence pairs: next sentence prediction (BERT, 2018) and sentence order (ALBERT, 2019).

A row is an anchor: consecutive whole sentences of one document that fit in `seq_len`. Reading it
cuts the anchor in two, A and B, at a place that depends on (seed, example) alone, and half of the
time makes a negative: `sop` swaps A and B; `nsp` puts in the place of B the end of an anchor of
another document, drawn among the ends of the SAME LENGTH with the probability that each has of
being a positive B. So neither the lengths, nor B alone, tell the label: BERT's own way, filling up
with text from a random place, lets a short B at the end of a document give positives away.

A folder holds, for each split, `tokens`, `sentences` [S + 1] (where each starts), `anchors` [N, 3]
(first sentence, number of sentences, document), and the ends, sorted by (length, document): `ends`
[E] (first token), `keys` [E] (length · documents + document), `weights` [E + 1] (cumulative).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fmjax.data import order, packing, store
from fmjax.data.token_rows import TokenRows
from fmjax.data.vocabulary import Vocab
from fmjax.io.mapped import MappedFiles

SPECIAL = 3  # [CLS] A [SEP] B [SEP]


class PairSplit(TokenRows):
    """Sentence pairs of one split, memory-mapped."""

    def __init__(
        self, folder: Path, split: str, seq_len: int, vocab: Vocab, counts: dict, pair: str
    ):
        self.seq_len, self.tokens, self.pair = seq_len, counts["tokens"], pair
        self._vocab, self._documents = vocab, counts["documents"]

        self._files = MappedFiles(folder)

        def mapped(part: str, dtype=np.int64) -> np.ndarray:
            return self._files.raw(f"{split}.{part}", dtype)

        self._ids = mapped("tokens", store.token_dtype(vocab.size))
        self._sentences, self._ends, self._keys = map(mapped, ("sentences", "ends", "keys"))
        self._anchors = mapped("anchors").reshape(-1, 3)
        self._weights = mapped("weights", np.float64)

    def __len__(self) -> int:
        return len(self._anchors)

    def rows(
        self, index: np.ndarray, examples: np.ndarray | None = None, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """Pairs of the anchors `index` [n], drawn by (seed, examples [n]): int32 [n, T], labels
        [n].
        """
        with self._files.unchanged():
            return self._drawn(index, index if examples is None else examples, seed)

    def _drawn(self, index: np.ndarray, examples: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        first, count, document = self._anchors[index].T
        cut = first + 1 + (order.uniform(seed, examples, 1) * (count - 1)).astype(np.int64)
        label = (order.hashed(seed, examples, 2) & order.U(1)).astype(np.int32)
        a, b, end = (self._sentences[i] for i in (first, cut, first + count))
        a_length, b_length = b - a, end - b
        negative = label == 1
        if self.pair == "sop":
            first_half, second_half = np.stack([a, a_length]), np.stack([b, b_length])
            a, a_length = np.where(negative, second_half, first_half)
            b, b_length = np.where(negative, first_half, second_half)
        else:
            draw = order.uniform(seed, examples, 3)
            other, other_length = self._other(b_length, document, draw)
            b, b_length = np.where(negative, other, b), np.where(negative, other_length, b_length)
        return self._layout(a, a_length, b, b_length) | {"labels": label}

    def _other(self, length: np.ndarray, document: np.ndarray, draw: np.ndarray):
        """(first token, length) of an end, just as long, of another document; `draw` in [0, 1)."""
        key = length * self._documents
        bounds = np.stack([key, key + self._documents, key + document, key + document + 1])
        low, high, own, own_end = np.searchsorted(self._keys, bounds)
        w = self._weights
        own_weight = w[own_end] - w[own]
        place = w[low] + draw * (w[high] - w[low] - own_weight)
        place += np.where(place >= w[own], own_weight, 0)  # steps over the document's own ends
        chosen = np.clip(np.searchsorted(w, place, side="right") - 1, low, high - 1)
        # A length that no other document has, or a sum rounded onto the border: the nearest end
        # that is another's.
        for i in np.flatnonzero((chosen >= own) & (chosen < own_end)):
            chosen[i] = self._nearest(int(own[i]), int(own_end[i]), int(document[i]))
        return self._ends[chosen], np.minimum(self._keys[chosen] // self._documents, length)

    def _nearest(self, low: int, high: int, document: int) -> int:
        """Shorter ones first; a longer one is cut to the length."""
        keys = self._keys
        while low > 0 and keys[low - 1] % self._documents == document:
            low -= 1
        while low == 0 and high < len(keys) - 1 and keys[high] % self._documents == document:
            high += 1
        return low - 1 if low else high

    def _layout(self, a, a_length, b, b_length) -> dict[str, np.ndarray]:
        """[CLS] A [SEP] B [SEP], padded; starts and lengths are [n]."""
        column = np.arange(self.seq_len)
        middle = (a_length + 1)[:, None]  # the [SEP]s
        last = middle + b_length[:, None] + 1
        in_b = column > middle
        source = np.where(in_b, b[:, None] - middle - 1, a[:, None] - 1) + column
        inside = (column > 0) & (column < last) & (column != middle)
        ids = self._ids[np.where(inside, source, 0)].astype(np.int32)
        ids[~inside] = self._vocab.pad_id
        ids[:, 0] = self._vocab.first[0]
        rows = np.arange(len(ids))
        ids[rows, middle[:, 0]] = ids[rows, last[:, 0]] = self._vocab.last[0]
        real = column <= last
        return {
            "input_ids": ids,
            "segment_ids": real.astype(np.int32),
            "positions": np.where(real, column, 0).astype(np.int32),
            "token_types": (in_b & real).astype(np.int32),
        }


def write(
    folder: Path, shards: Path, count: int, vocab: Vocab, *, seq_len: int, poll: Callable[[], None]
) -> dict:
    """Cut `count` shards into anchors in `folder`; returns the counts of each split.

    The index of sentences is sorted in memory: some 60 bytes a sentence while this runs.
    """
    counts = {}
    for split in store.SPLITS:
        sentences, documents = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
        tokens = number = 0
        with open(folder / f"{split}.tokens", "wb") as stream:
            for shard in store.read(shards, count, split):
                poll()
                stream.write(shard.tokens)
                pieces, _, _ = packing.pieces(
                    shard.sentences, (seq_len - SPECIAL) // 2, "split", seq_len
                )
                inner = np.searchsorted(pieces, shard.documents[1:])
                documents.append(inner + number)
                sentences.append(np.append(pieces, len(shard.tokens))[1:] + tokens)
                tokens, number = tokens + len(shard.tokens), number + len(pieces)
        counts[split] = _write_index(
            folder, split, np.concatenate(sentences), np.concatenate(documents), seq_len - SPECIAL
        )
    return counts


def _write_index(
    folder: Path, split: str, sentences: np.ndarray, documents: np.ndarray, room: int
) -> dict:
    first, number, document = anchors(sentences, documents, room)
    lengths = sentences[first + number] - sentences[first]
    start, key, weight = ends(sentences, first, number, document, len(documents) - 1)
    for part, array in (
        ("sentences", sentences),
        ("anchors", np.stack([first, number, document], 1)),
        ("ends", start),
        ("keys", key),
        ("weights", np.concatenate([[0.0], np.cumsum(weight)])),
    ):
        array.tofile(folder / f"{split}.{part}")
    used = len(np.unique(document))
    return {
        "rows": len(first),
        "tokens": int(lengths.sum()) + SPECIAL * len(first),
        "sentences": len(sentences) - 1,
        "anchored_documents": used,
        "dropped_documents": len(documents) - 1 - used,
        # Sentences left alone at the end (or, filled from there, the beginning) of a document.
        "dropped_tokens": int(sentences[-1] - lengths.sum()),
    }


def anchors(
    sentences: np.ndarray, documents: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first sentence, number, document) of anchors: two whole sentences or more, ≤ `room` tokens.

    `sentences` [S + 1]: first token of each; `documents` [D + 1]: first sentence of each. Anchors
    are filled greedily, in every other document from its end: a greedy anchor begins with the
    sentence that was too long for the one before, and from one direction alone that tells which
    half comes first (53 % of `sop` by the lengths).
    """
    total, number = len(sentences) - 1, len(documents) - 1
    forward = _greedy(sentences, documents, room)
    first, count, document = _greedy(sentences[-1] - sentences[::-1], total - documents[::-1], room)
    backward = total - first - count, count, number - 1 - document
    both = np.concatenate(
        [forward[:, forward[2] % 2 == 0], np.stack(backward)[:, backward[2] % 2 == 1]], 1
    )
    return tuple(both[:, np.argsort(both[0])])


def _greedy(sentences: np.ndarray, documents: np.ndarray, room: int) -> np.ndarray:
    """`anchors` [3, N] from the front. As no sentence is longer than room // 2, only a last one can
    be left alone.
    """
    stop = np.repeat(documents[1:], np.diff(documents))  # end of each sentence's document
    until = np.minimum(np.searchsorted(sentences, sentences[:-1] + room, side="right") - 1, stop)
    found = []
    frontier = documents[:-1]
    while len(frontier):  # all documents advance together
        found.append(frontier)
        after = until[frontier]
        frontier = after[after < stop[frontier]]
    first = np.sort(np.concatenate(found)) if found else documents[:0]
    first = first[until[first] - first >= 2]
    return np.stack(
        [first, until[first] - first, np.searchsorted(documents, first, side="right") - 1]
    )


def ends(
    sentences: np.ndarray,
    first: np.ndarray,
    number: np.ndarray,
    document: np.ndarray,
    documents: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first token, key, weight) of each B that a cut of an anchor gives; by (length, document)."""
    cuts = number - 1
    owner = np.repeat(np.arange(len(first)), cuts)
    start = sentences[first[owner] + 1 + packing.counter(cuts)]
    length = sentences[(first + number)[owner]] - start
    key = length * documents + document[owner]
    by_key = np.argsort(key, kind="stable")
    return start[by_key], key[by_key], (1.0 / cuts[owner])[by_key]
