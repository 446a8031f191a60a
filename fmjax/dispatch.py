"""A task by its name: `fmjax/<config.task>.py` has its `run(config, workdir)`."""

import importlib
import os
from pathlib import Path

from ml_collections import ConfigDict

from fmjax.config import load as configs
from fmjax.config import rules
from fmjax.distributed import signals
from fmjax.errors import ConfigError
from fmjax.io import output, workdir


def start(
    config: ConfigDict,
    folder: str | os.PathLike,
    *,
    file: str | os.PathLike,
    fresh: bool = False,
    dry_run: bool = False,
) -> None:
    """Runs the task of a config in `folder`; `file` is where the config is from.

    Raises ConfigError where there is no task, or for a flag that means nothing to it.
    """
    if "task" not in config:
        raise ConfigError(f"--config={file}: not a config of fmjax, it has no key 'task'")
    takes = rules.task_flags(config.task)
    flags = {"dry_run": dry_run, "fresh": fresh}
    if refused := [name for name in flags if flags[name] and name not in takes]:
        raise ConfigError(f"--{refused[0]} means nothing to the task {config.task!r}")
    given = flags | {"changed": configs.changes(config, file)}
    if "fresh" in takes and not dry_run:
        workdir.check(folder, config, fresh=fresh)  # Before the seconds that jax takes.
    with workdir.memory_errors(), configs.missing_keys(file):
        task = importlib.import_module(f"fmjax.tasks.{config.task}")
        signals.raise_interrupts()
        task.run(config, Path(folder), **{key: given[key] for key in given if key in takes})
    if "fresh" not in takes or dry_run:  # others keep in a folder all that they print
        output.check()
