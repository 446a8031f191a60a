"""Records of a dataset on the hub, or of a local folder laid out like one, through `datasets`.

Scripts in a repository are never run: `datasets` has no support for them any more, and nothing here
asks for it. Of the formats it reads, only those of text are let in.
"""

from collections.abc import Iterator

from fmjax.data.records import EXCERPT, Record, fault
from fmjax.data.settings import DataSettings
from fmjax.errors import ConfigError, DataError, FmjaxError, did_you_mean

FORMATS = ("arrow", "csv", "json", "parquet", "text")


def records(settings: DataSettings, split: str) -> Iterator[Record]:
    """The rows of one split of a hub dataset, or of a local folder laid out like one."""
    import datasets

    where = f"{settings.path}[{split}]"
    row = 0
    try:
        which = dict(name=settings.subset or None, revision=settings.revision or None)
        _check_format(datasets.load_dataset_builder(settings.path, **which).name, where)
        dataset = datasets.load_dataset(
            settings.path, split=split, streaming=settings.streaming, **which
        )
        _check_column(dataset.features, settings.column, where)
        total = 0 if settings.streaming else len(dataset)
        for batch in dataset.select_columns([settings.column]).iter(batch_size=256):
            for value in batch[settings.column]:
                row += 1
                bad = fault(value)
                yield Record(
                    str(value)[:EXCERPT] if bad else value,
                    f"{where} row {row}",
                    row / (total or row),
                    bad,
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


def _check_column(features, column: str, where: str) -> None:
    if features is None:  # a stream that does not say; a missing column is found at the first row
        return
    if column not in features:
        raise ConfigError(
            f"config.data.column={column!r} is no column of {where}."
            + did_you_mean(column, features)
        )
    kind = getattr(features[column], "dtype", type(features[column]).__name__)
    if kind not in ("string", "large_string"):
        raise DataError(
            f"{where}: column {column!r} (config.data.column) holds {kind}, not text. One record "
            "of another type makes `datasets` change the whole column."
        )
