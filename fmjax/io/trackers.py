"""The trackers that a log feeds beside its own file: TensorBoard, and Weights & Biases.

What they keep is in metrics.jsonl too. A tracker that fails is said once, and never ends a run.
"""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmjax.errors import ConfigError, first_line

FLUSH_SEC = 10.0
RETRY_SEC = 30.0


class TensorBoard:
    """Scalars in event files, written by the caller's thread: one of its own could die of a full
    disk and leave a queue that blocks.

    After an error scalars are dropped for RETRY_SEC, and then begin a new file, since a torn record
    hides what follows it. TensorBoard hides what older files have from `purge_step` on.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        self._folder, self._purge_step, self._tensorboardx = folder, purge_step, _tensorboardx()
        self._writer, self._files, self._failed = None, 0, False
        self._flush_at = self._retry_at = 0.0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now < self._retry_at:
            return
        try:
            if self._writer is None:
                self._open()
            for name, value in metrics.items():
                summary = self._tensorboardx.summary.scalar(name, value)
                self._add(step=step, wall_time=time.time(), summary=summary)
            if now >= self._flush_at:
                self._writer.flush()
                self._flush_at = now + FLUSH_SEC
        except OSError as error:
            self._drop(error)

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._drop(error)
        self._writer = None

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        writer = self._tensorboardx.event_file_writer.EventsWriter
        self._writer = writer(str(self._folder / "events"), f".{self._files}")
        self._files += 1
        if self._purge_step is not None:
            session_log = self._tensorboardx.proto.event_pb2.SessionLog
            start = session_log(status=session_log.START)
            self._add(step=self._purge_step, session_log=start)

    def _add(self, **fields: Any) -> None:
        self._writer.write_event(self._tensorboardx.proto.event_pb2.Event(**fields))

    def _drop(self, error: OSError) -> None:
        writer, self._writer = self._writer, None
        self._retry_at = time.monotonic() + RETRY_SEC
        with contextlib.suppress(OSError):
            if writer is not None:
                writer.close()
        if not self._failed:
            self._failed = True
            _warn(f"TensorBoard's files in {self._folder} cannot be written now", error)


class Wandb:
    """A run of Weights & Biases, begun, or taken up again where `resumed`.

    Raises ConfigError where a new run cannot begin; for one that resumes it is only left out.
    """

    def __init__(self, workdir: Path, run_id: str, config: Mapping[str, Any], resumed: bool):
        import wandb

        self._module: Any = wandb
        try:
            wandb.init(
                project="fmjax",
                name=workdir.name,
                id=run_id,
                resume="allow",
                dir=str(workdir),
                config=dict(config),
            )
            wandb.define_metric("step")
            wandb.define_metric("*", step_metric="step")
        except Exception as error:  # of a library, about a network
            if not resumed:
                raise ConfigError(
                    f"config.wandb=True: Weights & Biases does not begin: {first_line(error)}. Run "
                    "`wandb login`, set WANDB_MODE=offline, or set config.wandb=False"
                ) from error
            self._leave(error)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # Its own counter would drop the steps repeated after a resume; ours is a metric.
        self._call("log", {"step": step, **metrics})

    def close(self) -> None:
        self._call("finish")

    def _call(self, name: str, *args: Any) -> None:
        if self._module is None:
            return
        try:
            getattr(self._module, name)(*args)
        except Exception as error:
            self._leave(error)

    def _leave(self, error: Exception) -> None:
        self._module = None
        _warn("Weights & Biases is left out from here on", error)


def require_wandb() -> None:
    """Raises ConfigError where Weights & Biases is not installed."""
    if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "config.wandb=True needs Weights & Biases: pip install wandb, or set config.wandb=False"
        )


def _warn(what: str, error: Exception) -> None:
    print(f"warning: {what} ({first_line(error)}); the run continues", file=sys.stderr, flush=True)


def _tensorboardx() -> Any:
    """The package, without torch, which it imports for an annotation where it is installed: that
    takes seconds and hundreds of megabytes."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        import tensorboardX
        import tensorboardX.event_file_writer
        import tensorboardX.proto.event_pb2
    finally:
        if hide:
            del sys.modules["torch"]
    return tensorboardX
