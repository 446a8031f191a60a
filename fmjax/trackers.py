"""The trackers that a log feeds beside its own file: TensorBoard, and Weights & Biases."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmjax.errors import ConfigError


def tensorboard(workdir: Path, purge_step: int | None) -> Any:
    """A writer of event files; TensorBoard hides what older ones have from `purge_step` on.

    Torch, which tensorboardX imports for an annotation where it is installed, is kept out of it:
    that takes seconds and hundreds of megabytes.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=purge_step, flush_secs=10)


def require_wandb() -> None:
    """Raises ConfigError where Weights & Biases is not installed."""
    if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "config.wandb=True needs Weights & Biases: pip install wandb, or set config.wandb=False"
        )


def wandb(workdir: Path, run_id: str, config: Mapping[str, Any]) -> Any:
    """The module wandb with run `run_id` begun, or taken up again."""
    import wandb

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
    return wandb
