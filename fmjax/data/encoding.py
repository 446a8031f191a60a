"""Records of labelled formats to examples: sequences of tokens and a label, as the format asks."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmjax.data import spans, vocabulary
from fmjax.data.settings import DataSettings
from fmjax.data.sources import Document
from fmjax.data.tokenizer import Prepared, encoder
from fmjax.errors import DataError, quoted

NONE = -1  # a token that has no label: a later piece of a word, [CLS], [SEP], padding
UNKNOWN = -2  # and less: the first piece of word UNKNOWN - label, whose label nobody knows


class Example(NamedTuple):
    """Stored content of one row: sequences of (tokens, types), a label, and whether tokens were
    lost."""

    sequences: list[tuple[np.ndarray, np.ndarray]]
    label: Any
    cut: bool
    offsets: np.ndarray | None = None  # of spans, [tokens, 2]: see spans.py


class Reader:
    """Turns records into examples."""

    def __init__(self, words: Prepared, settings: DataSettings):
        self.settings = settings
        self._encode = encoder(words.folder)
        self._spaced = vocabulary.spaces_words(self._encode)
        self._template(words)

    def _template(self, words: Prepared) -> None:
        """A tokenizer that puts nothing around a text gets BERT's [CLS] a [SEP] b [SEP], or of
        these what it has; so does one that does not end a text, where targets are to end."""
        from tokenizers import processors

        ends = vocabulary.frame(self._encode)[1] == words.vocab.last
        if self._encode.num_special_tokens_to_add(is_pair=False) and (
            ends or self.settings.format != "seq2seq"
        ):
            return
        named = {self._encode.id_to_token(i): i for i in words.vocab.first + words.vocab.last}
        first, last = (
            [self._encode.id_to_token(i) for i in ids]
            for ids in (words.vocab.first, words.vocab.last)
        )
        one = [*first, "$A", *last]
        self._encode.post_processor = processors.TemplateProcessing(
            single=one,
            pair=[*one, "$B:1", *(f"{token}:1" for token in last)],
            special_tokens=list(named.items()),
        )

    @property
    def post_processor(self) -> dict[str, Any] | None:
        """The part of a tokenizer.json that puts tokens around a text."""
        return json.loads(self._encode.to_str())["post_processor"]

    def examples(self, documents: list[Document]) -> Iterator[list[Example]]:
        """The examples of each document: one, or the windows of a context."""
        if not documents:
            return
        if self.settings.format == "spans":
            yield from self._windows(documents)
            return
        settings = self.settings
        self._encode.enable_truncation(settings.seq_len, strategy="longest_first")
        inputs = [self._inputs(document) for document in documents]
        encodings = iter(self._encoded(inputs, documents))
        targets = iter(())
        if settings.format == "seq2seq" and settings.label:
            self._encode.enable_truncation(settings.target_len or settings.seq_len)
            texts = [document.fields[settings.label] for document in documents]
            targets = iter(self._encoded(texts, documents))
        for document, sequences in zip(documents, inputs, strict=True):
            found = [next(encodings) for _ in sequences]
            arrays = [_arrays(encoding) for encoding in found]
            cut = any(encoding.overflowing for encoding in found)
            if settings.format == "seq2seq" and settings.label:  # an example for each target
                own = [next(targets) for _ in document.fields[settings.label]]
                yield [Example(arrays, x.ids, cut or bool(x.overflowing)) for x in own]
            else:
                yield [Example(arrays, self._label(document, found), cut)]

    def _encoded(
        self, inputs: Sequence[Sequence], documents: list[Document], **options: bool
    ) -> list:
        """The encodings of the `inputs` of each of the documents, one after the other."""
        flat = [sequence for sequences in inputs for sequence in sequences]
        pairs = zip(inputs, documents, strict=True)
        places = [document.where for sequences, document in pairs for _ in sequences]
        pretokenised = self.settings.format == "tags"
        return self._encode.encode_records(flat, places, is_pretokenized=pretokenised, **options)

    def _inputs(self, document: Document) -> list:
        """The sequences of an example as the tokenizer takes them."""
        form = self.settings.format
        values = [document.fields[name] for name in self.settings.column_names]
        if form in ("classes", "labels", "values"):
            return [tuple(values) if len(values) == 2 else values[0]]
        if form == "choices":
            return [(values[0], choice) for choice in values[1]]
        if form in ("seq2seq", "texts"):
            return [self.settings.source_prefix + value for value in values]
        if form == "tags" and self._spaced:  # as they are read in a sentence
            first, *rest = values[0]
            return [[first, *(f" {word}" if word else word for word in rest)]]
        return values

    def _windows(self, documents: list[Document]) -> Iterator[list[Example]]:
        """The windows of each question: the question, and a piece of the context."""
        settings, names = self.settings, self.settings.column_names
        pairs = [tuple(document.fields[name] for name in names) for document in documents]
        self._encode.no_truncation()
        questions = self._encoded(
            [[first] for first, _ in pairs], documents, add_special_tokens=False
        )
        around = self._encode.num_special_tokens_to_add(is_pair=True)
        for document, question in zip(documents, questions, strict=True):
            # Asked before: `tokenizers` ends the process over a stride that leaves no room.
            if settings.seq_len - around - len(question.ids) <= settings.stride:
                raise DataError(
                    f"{document.where}: beside its question of {len(question.ids)} tokens a window "
                    f"of config.data.seq_len={settings.seq_len} has no room for more than the "
                    f"config.data.stride={settings.stride} tokens that it shares with the next."
                )
        self._encode.enable_truncation(
            settings.seq_len, stride=settings.stride, strategy="only_second"
        )
        encodings = self._encoded([[pair] for pair in pairs], documents)
        for document, first in zip(documents, encodings, strict=True):
            windows = [first, *first.overflowing]
            offsets = [spans.offsets_of(window) for window in windows]
            answers = document.fields.get(settings.label)
            labels: list = [None] * len(windows)
            if answers is not None:
                spans.check(answers, document.fields[names[1]], document.where)
                labels = spans.labels(answers[0] if answers else None, offsets)
            kept = len(windows) if settings.long == "split" else 1
            yield [
                Example([_arrays(windows[i])], labels[i], kept < len(windows), offsets[i])
                for i in range(kept)
            ]

    def _label(self, document: Document, encodings: list) -> Any:
        """A class by name, a number, a place, or for tags a list of one a token."""
        settings = self.settings
        label = document.fields.get(settings.label)
        if settings.format == "tags":
            words = document.fields[settings.column_names[0]]
            label = [UNKNOWN - i for i in range(len(words))] if label is None else label
            if len(words) != len(label):
                raise DataError(
                    f"{document.where}: {len(words)} words but {len(label)} tags "
                    "(config.data.columns, config.data.label)."
                )
            return _first_pieces(encodings[0].word_ids, label)
        if settings.format == "choices" and label is not None:
            if not (label.isdecimal() and len(label) < 10 and int(label) < len(encodings)):
                raise DataError(
                    f"{document.where}: the label {quoted(label)} is no number of a choice, 0 to "
                    f"{len(encodings) - 1} (config.data.label)."
                )
            return int(label)
        return label


def _arrays(encoding: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.array(encoding.ids, np.int64), np.array(encoding.type_ids, np.int64)


def _first_pieces(word_ids: list[int | None], tags: list[str | int]) -> list[str | int | None]:
    """The tag of a word at the first of its pieces, None at the others and at special tokens."""
    before = [None, *word_ids[:-1]]
    return [
        None if word is None or word == last else tags[word]
        for word, last in zip(word_ids, before, strict=True)
    ]
