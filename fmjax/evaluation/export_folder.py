"""The folder that an export writes, of one or several processes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from fmjax.distributed import processes
from fmjax.io import results


@contextlib.contextmanager
def exported(output: Path, last: str = "config.json") -> Iterator[Path]:
    """The folder that process 0 writes and all read back, as `results.new_folder` has it: `output`
    gets the files where all processes end the block well."""
    with contextlib.ExitStack() as stack:
        folder = output / results.TEMPORARY
        if jax.process_index() == 0:
            folder = stack.enter_context(results.new_folder(output, last))
        yield folder
        processes.meet()
