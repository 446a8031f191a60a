"""Published questions, by name: each file format to items (`fmjax.evaluation.multiple_choice`).

| name | file | an item |
|---|---|---|
| `blimp` | JSON lines with `sentence_good`, `sentence_bad`, `UID` | two sentences, of which one is grammatical (Warstadt et al. 2020); groups are phenomena |
| `lambada` | JSON lines with `text` | the last word of a passage, and what is before it (Paperno et al. 2016) |
| `hellaswag` | JSON lines with `ctx`, `endings`, `label` | four endings of a situation (Zellers et al. 2019) |
| `gsm8k` | JSON lines with `question`, `answer` | sums in words, whose answer the model has to write (Cobbe et al. 2021) |
| `choices` | JSON lines with `context`, `choices`, `label`, maybe `group` | your own |
| `sst2`, … | a file of GLUE, .tsv | see fmjax/evaluation/prompt_templates.py, where templates say what is asked |
"""  # noqa: E501  a row of a table is one line

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fmjax.data import json_rows, records
from fmjax.errors import ConfigError, DataError, quoted
from fmjax.evaluation import prompt_templates
from fmjax.evaluation.multiple_choice import Item

SUFFIXES = (".jsonl", ".jsonl.gz")


def blimp(row: Mapping[str, Any]) -> Item:
    return Item("", (row["sentence_good"], row["sentence_bad"]), 0, str(row.get("UID", "")))


def lambada(row: Mapping[str, Any]) -> Item:
    context, space, word = row["text"].rstrip().rpartition(" ")
    return Item(context, (space + word,), 0)


def hellaswag(row: Mapping[str, Any]) -> Item:
    endings = tuple(" " + ending for ending in _list(row, "endings"))
    return Item(row["ctx"], endings, _label(row))


def choices(row: Mapping[str, Any]) -> Item:
    given = row["context"], tuple(_list(row, "choices")), _label(row)
    return Item(*given, str(row.get("group", "")))


def gsm8k(row: Mapping[str, Any]) -> Item:
    return Item("Question: " + row["question"] + "\nAnswer:", (" " + row["answer"],), 0)


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(row[key], list):  # a text would be taken for a choice a letter
        raise TypeError(f"{key} is {type(row[key]).__name__}, not a list")
    return row[key]


def _label(row: Mapping[str, Any]) -> int:
    """The number of the right choice; HellaSwag has it as text."""
    label = row["label"]
    if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) < 10:
        return int(label)
    if not isinstance(label, int) or isinstance(label, bool):
        raise TypeError(f"the label {label!r} is no whole number")
    return label


READERS: dict[str, Callable[[Mapping[str, Any]], Item]] = {
    "blimp": blimp,
    "lambada": lambada,
    "hellaswag": hellaswag,
    "gsm8k": gsm8k,
    "choices": choices,
}


def items(name: str, path: str | os.PathLike, limit: int = 0) -> list[Item]:
    """The items of a file, or of all files of a folder, `limit` of each (0: all).

    Raises ConfigError where there is no file, and DataError for a row that is no item.
    """
    home = Path(os.path.expanduser(path))
    files = [home]
    if home.is_dir():
        files = sorted(file for file in home.iterdir() if file.name.endswith(SUFFIXES))
    if not files or not files[0].is_file():
        raise ConfigError(
            f"config.benchmark.path={str(path)!r}: no such file, and no folder with files in "
            f"{' or '.join(SUFFIXES)}."
        )
    found = [item for file in files for item in _of_file(READERS[name], name, file, limit)]
    if not found:
        raise DataError(f"config.benchmark: there is no row of {name!r} in {str(path)!r}.")
    return found


def asked(
    wanted: Mapping[str, Any], templates: Sequence[str], words: Sequence[str], examples: bool
) -> dict[str, tuple[list[Item], list[Item]]]:
    """{template: (items, those whose answers are shown before them)}; `wanted` is
    `config.benchmark`, of which the files with `examples` are read where they are needed.

    Raises ConfigError for templates and words where the name has none.
    """
    name, path, limit = wanted["name"], wanted["path"], wanted["limit"]
    if name not in prompt_templates.GLUE:
        if templates or words:
            raise ConfigError(
                f"config.templates and config.words mean nothing to {name!r}: they are of "
                f"{', '.join(prompt_templates.GLUE)} and classes."
            )
        return {"": (items(name, path, limit), items(name, wanted["examples"]) if examples else [])}
    kind, rows = prompt_templates.GLUE[name], []
    for file, most in ((path, limit), (wanted["examples"] if examples else None, 0)):
        file = file and Path(os.path.expanduser(file))
        if file is not None and not file.is_file():
            raise ConfigError(f"config.benchmark: no such file of {name!r}: {str(file)!r}.")
        rows.append(list(prompt_templates.glue(name, file, most)) if file else [])
    return prompted(*rows, templates or (kind.template,), words or kind.words, kind.classes)


def prompted(
    rows: Sequence[prompt_templates.Row],
    examples: Sequence[prompt_templates.Row],
    templates: Sequence[str],
    words: Sequence[str],
    classes: Sequence[str],
) -> dict[str, tuple[list[Item], list[Item]]]:
    """As `asked`, of rows with classes."""
    if not rows:
        raise DataError("there is no row to ask: see config.benchmark.path, or config.data.")
    words, found = prompt_templates.worded(words, classes), {}
    for template in templates:
        prompt_templates.check(template, list(rows[0].columns))
        made = lambda rows, template=template: [
            prompt_templates.item(row, template, words) for row in rows
        ]
        found[template] = made(rows), made(examples)
    return found


def _of_file(reader, name: str, file: Path, limit: int) -> Iterator[Item]:
    for count, (where, row) in enumerate(json_rows.read(file, "benchmark.path")):
        if limit and count == limit:
            return
        try:
            item = reader(row)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else quoted(str(error))
            raise DataError(
                f"{where} is no row of {name!r} ({why}); fmjax/evaluation/benchmarks.py lists what "
                "each has."
            ) from error
        texts = (item.context, *item.choices)
        if not all(isinstance(text, str) for text in texts) or not all(item.choices):
            raise DataError(f"{where}: a context and its choices are texts, choices of something.")
        if bad := next(filter(None, map(records.fault, (*texts, item.group))), ""):
            raise DataError(f"{where}: {bad}")
        if not 0 <= item.label < len(item.choices):
            label = quoted(item.label)
            raise DataError(f"{where}: label {label} of {len(item.choices)} choices.")
        yield item
