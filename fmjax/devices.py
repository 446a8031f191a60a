"""The devices of this machine, described for people, and an error where there is none."""

import os
from pathlib import Path
from typing import Any

import jax

from fmjax.errors import ResourceError, first_line

INSTALL = {
    "cuda": "pip install -e '.[gpu]'",
    "gpu": "pip install -e '.[gpu]'",
    "tpu": "pip install -e '.[tpu]'",
}


def require() -> list[Any]:
    """All devices. Raises ResourceError where the platform that jax is told to use has none."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where it is not installed at all
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = f" ({first_line(error)})" if str(error) else ""
        install = INSTALL.get(asked.partition(",")[0], "install jax for it")
        raise ResourceError(
            f"JAX_PLATFORMS={asked}: no such device can be used here{reason}. Unset JAX_PLATFORMS, "
            f"set it to cpu, or {install}"
        ) from error


def describe(device: Any, count: int) -> str:
    """Text such as "8 x NVIDIA H200 (gpu), 139.8 GiB each", "1 x cpu"."""
    kind = device.device_kind
    name = kind if kind == device.platform else f"{kind} ({device.platform})"
    facts = [f"{count} x {name}"]
    if size := (device.memory_stats() or {}).get("bytes_limit"):
        facts.append(f"{size / 2**30:.1f} GiB each")
    return ", ".join(facts)


def unused() -> str:
    """A sentence about accelerators that jax on a CPU leaves idle, "" where there are none."""
    found = {"gpu": Path("/dev/nvidia0"), "tpu": Path("/dev/accel0")}
    for kind, file in found.items():
        if file.exists() and "JAX_PLATFORMS" not in os.environ:
            return f"this machine has a {kind.upper()} that jax cannot use: {INSTALL[kind]}"
    return ""
