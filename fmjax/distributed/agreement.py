"""Agreement between the processes of a run: how they were started, their code, their data.

Each host has its own disk and its own Python. Processes that differ would make one run in silence,
with numbers that nobody asked for, or wait for each other for ever in a computation that only some
of them have.
"""

import json
from collections.abc import Mapping
from typing import Any

from fmjax.config import load as configs
from fmjax.distributed import processes
from fmjax.errors import ConfigError, DataError
from fmjax.io import environment

# What a process may have for itself.
OWN = ("distributed.coordinator", "distributed.process_id", "data.cache", "data.workers")


def check_start(config: Any, flags: Mapping[str, Any]) -> None:
    """Raises ConfigError where the processes were started with other flags, configs or versions of
    the code and of what numbers depend on."""
    flat = configs.flatten(configs.redact(config))
    versions = {name: text for name, text in environment.environment().items() if name != "system"}
    mine = {
        **{f"--{name}": value for name, value in flags.items()},
        **{f"config.{key}": value for key, value in flat.items() if key not in OWN},
        **{f"the version of {name}": text for name, text in versions.items()},
    }
    with processes.together():
        if differences := _differences(mine):
            raise ConfigError(
                f"all processes must be started alike, with the same config: {differences}"
            )


def check_data(dataset: Any) -> None:
    """Raises DataError where the processes have prepared other data; waits for all of them."""
    splits = {f"rows of {name}": len(split) for name, split in dataset.splits.items()}
    mine = {
        "the digest of the contents": dataset.digest,
        "the digest of the rows": dataset.rows_digest,
        "the classes": dataset.labels,
        **{f"the digest of the {name}": text for name, text in dataset.digests.items()},
        **splits,
    }
    with processes.together():
        if differences := _differences(mine):
            raise DataError(
                f"all processes must have the same data: {differences}. Copy the files, the "
                "tokenizer and the revision of process 0, or let all read one folder."
            )


def _differences(mine: Mapping[str, Any]) -> str:
    """A list of what differs from process 0, "" for nothing."""
    mine = json.loads(json.dumps(mine))
    theirs = processes.first(lambda: mine)
    wrong = [key for key in {**theirs, **mine} if mine.get(key) != theirs.get(key)]
    shown = [f"{key}={mine.get(key)!r} here, {theirs.get(key)!r} in process 0" for key in wrong[:3]]
    more = [f"and {len(wrong) - 3} more"] if len(wrong) > 3 else []
    return ", ".join(shown + more)
