"""Summary of runs that were vmapped together: a table, and summary.json beside their folders."""

import json
from collections.abc import Sequence
from typing import Any

from fmjax.io import atomic, workdir
from fmjax.io import summary as summaries
from fmjax.io.metrics_log import plain
from fmjax.io.progress import SCORES, spread, table


def write(folder: workdir.Folder, config: Any, arms: Sequence[workdir.Folder]) -> None:
    """Prints what each of the `arms` was measured at last, and writes all of it."""
    each = [summaries.read(arm.path) for arm in arms]
    values = {key: row for key, row in config.arms}
    found = {
        "arms": [
            {
                "folder": str(arm.path.relative_to(folder.path)),
                **{key: row[i] for key, row in values.items()},
                "failed": str(arm.failure or ""),
                "metrics": summary["metrics"],
            }
            for i, (arm, summary) in enumerate(zip(arms, each, strict=True))
        ],
        "trainable_parameters": [summary["trainable_parameters"] for summary in each],
        "environment": each[0]["environment"],
        "command": each[0].get("command", ""),
    }
    atomic.write_atomic(folder.path / "summary.json", json.dumps(plain(found), indent=2))
    folder.update(step=arms[0].step, checkpoint=arms[0].step)
    metrics = [
        name
        for name in each[0]["metrics"]
        if name == "validation/loss"
        or name.startswith("validation/")
        and name.rpartition("/")[2] in SCORES
    ]
    heads = ["arm", *values, *(name.removeprefix("validation/") for name in metrics)]
    rows = [
        [str(i), *(str(row[i]) for row in values.values()), *_numbers(summary, metrics, arm)]
        for i, (arm, summary) in enumerate(zip(arms, each, strict=True))
    ]
    if list(values) == ["seed"] and not any(arm.failure for arm in arms):
        told = [[summary["metrics"][name] for summary in each] for name in metrics]
        rows.append(["", "mean", *map(spread, told)])
    print()
    print(table([heads, *rows]))
    print(f"{folder.path}/arms has a run folder of each, with its report")


def _numbers(summary: Any, metrics: Sequence[str], arm: workdir.Folder) -> list[str]:
    if arm.failure:
        return ["failed" for _ in metrics]
    return [f"{float(summary['metrics'][name]):.4f}" for name in metrics]
