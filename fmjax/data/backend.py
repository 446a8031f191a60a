"""The Rust tokenizer as all code calls it: what it raises on a text is an error of fmjax.

`tokenizers` panics where a regular expression gives up on a text, among others. A panic arrives as
a BaseException, which no `except Exception` catches, and would end the process with a traceback.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fmjax.errors import DataError, quoted

EXCERPT = 60  # characters of a text that an error shows
REASON = 300  # characters of a library's message


class Backend:
    """A `tokenizers.Tokenizer`, to whose attributes it passes on; its methods raise DataError."""

    def __init__(self, tokenizer: Any):
        object.__setattr__(self, "_wrapped", tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols of copy and pickle, see __reduce__
            raise AttributeError(name)
        value = getattr(self._wrapped, name)
        if not callable(value):
            return value

        def method(*args: Any, **kwargs: Any) -> Any:
            try:
                return guarded(value, *args, **kwargs)
            except Exception as error:
                shown = f" on {_excerpt(args[0])}" if args else ""
                raise DataError(f"the tokenizer fails{shown}: {reason(error)}") from error

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped, name, value)

    def __reduce__(self) -> tuple:
        return Backend, (self._wrapped,)

    def encode_records(
        self, inputs: Sequence[Any], places: Sequence[str], **options: bool
    ) -> list[Any]:
        """The encodings of inputs that stand at `places`, which an error names."""
        try:
            return self.encode_batch(list(inputs), **options)
        except DataError:
            for text, place in zip(inputs, places, strict=True):
                try:
                    self.encode_batch([text], **options)
                except DataError as error:
                    raise DataError(f"{place}: {error}") from error
            raise


def guarded(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The result of a function of `tokenizers`, whose panics are raised as a RuntimeError."""
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of pyo3, which exports no such class
            raise RuntimeError(str(error)) from error
        raise


def reason(error: BaseException) -> str:
    """The message of a library's error, in one line of bounded length."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if line.rstrip().endswith(":"):  # a list follows
        line = " ".join(str(error).split())
    return line if len(line) <= REASON else f"{line[:REASON]}…"


def _excerpt(value: Any) -> str:
    """A text as an error shows it; of a batch the number of its texts."""
    if isinstance(value, (list, tuple)) and len(value) != 1:
        return f"a batch of {len(value):,}"
    text = value[0] if isinstance(value, (list, tuple)) else value
    return quoted(text, EXCERPT)
