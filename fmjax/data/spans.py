"""Questions whose answers are spans of a context: its windows, and the way back to its text.

A context that is longer than a row is cut into windows that share tokens (Devlin et al. 2019, as
their code has it). Beside what every example has, a folder then holds for each split `offsets` [all
tokens, 2] (the first character of the context that a token stands for, and the one after its last;
-1 for tokens of the question and around it), `windows.npy` [N] (the question of each row),
`questions.jsonl` (context, answers, and where the record was) and `lines.npy` [Q + 1] (where each
begins).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax.errors import DataError, quoted
from fmjax.io.mapped import MappedFiles

OUTSIDE = -1  # the offsets of what is not in the context
NO_ANSWER = (0, 0)  # [CLS]: the answer is not in this window

Answer = tuple[int, str]  # first character, text


class Question(NamedTuple):
    """One record: `answers` are all that count as right, and none where there is none."""

    context: str
    answers: list[str]
    where: str


def offsets_of(encoding: Any) -> np.ndarray:
    """[tokens, 2] characters of the context, the second sequence of a `tokenizers.Encoding`."""
    second = np.array([i == 1 for i in encoding.sequence_ids], bool)
    return np.where(second[:, None], np.array(encoding.offsets, np.int32).reshape(-1, 2), OUTSIDE)


def check(answers: Iterable[Answer], context: str, where: str) -> None:
    """Raise DataError for answers that are not at the place they name."""
    for start, text in answers:
        found = context[start : start + len(text)]
        if not text or found != text:
            raise DataError(
                f"{where}: the answer {quoted(text)} does not stand at character {start} of its "
                f"context, where {quoted(found)} is (config.data.label)."
            )


def labels(answer: Answer | None, windows: list[np.ndarray]) -> list[tuple[int, int]]:
    """(first, last) token of the answer in each window, given as offsets; `NO_ANSWER` where it is
    not there as a whole."""
    if answer is None:
        return [NO_ANSWER] * len(windows)
    start, end = answer[0], answer[0] + len(answer[1])
    # Its first and last token in the whole context: one of them may be beyond a window.
    every = np.concatenate(windows)
    touched = every[(every[:, 0] < end) & (every[:, 1] > start)]
    if not len(touched):  # nothing but what the tokenizer drops
        return [NO_ANSWER] * len(windows)
    first, last = touched[:, 0].min(), touched[:, 1].max()
    found = []
    for offsets in windows:
        begins = np.flatnonzero(offsets[:, 0] == first)
        ends = np.flatnonzero(offsets[:, 1] == last)
        whole = len(begins) and len(ends)
        found.append((int(begins[0]), int(ends[-1])) if whole else NO_ANSWER)
    return found


class Writer:
    """Appends what the questions of one split keep beside their rows."""

    def __init__(self, folder: Path, split: str):
        self._folder, self._split = folder, split
        self._offsets = open(folder / f"{split}.offsets", "wb")
        self._questions = open(folder / f"{split}.questions.jsonl", "wb")
        self._windows, self._lines = [], [0]

    def add(self, context: str, answers: list[Answer] | None, where: str, windows: list) -> None:
        """One question; `windows` are the offsets of its rows."""
        for offsets in windows:
            self._offsets.write(offsets.astype(np.int32).tobytes())
            self._windows.append(len(self._lines) - 1)
        texts = [text for _, text in answers or []]
        line = json.dumps(Question(context, texts, where)) + "\n"
        self._lines.append(self._lines[-1] + self._questions.write(line.encode()))

    def close(self) -> None:
        self._offsets.close()
        self._questions.close()
        np.save(self._folder / f"{self._split}.windows.npy", np.array(self._windows, np.int64))
        np.save(self._folder / f"{self._split}.lines.npy", np.array(self._lines, np.int64))


class Questions:
    """The questions of one split, memory-mapped."""

    def __init__(self, folder: Path, split: str, ends: np.ndarray):
        self._files = files = MappedFiles(folder)
        self._ends, self._lines = ends, files.npy(f"{split}.lines.npy")
        self._windows = files.npy(f"{split}.windows.npy")
        self._offsets = files.raw(f"{split}.offsets", np.int32).reshape(-1, 2)
        self._questions = files.raw(f"{split}.questions.jsonl", np.uint8)

    def __len__(self) -> int:
        return len(self._lines) - 1

    def of(self, row: int) -> int:
        """The number of the question that a row is a window of."""
        with self._files.unchanged():
            return int(self._windows[row])

    def offsets(self, row: int) -> np.ndarray:
        """[tokens of the row, 2]: the characters of the context, -1 for other tokens."""
        with self._files.unchanged():
            return np.array(self._offsets[self._ends[row] : self._ends[row + 1]])

    def read(self, numbers: Iterable[int]) -> dict[int, Question]:
        """{number: question}."""
        line = lambda number: self._questions[self._lines[number] : self._lines[number + 1]]
        with self._files.unchanged():
            found = {number: json.loads(line(number).tobytes()) for number in numbers}
        return {number: Question(*fields) for number, fields in found.items()}
