"""A few validation examples as a person reads them: the text, what is right, what the model says.

They are made of what an evaluation computes anyway; the report shows those of the last one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fmjax import objectives
from fmjax.data.tokenizer import load as load_tokenizer
from fmjax.evaluation import eval_loop, readable

EXAMPLES = 5
MASKS = 6  # of a row that are shown, with the text up to the last of them
CHARACTERS = 300  # of a text

Sample = dict[str, str]  # "text", "right" and "said"


def of(run: Any, kept: Sequence[Any]) -> list[Sample]:
    """Those of the first rows among the outputs `kept` of an evaluation; [] where no objective
    says anything of single examples that could be read."""
    name = next((one.name for one in run.objectives if one.name in _READERS), None)
    if name is None or not kept:
        return []
    outputs, labels, rows = eval_loop.in_order(kept)
    samples = _READERS[name](run, name, outputs[name], labels, rows)
    return [{key: readable.cut(text, CHARACTERS) for key, text in one.items()} for one in samples]


def _masked(run: Any, name: str, found: Mapping, labels: Any, rows: np.ndarray) -> list[Sample]:
    """Fill-in samples: the first masks of each row."""
    words, samples = load_tokenizer(run.dataset.tokenizer_dir), []
    batch = _rows(run, rows[:EXAMPLES])
    for row, ids in enumerate(batch["input_ids"]):
        masks = np.flatnonzero(found["weights"][row] > 0)
        masks = masks[np.argsort(found["positions"][row][masks])][:MASKS]
        if len(masks):
            positions = found["positions"][row][masks]
            seen = ids[: positions[-1] + 1].copy()
            seen[positions] = words.mask_token_id
            right, said = (_listed(words, found[key][row][masks]) for key in ("labels", "guesses"))
            samples.append({"text": words.decode(seen), "right": right, "said": said})
    return samples


def _judged(run: Any, name: str, found: Mapping, labels: Any, rows: np.ndarray) -> list[Sample]:
    """Labelled samples: the label of each example and the output of `describe`."""
    names, goal = run.dataset.labels, next(one for one in run.objectives if one.name == name)
    few = _spread(len(rows))
    said = objectives.call_with_declared(
        goal.describe, {k: x[few] for k, x in found.items()}, names=names
    )
    right = [_label(label, names) for label in labels[few]]
    return [
        {"text": text, "right": label, "said": _said(one)}
        for text, label, one in zip(_texts(run, rows[few]), right, said, strict=True)
    ]


def _tagged(run: Any, name: str, found: Mapping, labels: Any, rows: np.ndarray) -> list[Sample]:
    """Tagging samples: the tags of the words of each text."""
    read = lambda tags: " ".join(run.dataset.labels[tag] for tag in tags if tag >= 0)
    few = _spread(len(rows))
    each = zip(_texts(run, rows[few]), labels[few], found["tags"][few], strict=True)
    return [
        {"text": text, "right": read(right), "said": read(said[right >= 0])}
        for text, right, said in each
    ]


def _answered(run: Any, name: str, found: Mapping, labels: Any, rows: np.ndarray) -> list[Sample]:
    """Question-answering samples: the answer of each question, from all of its windows."""
    asked = run.dataset.splits["validation"].questions
    goal = next(one for one in run.objectives if one.name == name)
    numbers = np.array([asked.of(row) for row in rows.tolist()])
    few = np.isin(numbers, list(dict.fromkeys(numbers.tolist()))[:EXAMPLES])
    few_found = {key: array[few] for key, array in found.items()}
    split = run.dataset.splits["validation"]
    answers = objectives.call_with_declared(goal.describe, few_found, split=split, rows=rows[few])
    questions = asked.read(answer["example"] for answer in answers)
    first = [rows[numbers == number][0] for number in questions]
    return [
        {
            "text": text,
            "right": " | ".join(dict.fromkeys(question.answers)) or "no answer",
            "said": answer["answer"] or "no answer",
        }
        for text, answer, question in zip(
            _texts(run, np.array(first)), answers, questions.values(), strict=True
        )
    ]


_READERS: dict[str, Callable] = {
    "mlm": _masked,
    "classify": _judged,
    "regress": _judged,
    "choose": _judged,
    "tag": _tagged,
    "span": _answered,
}


def _rows(run: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of rows and their numbers, with token ids also where a run reads hidden states."""
    split = run.dataset.splits["validation"]
    return getattr(split, "with_tokens", split).rows(rows) | {"index": rows}


def _spread(count: int) -> np.ndarray:
    """Places all over a split, in which equal labels may stand together."""
    return np.unique(np.linspace(0, count - 1, EXAMPLES).astype(int))


def _texts(run: Any, rows: np.ndarray) -> list[str]:
    """The rows as a person reads them."""
    return run.dataset.texts(_rows(run, rows))


def _said(told: Mapping[str, Any]) -> str:
    """The probabilities of one class alone, which name it, or the whole description."""
    return readable.readable(told["probabilities"] if "label" in told else told)


def _label(label: Any, names: Sequence[str]) -> str:
    """One class, those of several, or a number."""
    if np.ndim(label):
        return ", ".join(names[i] for i in np.flatnonzero(label)) or "none"
    return names[label] if names else readable.readable(label.item())


def _listed(words: Any, tokens: np.ndarray) -> str:
    return ", ".join(words.decode([token]).strip() or "␣" for token in tokens)
