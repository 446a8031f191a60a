"""Errors a user can cause, each with the exit code that a supervisor can act on.

The codes: 2 configuration, 3 numerics, 4 checkpoint or storage, 5 data, 6 resources, 7 a number
that is not what it is said to be, 75 preempted (start me again). Everything else is a bug in fmjax
and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

LONGEST_NAME = 100  # characters of a name that a message shows


class FmjaxError(Exception):
    """Base of all errors that `run.py` reports without a traceback."""

    exit_code = 1


class ConfigError(FmjaxError, ValueError):
    """A configuration key, value or command-line argument that cannot be used."""

    exit_code = 2


class NumericsError(FmjaxError):
    """Training produced non-finite numbers for too long."""

    exit_code = 3


class CheckpointError(FmjaxError):
    """A checkpoint or the run folder cannot be written, read or trusted."""

    exit_code = 4


class DataError(FmjaxError, ValueError):
    """Input data that is missing, malformed or different from what was promised."""

    exit_code = 5


class ResourceError(FmjaxError):
    """Not enough memory or devices."""

    exit_code = 6


class Broken(FmjaxError):
    """A config did not come to what it is said to."""

    exit_code = 7


class Preempted(FmjaxError):
    """The run was asked to stop, saved its state, and wants to be started again."""

    exit_code = 75


def quoted(value: object, most: int = 200) -> str:
    """`repr(value)`, cut after `most` characters: an error is one line that a person reads."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a whole number of too many digits
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def first_line(text: object, most: int = 300) -> str:
    """The first line of a message of somebody else, cut after `most` characters."""
    line = next(iter(str(text).strip().splitlines()), "")
    return line if len(line) <= most else f"{line[:most]}…"


def of_exit_code(code: int) -> type[FmjaxError]:
    """The error that a process has ended with."""
    known = {error.exit_code: error for error in FmjaxError.__subclasses__()}
    return known.get(code, FmjaxError)


def did_you_mean(given: str, possible: Iterable[str]) -> str:
    """A sentence naming near misses of `given`, and all possibilities when they are few."""
    possible = sorted(first_line(name, LONGEST_NAME) for name in possible)
    close = difflib.get_close_matches(first_line(given, LONGEST_NAME), possible, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    if 0 < len(possible) <= 20:
        hint += f" Possible: {', '.join(possible)}."
    return hint
