"""The faults and bad inputs that a run has to survive, by number.

A test that covers row 23 has `row23` in its name, wherever it lives: `pytest -k row23` runs the
row. This file holds what the numbers mean, and checks that no row is without a test.
"""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
ROWS = {
    # The process and the machine
    1: "SIGKILL at any time, again and again: the final state has the bits of a straight run",
    2: "SIGKILL between arrays and manifest: the step is ignored, the one before is used",
    3: "SIGKILL while old steps are deleted: every listed step restores",
    4: "SIGTERM during a step: the step is finished and saved, exit code 75",
    5: "SIGTERM while data is prepared or awaited, during compilation, evaluation: as 4",
    6: "SIGTERM again, or Ctrl-C, during the save: it completes; the third Ctrl-C kills",
    7: "SIGUSR1: as 4",
    8: "SIGTERM to one of several processes: all save the same step",
    9: "SIGKILL of one of several processes: the others end, a restart resumes",
    10: "a process that is stuck when a signal comes: it says where, and ends with exit code 75",
    11: "a process that never comes: the others give up and say which",
    12: "another number of devices: the same data, losses to 1e-6, parameters close",
    13: "a batch or an axis that devices do not divide: refused before anything is compiled",
    14: "a finished run started again: exit code 0, no step, no file changed",
    15: "two runs in one folder: the second is refused and told of the first; locks may be stale",
    16: "out of memory: exit code 6, and what to change",
    # The storage of checkpoints
    18: "one flipped bit: found, the step set aside, an older one used; if asked for, an error",
    19: "an array file truncated, empty, gone: as 18, and named",
    20: "empty step folders and stray files: ignored",
    21: "a damaged manifest: as 18",
    22: "all checkpoints damaged or gone: never a silent start from zero",
    23: "a full disk: training goes on, the save is repeated; three failures end the run",
    24: "a folder that cannot be written: refused before any work",
    25: "other shapes, missing or further parameters, another optimizer: all listed by path",
    26: "another dtype: refused, never cast",
    27: "a newer format: refused with both versions; every older one can be read",
    28: "a config changed between two starts: the difference is told, and refused where it matters",
    29: "a metric that is not finite: never the best",
    30: "a roll-back: what is saved after it is written",
    31: "leaves that cannot be stored: refused with a remedy",
    # Numbers
    33: "NaN or infinite loss: update skipped, counted; too many end the run: dump, code 3",
    34: "one leaf of the gradient not finite under a finite loss: as 33",
    35: "a spike is skipped, a new level accepted after a few; not finite numbers poison nothing",
    36: "examples that break every run: config.data.skip passes over them, and checkpoints know it",
    37: "a batch without targets: loss 0, no NaN",
    38: "a query that may see nothing: zeros, and no NaN in the gradient",
    39: "counters beyond 2^24, 2^31, 2^53: exact",
    40: "small updates: none is lost to a low precision",
    41: "the same seed: the same numbers; another seed: others",
    42: "microbatches, rematerialisation, scan: the numbers of one plain batch",
    # Data and configuration
    43: "a broken record: file and line; or skipped, set aside, counted, up to a limit",
    44: "missing files, patterns without match, empty files, missing columns, null: one error",
    45: "one row of another type: named",
    46: "other encodings and line ends, NUL, surrogates, huge lines, bombs: each by its policy",
    47: "fewer rows than a batch: refused",
    48: "tokenizers and models that do not go together, ids beyond the vocabulary: refused",
    49: "documents longer than the context: split, truncated, dropped or refused, and counted",
    50: "misspelt keys, wrong types, values out of range, nothing that trains: what was meant",
    51: "resuming with other data, seed or batch size: refused with the fields that differ",
    52: "a data worker that fails or dies: named, and no process is left behind",
}
WITHOUT = {
    17: "The wall clock is only printed; what is measured uses time.monotonic.",
    32: "Checkpoints lie on file systems; object stores come with a later part.",
}


SEVERAL_PROCESSES = {8, 9, 11}  # which take long: tested with `-m slow`


def covered(*, slow: bool) -> set[int]:
    """The rows that tests are named after: tests of an ordinary run, and with `slow` all."""
    rows: set[int] = set()
    for file in TESTS.rglob("test_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = {ast.unparse(mark) for mark in node.decorator_list}
                if slow or "pytest.mark.slow" not in marks:
                    rows |= set(map(int, re.findall(r"_row(\d+)", node.name)))
    return rows


def test_every_row_has_a_test_or_a_reason():
    assert not ROWS.keys() & WITHOUT.keys()
    assert ROWS.keys() | WITHOUT.keys() == set(range(1, 53))
    assert covered(slow=True) == ROWS.keys()
    assert covered(slow=False) >= ROWS.keys() - SEVERAL_PROCESSES
