"""The task that writes the page of a run or a sweep again."""

import os
from pathlib import Path
from typing import Any

from fmjax.errors import ConfigError, quoted
from fmjax.evaluation.results_log import COPY
from fmjax.io import results
from fmjax.reports.run_report import write


def run(config: Any, workdir: str | os.PathLike, dry_run: bool = False) -> None:
    """The task: write report.html of `config.folder` again, a run's or a sweep's."""
    folder = Path(config.folder)
    if os.path.isfile(folder / "sweep.json"):
        from fmjax.experiments import sweep_results  # brings scipy along, which a run does without

        results.check_file(folder / "report.html", COPY)
        if not dry_run:
            print(f"report: {sweep_results.report(folder)}")
        return
    if not os.path.isfile(folder / "config.json"):
        raise ConfigError(
            f"config.folder={quoted(str(config.folder))} is neither a run folder (it "
            "has no config.json) nor that of a sweep (sweep.json); give the folder of a run, such "
            "as runs/mlm-1a2b3c4d"
        )
    results.check_file(folder / "report.html", COPY)
    if not dry_run:
        print(f"report: {write(folder)}")
