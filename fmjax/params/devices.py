"""The devices of this machine, described for people, and an error where there is none."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from fmjax.errors import ConfigError, ResourceError, first_line, quoted

INSTALL = {
    "cuda": "pip install -e '.[gpu]'",
    "gpu": "pip install -e '.[gpu]'",
    "tpu": "pip install -e '.[tpu]'",
}


def require() -> list[Any]:
    """All devices. Raises ResourceError where the platform that jax is told to use has none,
    ConfigError for XLA_FLAGS that XLA cannot read."""
    check_flags(os.environ.get("XLA_FLAGS", ""))
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


@functools.cache
def check_flags(flags: str) -> None:
    """Raises ConfigError where XLA cannot read `flags`, the value of XLA_FLAGS.

    XLA ends the process that reads such flags, with exit code 1 and no exception. So another
    process reads them first, which costs a third of a second where there are any.
    """
    if not flags.strip():
        return
    read = "from jaxlib.xla_client import CompileOptions as Options\n"
    read += "Options().executable_build_options.debug_options"
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-c", read]
    reader = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    # Other errors of this process are none of the flags'.
    said = re.search(r"^[EF]\d.*flags\w*\.cc:\d+\] (.*)", reader.stderr, re.MULTILINE)
    if reader.returncode and said:
        reason = first_line(said[1]).rstrip(".")
        raise ConfigError(f"XLA_FLAGS={quoted(flags)}: {reason}. Correct XLA_FLAGS, or unset it")


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
