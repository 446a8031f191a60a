"""Reader of parquet files, whatever types pandas, polars or `datasets` store text in."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fmjax.data import lines, readers
from fmjax.data import records as values
from fmjax.data.settings import DataSettings
from fmjax.errors import DataError, FmjaxError

ROWS = 16  # in memory at a time: a text that is stored once may be in every row


def read(path: Path, settings: DataSettings, key: str, check: Callable) -> Iterator[tuple]:
    """The rows of a parquet file, as the readers of readers.py yield them."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        readers.check_columns(path, settings, file.schema_arrow.names)
        for column, kind in settings.schema.items():
            _check_type(path, settings, column, kind, file.schema_arrow.field(column).type)
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        for part in (group.column(i) for group in groups for i in range(group.num_columns)):
            lines.check_ratio(path, part.total_uncompressed_size, part.total_compressed_size)
        unpacked, size, rows = 0, path.stat().st_size, file.metadata.num_rows
        for batch in file.iter_batches(batch_size=ROWS, columns=list(settings.schema)):
            check()
            # As bytes, because pyarrow does not check that texts are UTF-8.
            columns = [batch.column(name) for name in settings.schema]
            columns = [column.cast(_as_bytes(column.type)).to_pylist() for column in columns]
            for stored in zip(*columns, strict=True):
                row += 1
                unpacked += _size(stored)
                lines.check_ratio(path, unpacked, size)
                fields, bad = _read(stored, settings)
                yield fields or values.excerpt(stored[0]), f"row {row}", bad, size * row // rows
        check()
    except FmjaxError:
        raise
    # Damaged files, and times that Python's types cannot hold, are errors of these kinds.
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: not readable as parquet beyond row {row} ({_line(error)}); config.{key}"
        ) from error


def _read(stored: tuple, settings: DataSettings) -> tuple[dict, str]:
    """As `records.read`, from the values of one row in the order of the schema."""
    try:
        fields = dict(zip(settings.schema, _decoded(stored), strict=True))
    except ValueError as error:
        return {}, str(error)
    return values.read(fields, settings.schema)


def _check_type(path: Path, settings: DataSettings, column: str, kind: str, stored: Any) -> None:
    """Raises DataError where a column of the type `stored` cannot hold values of `kind`."""
    from pyarrow import types

    numbers = (types.is_integer, types.is_floating, types.is_decimal)
    possible = {
        "text": (_is_text,),
        "filled": (_is_text,),
        "label": (_is_text, types.is_integer),
        "number": (_is_text, *numbers),
    }
    if kind in possible and not any(is_kind(_looked_up(stored)) for is_kind in possible[kind]):
        raise DataError(
            f"{path}: column {column!r} ({settings.key_of(column)}) holds {_line(stored)}, not "
            f"{values.KINDS[kind]}."
        )


def _is_text(stored: Any) -> bool:
    from pyarrow import types

    return types.is_string(stored) or types.is_large_string(stored) or types.is_string_view(stored)


def _looked_up(stored: Any) -> Any:
    """The type of the values of a column, which may be numbers of categories in a dictionary."""
    from pyarrow import types

    return _looked_up(stored.value_type) if types.is_dictionary(stored) else stored


def _as_bytes(stored: Any) -> Any:
    """The type with bytes for text, also inside of lists and structures."""
    import pyarrow
    from pyarrow import types

    stored = _looked_up(stored)
    if _is_text(stored):
        return pyarrow.large_binary()
    if types.is_list(stored) or types.is_large_list(stored) or types.is_fixed_size_list(stored):
        return pyarrow.large_list(_as_bytes(stored.value_type))
    if types.is_struct(stored):
        return pyarrow.struct([field.with_type(_as_bytes(field.type)) for field in stored])
    return stored


def _decoded(value: Any) -> Any:
    """The value with text for bytes, also inside of lists and structures. Raises ValueError where
    they are not UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            byte = f"byte 0x{value[error.start]:02x} at place {error.start + 1}"
            raise ValueError(f"{byte} of the text is not UTF-8") from error
    if isinstance(value, list | tuple):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    return value


def _size(value: Any) -> int:
    """Bytes of all text in a value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return len(value) if isinstance(value, bytes) else 0


def _line(value: Any) -> str:
    """The first line of what pyarrow says of an error or of a type."""
    text = (str(value).strip() or type(value).__name__).splitlines()[0]
    return text if len(text) <= 200 else f"{text[:200]}…"
