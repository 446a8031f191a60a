"""Examples with labels, in a cache folder that is read row by row; encoding.py makes them.

An example is one or several token sequences (the choices of a question, an anchor and its positive)
and a label. A folder holds for each split `tokens` and `types` (all sequences one after the other),
`ends.npy` [N · K + 1] (where each starts), and `labels.npy`: [N] classes, numbers or places among
choices; [N, C], 1 for each of several labels that an example has, 0 for the others; [N, 2] first
and last tokens of spans; for tags one a token, -1 where there is none, -2 - i for word i where it
is not known; for sequences that have a sequence as their target all of its tokens, with
`label_ends.npy` [N + 1] (where each starts), and where a row holds several of these, `rows.npy`
[R + 1], the first of each. What else spans keep is in spans.py.

Names of classes are those of the training split, sorted; a label that only the validation split has
is an error, not a new class.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.data import spans, store, vocabulary
from fmjax.data.encoding import NONE, Example, Reader
from fmjax.data.settings import DataSettings
from fmjax.data.sources import Document, Source
from fmjax.data.token_rows import TokenRows
from fmjax.data.tokenizer import Prepared
from fmjax.data.vocabulary import Vocab
from fmjax.errors import DataError, did_you_mean, quoted
from fmjax.io import disk_cache, progress
from fmjax.io.mapped import MappedFiles

VERSION = 6  # of what a folder holds; raise it when the same records give other files
CHUNK, CHUNK_CHARACTERS = 1000, 1 << 20  # of examples that are tokenised at once
MAX_DIGITS = 1000  # of names of classes that are sorted as numbers; Python's int() has a limit


class ExampleSplit(TokenRows):
    """Examples of one split, memory-mapped; `questions` are those whose answers are spans."""

    def __init__(self, folder: Path, split: str, seq_len: int, vocab: Vocab, counts: dict):
        self.seq_len, self.tokens, self._vocab = seq_len, counts["tokens"], vocab
        self._sequences, self._rows = counts["sequences"], counts["rows"]
        self._tagged = counts["tagged"]
        if self._tagged:
            self.per_token += ("labels",)
        self.target_len = counts["target_len"]
        self._files = files = MappedFiles(folder)
        self._ids = files.raw(f"{split}.tokens", store.token_dtype(vocab.size))
        self._types = files.raw(f"{split}.types", np.uint8)
        self._ends = files.npy(f"{split}.ends.npy")
        where_any = lambda name: files.npy(name) if name in files else None
        self._labels = where_any(f"{split}.labels.npy")
        self._label_ends = where_any(f"{split}.label_ends.npy")
        self._first = where_any(f"{split}.rows.npy")
        asked = counts["questions"]
        self.questions = spans.Questions(folder, split, self._ends) if asked else None

    def __len__(self) -> int:
        return self._rows

    @property
    def labels(self) -> np.ndarray | None:
        """Those of all rows, if there are any: [N], or [N, C]; of tags, those of all tokens."""
        return self._labels

    def extent(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first, last + 1) of the tokens of the rows `index`, counted over the whole split."""
        with self._files.unchanged():
            first, last = self._examples(index)
            return self._ends[first * self._sequences], self._ends[last * self._sequences]

    def widths(self, index: np.ndarray) -> np.ndarray:
        """Columns that each of the rows `index` needs: a quarter of `seq_len`, or two, or three, or
        all; of a target's as large a share is enough."""
        quarter = -(-self.seq_len // 4)
        with self._files.unchanged():
            first, last = self._sequences_of(index)
            longest = (self._ends[last] - self._ends[first]).reshape(len(index), -1).max(axis=1)
            quarters = -(-longest // quarter)
            if self._label_ends is not None:
                first, last = (self._label_ends[i] for i in self._examples(index))
                quarters = np.maximum(quarters, -(-4 * (last - first) // self.target_len))
        return np.minimum(np.maximum(quarters, 1) * quarter, self.seq_len)

    def rows(
        self, index: np.ndarray, examples: np.ndarray | None = None, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """The rows `index` [n]: int32 [n, T], or [n, K, T] with K > 1 sequences an example, and
        `labels`: [n], [n, C] of several each, [n, 2] for spans, or [n, T] for tags; for targets
        that are sequences `target_ids`, `target_segment_ids` and `target_positions`, [n, S]."""
        with self._files.unchanged():
            first, last = self._sequences_of(index)
            real, place, batch = self._padded(self._ids, self._ends, first, last, self.seq_len)
            batch["input_ids"] = batch.pop("ids")
            batch["token_types"] = np.where(real, self._types[place], 0).astype(np.int32)
            if self._label_ends is not None:
                ends, examples = self._label_ends, self._examples(index)
                _, _, target = self._padded(self._labels, ends, *examples, self.target_len)
                batch |= {f"target_{name}": array for name, array in target.items()}
            elif self._tagged:
                batch["labels"] = np.where(real, self._labels[place], NONE)
            elif self._labels is not None:
                batch["labels"] = self._labels[index]
        return batch

    def _examples(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first, last + 1) of the examples in the rows `index`."""
        if self._first is None:
            return index, index + 1
        return self._first[index], self._first[index + 1]

    def _sequences_of(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first, last + 1) of what the rows `index` [n] have side by side, [n] or [n, K]."""
        if self._sequences == 1:
            return self._examples(index)
        each = index[:, None] * self._sequences + np.arange(self._sequences)
        return each, each + 1

    def _padded(self, tokens, ends, first, last, width):
        """(which columns are real, where their tokens are, the arrays) of rows of the sequences
        from `first` to before `last`, each of them a segment."""
        place = ends[first][..., None] + np.arange(width)
        real = place < ends[last][..., None]
        place = np.where(real, place, 0)
        owner = np.searchsorted(ends, place, side="right") - 1
        arrays = {
            "ids": np.where(real, tokens[place], self._vocab.pad_id),
            "segment_ids": np.where(real, owner - first[..., None] + 1, 0),
            "positions": np.where(real, place - ends[owner], 0),
        }
        return real, place, {name: array.astype(np.int32) for name, array in arrays.items()}


def prepare(
    root: Path,
    source: Source,
    words: Prepared,
    settings: DataSettings,
    log: Callable[[str], None],
    poll: Callable[[], None],
) -> tuple[Path, dict]:
    """(folder, its index) with the examples of `source`, made or found in the cache."""
    keys = ("format", "seq_len", "long", "label", "stride", "target_len", "source_prefix", "pack")
    identity = {"version": VERSION, "source": source.identity, "tokenizer": words.digest}
    identity |= {key: getattr(settings, key) for key in keys}
    identity |= {"classes": list(settings.classes), "columns": settings.column_names}
    home = root / f"examples-{disk_cache.digest(identity)}"
    with disk_cache.lock(root / f"{home.name}.lock", log, poll):
        index = disk_cache.verified(home, log, poll)
        if index is None:
            write = lambda folder: _write(folder, source, words, settings, log, poll)
            index = disk_cache.build(home, write, poll)
    return home, index


def _write(folder: Path, source: Source, words: Prepared, settings, log, poll) -> dict:
    reader = Reader(words, settings)
    with contextlib.ExitStack() as stack:
        splits = {
            split: stack.enter_context(_Writer(folder, split, words.vocab, settings))
            for split in store.SPLITS
        }
        bad = 0
        with progress.part(log) as show:
            documents = iter(source.documents())
            while chunk := _chunk(documents):
                poll()
                bad += store.write_bad(folder, chunk)
                splits["train"].lost[store.OVERLAP] += store.overlapping(chunk)
                for split, writer in splits.items():
                    kept = [document for document in chunk if document.split == split]
                    for document, examples in zip(kept, reader.examples(kept), strict=True):
                        writer.add(examples, document)
                show(
                    chunk[-1].done,
                    f"data: tokenised {sum(w.rows for w in splits.values()):,} examples",
                )
        names = _class_names(settings, splits)
        counts = {k: writer.finish(names, settings.seq_len, poll) for k, writer in splits.items()}
    types = max(int(writer.types) for writer in splits.values())
    return {"counts": counts, "bad_records": bad, "labels": names, "types": types}


def _chunk(documents: Iterator[Document]) -> list[Document]:
    """The next documents that are tokenised at once: less than a second's work."""
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if len(chunk) == CHUNK or characters >= CHUNK_CHARACTERS:
            break
    return chunk


class _Writer:
    """Appends the examples of one split to its files."""

    def __init__(self, folder: Path, split: str, vocab: Vocab, settings: DataSettings):
        self.folder, self.split, self.vocab, self.settings = folder, split, vocab, settings
        self.questions = spans.Writer(folder, split) if settings.format == "spans" else None
        self.documents, self.rows, self.sequences, self.types = 0, 0, 1, 1
        self.ends, self.labels = [0], []
        self.first: dict[str, str] = {}  # class -> where it was first seen
        self.lost = {"truncated_documents": 0, "dropped_documents": 0, store.OVERLAP: 0}

    def __enter__(self) -> "_Writer":
        self._tokens = open(self.folder / f"{self.split}.tokens", "wb")
        self._types = open(self.folder / f"{self.split}.types", "wb")
        return self

    def __exit__(self, *_: Any) -> None:
        self._tokens.close()
        self._types.close()
        if self.questions:
            self.questions.close()

    def add(self, examples: list[Example], document: Document) -> None:
        """The examples of one document."""
        long, names = self.settings.long, self.settings.column_names
        cut = any(example.cut for example in examples)
        if cut and long == "error":
            raise DataError(
                f"{document.where}: longer than config.data.seq_len. Raise it, or set "
                "config.data.long to truncate or drop."
            )
        if cut and long == "drop":
            self.lost["dropped_documents"] += 1
            return
        self.lost["truncated_documents"] += cut
        self.documents += 1
        for example in examples:
            self._row(example, document)
        if self.questions:
            answers = document.fields.get(self.settings.label)
            offsets = [example.offsets for example in examples]
            self.questions.add(document.fields[names[1]], answers, document.where, offsets)

    def _row(self, example: Example, document: Document) -> None:
        if self.rows and len(example.sequences) != self.sequences:
            raise DataError(
                f"{document.where}: {len(example.sequences)} choices, the examples before it have "
                f"{self.sequences}; all must have the same number (config.data.columns)."
            )
        self.sequences = len(example.sequences)
        for ids, types in example.sequences:
            self._check_ids(ids, document)
            self.types = max(self.types, types.max(initial=0) + 1)
            self._tokens.write(ids.astype(store.token_dtype(self.vocab.size)).tobytes())
            self._types.write(types.astype(np.uint8).tobytes())
            self.ends.append(self.ends[-1] + len(ids))
        if self.settings.format == "seq2seq" and example.label is not None:
            self._check_ids(example.label, document)
        if example.label is not None:
            self.labels.append(example.label)
            for name in example.label if isinstance(example.label, list) else [example.label]:
                if isinstance(name, str):
                    self.first.setdefault(name, document.where)
        self.rows += 1

    def _check_ids(self, ids: Sequence[int] | np.ndarray, document: Document) -> None:
        if problem := vocabulary.beyond(ids, self.vocab.size):
            raise DataError(f"{document.where}: {problem}.")

    def finish(self, names: list[str], seq_len: int, poll: Callable[[], None]) -> dict:
        np.save(self.folder / f"{self.split}.ends.npy", np.array(self.ends, np.int64))
        if self.labels:
            if self.settings.format == "seq2seq":
                label_ends = np.cumsum([0, *map(len, self.labels)])
                np.save(self.folder / f"{self.split}.label_ends.npy", label_ends)
            np.save(self.folder / f"{self.split}.labels.npy", self._numbers(names))
        rows, target_len = self.rows, self.settings.target_len or seq_len
        if self.settings.pack:
            both = np.array(self.ends), label_ends if self.labels else np.zeros(rows + 1, np.int64)
            first = _joined(both, (seq_len, target_len), poll)
            np.save(self.folder / f"{self.split}.rows.npy", first)
            rows = len(first) - 1
        return {
            "documents": self.documents,
            "source_tokens": self.ends[-1],
            "rows": rows,
            "tokens": self.ends[-1],
            "fill": self.ends[-1] / max(rows * self.sequences * seq_len, 1),
            "sequences": self.sequences,
            "questions": bool(self.questions),
            "tagged": self.settings.format == "tags" and bool(self.labels),
            "target_len": target_len,
            **self.lost,
        }

    def _numbers(self, names: list[str]) -> np.ndarray:
        """The labels of all rows, as `labels.npy` has them."""
        if self.settings.format == "labels":
            return np.array([[name in row for name in names] for row in self.labels], np.int32)
        ids = {name: i for i, name in enumerate(names)}
        number = lambda x: ids[x] if isinstance(x, str) else NONE if x is None else x
        flat = [x for y in self.labels for x in (y if isinstance(y, list) else [y])]
        dtype = np.float32 if isinstance(flat[0], float) else np.int32
        return np.array([number(x) for x in flat], dtype)


def _joined(
    ends: Sequence[np.ndarray], room: Sequence[int], poll: Callable[[], None]
) -> np.ndarray:
    """[R + 1], the first example of each row: as many neighbours as there is room for, of all
    kinds of tokens, of which `ends` [N + 1] say where each example starts."""
    first, number = [0], len(ends[0]) - 1
    while first[-1] < number:
        poll()
        fits = (
            np.searchsorted(x, x[first[-1]] + most, "right")
            for x, most in zip(ends, room, strict=True)
        )
        first.append(max(min(fits) - 1, first[-1] + 1))
    return np.array(first, np.int64)


def _class_names(settings: DataSettings, splits: dict[str, _Writer]) -> list[str]:
    """The names of the classes in their order; empty for labels that are no classes."""
    train = splits["train"].first
    names = list(settings.classes)
    if not names:
        numbers = all(name.isdecimal() and len(name) <= MAX_DIGITS for name in train)
        names = sorted(train, key=(lambda name: (int(name), name)) if numbers else None)
    for split, writer in splits.items():
        for name, where in writer.first.items():
            if name not in names:
                source = "config.data.classes" if settings.classes else "the training split"
                raise DataError(
                    f"{where}: the label {quoted(name)} of the {split} split is none of those of "
                    f"{source}." + did_you_mean(name, names)
                )
    if settings.format == "labels" and settings.label and not names:
        raise DataError(
            f"No example has a label: there is nothing to learn. See config.data.label="
            f"{settings.label!r}."
        )
    if settings.format in ("classes", "tags") and settings.label and len(names) < 2:
        raise DataError(
            f"All examples have the label {quoted(names)}: there is nothing to tell apart. See "
            f"config.data.label={settings.label!r}."
        )
    return names
