"""The tasks of finetune_quality.py as a user of transformers on torch has them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import seqeval.metrics
import torch
import transformers

from fmjax.data import spans
from fmjax.objectives import span

IGNORED = -100  # labels that the losses of transformers leave out
STRIDE = 64  # tokens that two windows share, as in configs/mlm.py


class Task(NamedTuple):
    """`score(predictions)` gives the metrics over the whole validation split."""

    model: Any
    train: list[dict]
    validation: list[dict]
    collate: Callable
    score: Callable[[Any], dict[str, float]]


def make(task: str, folder: str, seq_len: int, examples: dict[str, list[list]]) -> Task:
    """`examples` {split: [[column, …, label]]}, the model and tokenizer from `folder`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kinds = {"classify": _texts, "regress": _texts, "tag": _tags, "span": _spans}
    return kinds[task](task, folder, tokenizer, seq_len, examples)


def _texts(task, folder, tokenizer, seq_len, examples):
    """One number or class of a text or a pair."""
    names = sorted({str(row[-1]) for row in examples["train"]}) if task == "classify" else [""]
    number = names.index if task == "classify" else float

    def rows(split):
        encode = lambda texts: tokenizer(*texts, truncation=True, max_length=seq_len)
        return [{**encode(texts), "labels": number(label)} for *texts, label in examples[split]]

    def score(logits):
        labels = np.array([row["labels"] for row in validation])
        if task == "regress":
            return {"spearman": scipy.stats.spearmanr(logits[:, 0], labels).statistic}
        return {"accuracy": float(np.mean(logits.argmax(-1) == labels))}

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(names), dtype=torch.float32
    )
    validation = rows("validation")
    collate = transformers.DataCollatorWithPadding(tokenizer)
    return Task(model, rows("train"), validation, collate, score)


def _tags(task, folder, tokenizer, seq_len, examples):
    """A class for each word, at its first piece."""
    names = sorted({tag for _, tags in examples["train"] for tag in tags})

    def rows(split):
        for words, tags in examples[split]:
            row = tokenizer(words, is_split_into_words=True, truncation=True, max_length=seq_len)
            of = row.word_ids()
            first = [word is not None and word not in of[:i] for i, word in enumerate(of)]
            pairs = zip(of, first, strict=True)
            labels = [names.index(tags[w]) if new else IGNORED for w, new in pairs]
            yield {**row, "labels": labels}

    def score(logits):
        told = logits.argmax(-1)
        guesses, right = [], []
        for guess, row in zip(told, validation, strict=True):
            asked = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
            guesses.append([names[guess[i]] for i in asked])
            right.append([names[row["labels"][i]] for i in asked])
        return {"f1": seqeval.metrics.f1_score(right, guesses)}

    model = transformers.AutoModelForTokenClassification.from_pretrained(
        folder, num_labels=len(names), dtype=torch.float32
    )
    validation = list(rows("validation"))
    collate = transformers.DataCollatorForTokenClassification(tokenizer)
    return Task(model, list(rows("train")), validation, collate, score)


def _spans(task, folder, tokenizer, seq_len, examples):
    """The answer in a context, cut into windows; labelled and scored as ours are."""

    def rows(split):
        for number, (question, context, answers) in enumerate(examples[split]):
            found = tokenizer(
                question,
                context,
                truncation="only_second",
                max_length=seq_len,
                stride=STRIDE,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            windows = [spans.offsets_of(encoding) for encoding in found.encodings]
            labels = spans.labels(answers[0] if answers else None, windows)
            for i, (window, (first, last)) in enumerate(zip(windows, labels, strict=True)):
                row = {key: found[key][i] for key in tokenizer.model_input_names}
                yield row | {"start_positions": first, "end_positions": last}, (number, window)

    def score(logits):
        windows = [window for _, window in validation]
        questions = [
            SimpleNamespace(context=context, answers=[text for _, text in answers])
            for _, context, answers in examples["validation"]
        ]
        asked = SimpleNamespace(
            of=lambda row: windows[row][0],
            offsets=lambda row: windows[row][1],
            read=lambda numbers: {number: questions[number] for number in numbers},
        )
        found = {"start": logits[0], "end": logits[1]}
        every = np.arange(len(windows))
        return span.score(found, None, split=SimpleNamespace(questions=asked), rows=every)

    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32)
    validation = list(rows("validation"))
    collate = transformers.DataCollatorWithPadding(tokenizer)
    train = [row for row, _ in rows("train")]
    return Task(model, train, [row for row, _ in validation], collate, score)
