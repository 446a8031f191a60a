"""Hard prompts: labelled rows as questions in words, by templates (Brown et al. 2020, §2; Schick
and Schütze 2021).

A template is a text with the names of columns in braces, after which the answer comes:
"Review: {sentence}\nSentiment:". `words` says what stands for each class; without them its name.

| name of GLUE (Wang et al. 2019) | columns | asked |
|---|---|---|
| `sst2` | sentence | whether a review is positive |
| `cola` | sentence | whether it is grammatical; groups are the sources |
| `mrpc` | first, second | whether two sentences say the same |
| `rte`, `qnli`, `wnli` | first, second | whether the second follows, is the answer, is true |
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fmjax.data import lines, sources
from fmjax.data.settings import DataSettings, read
from fmjax.errors import ConfigError, DataError, did_you_mean, quoted
from fmjax.evaluation.multiple_choice import Item


class Row(NamedTuple):
    """One row of labelled data."""

    columns: dict[str, str]
    label: int
    group: str = ""


class Glue(NamedTuple):
    """Format of a GLUE file, and its default template."""

    columns: Mapping[str, str]  # {our name: the file's}
    label: str
    classes: tuple[str, ...]  # as the file has them
    words: tuple[str, ...]
    template: str
    heads: tuple[str, ...] = ()  # of a file without a first row of names
    group: str = ""


_PAIR = {"first": "sentence1", "second": "sentence2"}
_ENTAILED = ("entailment", "not_entailment"), ("yes", "no")
GLUE = {
    "sst2": Glue(
        {"sentence": "sentence"},
        "label",
        ("0", "1"),
        ("negative", "positive"),
        "Review: {sentence}\nSentiment:",
    ),
    "cola": Glue(
        {"sentence": "sentence"},
        "label",
        ("0", "1"),
        ("no", "yes"),
        "Sentence: {sentence}\nIs it grammatical?",
        ("source", "label", "mark", "sentence"),
        "source",
    ),
    "mrpc": Glue(
        {"first": "#1 String", "second": "#2 String"},
        "Quality",
        ("0", "1"),
        ("no", "yes"),
        "First: {first}\nSecond: {second}\nDo they say the same?",
    ),
    "rte": Glue(_PAIR, "label", *_ENTAILED, "{first}\nQuestion: is it so that {second}\nAnswer:"),
    "qnli": Glue(
        {"first": "question", "second": "sentence"},
        "label",
        *_ENTAILED,
        "Question: {first}\nText: {second}\nDoes the text answer the question?",
    ),
    "wnli": Glue(_PAIR, "label", ("0", "1"), ("no", "yes"), "{first}\nIs it so that {second}"),
}


def item(row: Row, template: str, words: Sequence[str]) -> Item:
    """The row as a question with all words for answers."""
    text, bare = (
        template.format_map(columns) for columns in (row.columns, dict.fromkeys(row.columns, ""))
    )
    return Item(text, tuple(f" {word}" for word in words), row.label, row.group, bare)


def check(template: str, columns: Sequence[str]) -> None:
    """Raises ConfigError for a template that names other things than the columns, or none."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"config.templates: {template!r}: {error}.") from error
    names = [name for _, name, _, _ in parts if name is not None]
    if not names or any(name not in columns for name in names) or any(x[2] for x in parts):
        raise ConfigError(
            f"config.templates: {template!r} has to name columns in braces, of "
            f"{', '.join(columns)}; a brace itself is written twice."
        )


def glue(name: str, path: Path, limit: int = 0) -> Iterator[Row]:
    """The rows of a file of GLUE (.tsv). Raises DataError for one that is none of `name`."""
    kind = GLUE[name]
    # No quotes: a quotation mark is a character of the text, whatever it opens.
    rows = ((line.number, line.text.split("\t")) for line in lines.good(path, "benchmark.path"))
    heads = list(kind.heads) or next(rows, (0, []))[1]
    used = [*kind.columns.values(), kind.label]
    if missing := set(used) - set(heads):
        raise DataError(f"{path} is no file of {name!r}: it has no column {sorted(missing)[0]!r}.")
    if twice := [head for head in used if heads.count(head) > 1]:
        raise DataError(f"{path} is no file of {name!r}: it has the column {twice[0]!r} twice.")
    for count, (line, values) in enumerate(rows):
        where = f"{path}:{line}"
        if limit and count == limit:
            return
        row = dict(zip(heads, values, strict=False))
        if len(values) != len(heads) or row[kind.label] not in kind.classes:
            raise DataError(
                f"{where} is no row of {name!r}: {len(values)} columns of {len(heads)}, "
                f"label {quoted(row.get(kind.label))} of {', '.join(kind.classes)}."
            )
        columns = {ours: row[theirs] for ours, theirs in kind.columns.items()}
        yield Row(columns, kind.classes.index(row[kind.label]), row.get(kind.group, ""))


def labelled(data: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[Row]]:
    """{split: rows} of any data with classes (`config.data`), of which `names` are the classes in
    their order."""
    settings = read(DataSettings, data, "data")
    found: dict[str, list[Row]] = {"train": [], "validation": []}
    for document in sources.read(settings, print).documents():
        if document.split in found:
            fields = dict(document.fields)
            label = str(fields.pop(settings.label))
            if label not in names:
                raise DataError(
                    f"{document.where}: the label {quoted(label)} is none of the model's classes."
                    + did_you_mean(label, names)
                )
            found[document.split].append(Row(fields, names.index(label)))
    return found


def spread(rows: Sequence[Row], limit: int) -> list[Row]:
    """So many of the rows, evenly over all, as they may stand class by class; 0: all."""
    count = min(limit, len(rows)) or len(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def worded(words: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """The word for each class. Raises ConfigError if the numbers differ."""
    if not words:
        return tuple(classes)
    if len(words) != len(classes) or len(set(words)) != len(words):
        raise ConfigError(
            f"config.words has {len(words)} words, {len(set(words))} different ones, for "
            f"{len(classes)} classes: {', '.join(classes)}. Give one for each, in this order."
        )
    return tuple(words)
