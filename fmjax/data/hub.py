"""Records of a dataset on the hub, or of a local folder laid out like one, through `datasets`.

Scripts in a repository are never run: `datasets` has no support for them any more, and nothing here
asks for it. Of the formats it reads, only those of text are let in.
"""

import os
from collections.abc import Callable, Iterator

from fmjax.data import records as values
from fmjax.data.records import Record
from fmjax.data.settings import DataSettings
from fmjax.data.waiting import polled
from fmjax.errors import ConfigError, DataError, FmjaxError, did_you_mean

TEXTS = ("string", "large_string", "string_view")
FORMATS = ("arrow", "csv", "json", "parquet", "text")


def records(
    settings: DataSettings,
    split: str,
    check: Callable[[], None] = lambda: None,
    poll: Callable[[], None] = lambda: None,
) -> Iterator[Record]:
    """The rows of one split of a hub dataset, or of a local folder laid out like one.

    `poll` is called all the while, `check` after each batch that is read; both may raise.
    """
    import datasets

    where = f"{settings.path}[{split}]"
    row = 0
    try:
        which = dict(name=settings.subset or None, revision=settings.revision or None)
        path = os.path.expanduser(settings.path)
        builder = polled(lambda: datasets.load_dataset_builder(path, **which), poll)
        _check_format(builder.name, where)
        which |= dict(split=split, streaming=settings.streaming)
        dataset = polled(lambda: datasets.load_dataset(path, **which), poll)
        _check_columns(dataset.features, settings, where)
        names = _class_names(dataset.features, settings)
        total = 0 if settings.streaming else len(dataset)
        if builder.name != "csv":
            dataset = dataset.select_columns(list(settings.schema))
        for batch in dataset.iter(batch_size=256):
            poll()
            check()
            if builder.name == "csv":
                _check_once(batch, settings, where)
            for found in zip(*(batch[column] for column in settings.schema), strict=True):
                row += 1
                fields, bad = _read(dict(zip(settings.schema, found, strict=True)), names, settings)
                yield Record(
                    fields,
                    f"{where} row {row}",
                    row / (total or row),
                    bad,
                    values.excerpt(found[0]) if bad else "",
                )
    except FmjaxError:
        raise
    except Exception as error:  # the library raises what its parsers, the network or the hub raise
        root = error
        while root.__cause__ is not None:  # "DatasetGenerationError" hides what happened
            root = root.__cause__
        reason = "a file without records" if isinstance(root, StopIteration) else str(root)
        raise DataError(
            f"{where} cannot be read beyond row {row}: {reason.rstrip('.')}. See config.data.path, "
            "subset, revision, and train and validation, which are names of splits."
        ) from error


def _check_format(name: str, where: str) -> None:
    """The others have parsers of native code, or unpack what a file says, and hold no text."""
    if name not in FORMATS:
        raise ConfigError(
            f"config.data.path: {where} has its data in the format {name!r}, which is not one of "
            f"{', '.join(FORMATS)}."
        )


def _check_columns(features, settings: DataSettings, where: str) -> None:
    if features is None:  # a stream that does not say; a missing column is found at the first row
        return
    for column, wanted in settings.schema.items():
        if column not in features:
            raise ConfigError(
                f"{settings.key_of(column)}={column!r} is no column of {where}."
                + did_you_mean(column, features)
            )
        kind = getattr(features[column], "dtype", type(features[column]).__name__)
        if wanted in ("text", "filled") and kind not in TEXTS:
            raise DataError(
                f"{where}: column {column!r} ({settings.key_of(column)}) holds {kind}, not text. "
                "One record of another type makes `datasets` change the whole column."
            )


def _check_once(columns, settings: DataSettings, where: str) -> None:
    """Raise DataError for a column that a .csv has twice: pandas, which reads it, renames one."""
    for column in settings.schema:
        if f"{column}.1" in columns:
            raise DataError(
                f"{where} has the columns {column!r} and '{column}.1' ({settings.key_of(column)}). "
                f"The second is what pandas calls a column {column!r} that is there twice: which "
                "one is meant? Rename it in the file."
            )


def _class_names(features, settings: DataSettings) -> list[str] | None:
    """The names of the numbers of a label column, where the dataset has them."""
    feature = (features or {}).get(settings.label) if settings.label in settings.schema else None
    return getattr(getattr(feature, "feature", feature), "names", None)


def _read(found: dict, names: list[str] | None, settings: DataSettings) -> tuple[dict, str]:
    if names:
        label = found[settings.label]
        numbers = label if isinstance(label, list) else [label]
        if not all(isinstance(i, int) and 0 <= i < len(names) for i in numbers):
            return {}, f"the label {label} is none of the dataset's {len(names)} classes"
        named = [names[i] for i in numbers]
        found = found | {settings.label: named if isinstance(label, list) else named[0]}
    return values.read(found, settings.schema)
