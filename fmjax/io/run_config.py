"""The config that a run folder was started with: config.json, else that of its newest checkpoint.

Nothing here imports jax.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fmjax.config import load as configs
from fmjax.errors import CheckpointError, ConfigError
from fmjax.io import metrics_history, metrics_log, retention
from fmjax.io.storage import read_object

FILE = "config.json"
# Written by a run that has trained; its log and its checkpoints are looked into.
RESULTS = ("dumps", "examples.npz", "summary.json", "ledger.json", "evaluation.jsonl")
Rows = list[tuple[str, Any, Any]]  # key, value before, value now


def compare(folder: Path, config: ConfigDict) -> tuple[Rows, str]:
    """The differences between the config of a run folder and `config`, and a sentence where it was
    read from the newest checkpoint: config.json is damaged, or names another run than both.

    Raises CheckpointError where config.json is damaged and the run has no checkpoint.
    """
    content, file = read(folder), folder / FILE
    reason, rows = "is missing", None
    if content is not None:
        try:
            written = configs.from_json(content.decode())
            rows = configs.diff(written, configs.redact(config))
            reason = "is not of this run"
        except ValueError as error:
            reason = f"cannot be read ({error})"
    if rows is not None and not is_other(rows):
        return rows, ""
    try:
        step, meta = _newest(folder / "checkpoints")
    except CheckpointError:
        if rows is None:
            raise
        step, meta = None, {}
    if step is not None and (rows is None or is_other(changes_since(meta, written))):
        saved = changes_since(meta, config)
        if rows is None or not is_other(saved):
            return saved, f"{file} {reason}: compared with checkpoint {step}"
    if rows is not None:
        return rows, ""
    if content is not None and is_trained(folder):
        raise CheckpointError(f"{file} {reason}. --fresh starts over")
    return [], ""


def _newest(checkpoints: Path) -> tuple[int | None, Mapping[str, Any]]:
    """The newest step and the meta of its checkpoint; None without a step."""
    step = retention.newest(checkpoints, quarantine=False)
    return step, {} if step is None else retention.read_meta(checkpoints / str(step))


def changes_since(meta: Mapping[str, Any], config: ConfigDict) -> Rows:
    """The differences between the config in the meta of a checkpoint and `config`.

    A checkpoint has the model and the tokenizer of config.init in the place of the name "init", so
    that only what the config says beside it is compared.
    """
    saved = dict(meta["config"])
    now = json.loads(json.dumps(configs.flatten(configs.redact(config))))
    if now.get("tokenizer.name") == "init":
        now["tokenizer.name"] = saved.get("tokenizer.name")
    if now.get("model.name") == "init":
        given = {key for key in now if not key.startswith("model.") or now[key] is not None}
        given.discard("model.name")
        saved = {key: saved[key] for key in saved if key in given or not key.startswith("model.")}
        now = {key: now[key] for key in given}
    keys = sorted(saved.keys() | now.keys())
    pairs = [(key, saved.get(key, configs.ABSENT), now.get(key, configs.ABSENT)) for key in keys]
    return [(key, before, value) for key, before, value in pairs if before != value]


def check(folder: Path, config: ConfigDict) -> None:
    """Raises ConfigError where the folder holds another run than that of `config`."""
    rows, _ = compare(folder, config)
    if is_other(rows) and is_trained(folder):
        raise _other_run(folder, rows)


def check_meta(folder: Path, meta: Mapping[str, Any], config: ConfigDict) -> None:
    """Raises ConfigError where a checkpoint of the folder is of another run than `config`."""
    rows = changes_since(meta, config)
    if is_other(rows):
        raise _other_run(folder, rows)


def is_other(rows: Rows) -> bool:
    """True if the changes make another run."""
    return any(not configs.may_change(key) for key, _, _ in rows)


def listed(rows: Rows, most: int = 8) -> str:
    shown = [f"{key}: {before!r} -> {now!r}" for key, before, now in rows[:most]]
    more = [f"and {len(rows) - most} more"] if len(rows) > most else []
    return ", ".join(shown + more)


def read(folder: Path) -> bytes | None:
    """The bytes of config.json, None where there is none. Raises CheckpointError where it cannot be
    read."""
    file = folder / FILE
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}. --fresh starts over") from error


def is_trained(folder: Path) -> bool:
    """True if a run, or one of its arms, has done a step there of which something remains."""
    checkpoints = folder / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return (
        any(name[:1].isdigit() for name in names)  # damaged and unfinished ones, too
        or any((folder / name).exists() for name in RESULTS)
        or _has_steps(folder)
        or any(is_trained(arm) for arm in folder.glob("arms/*"))
    )


def _has_steps(folder: Path) -> bool:
    """True if metrics.jsonl has a line of metrics or a damaged one, or status.json a step."""
    rows, events = metrics_log.read(folder)
    damaged = metrics_history.read(folder / metrics_log.FILE).damaged
    damaged += sum(event["event"] == "damaged" for event in events)
    status = read_object(folder / "status.json")
    return bool(rows or damaged or status.get("step") or status.get("checkpoint"))


def _other_run(folder: Path, rows: Rows) -> ConfigError:
    fixed = [row for row in rows if not configs.may_change(row[0])]
    return ConfigError(
        f"{folder} holds a run with another config ({listed(fixed)}): "
        "use another --workdir, or --fresh to remove that run and start over"
    )
