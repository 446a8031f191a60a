"""Closing what is open without losing the error that ended the work."""

import contextlib
import logging

from fmjax.errors import first_line

log = logging.getLogger(__name__)


class FirstError(contextlib.ExitStack):
    """An ExitStack that raises the error of its block, and logs those of cleaning up after it.

    The first error has the exit code that counts; the others mostly follow from it.
    """

    def __exit__(self, *error) -> bool:
        try:
            return super().__exit__(*error)
        except Exception as later:
            if error[1] is None or later is error[1]:
                raise
            log.error("while ending: %s: %s", type(later).__name__, first_line(later))
            return False
