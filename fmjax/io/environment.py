"""Versions and machine of a run: what its numbers depend on beside config and data."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import fmjax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


def environment(**facts: Any) -> dict[str, str]:
    """Versions of what numbers depend on, with a digest of fmjax's own code, and facts of the
    caller's such as the device kind."""
    found = {"fmjax": f"{fmjax.__version__} {CODE}", "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := _commit():
        found["commit"] = commit
    found["system"] = f"{platform.system()} {platform.machine()}, {_processor()}"
    return {name: str(value) for name, value in facts.items()} | found


def _commit() -> str:
    """The commit of the checkout that fmjax is, "" where it is none."""
    root = Path(fmjax.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    words = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"commit {done.stdout.strip()}"


def _processor() -> str:
    """The name of the processor and the number of its cores, as far as the system says."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = ""
    name = re.search(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)
    return f"{name[1] if name else platform.processor() or 'processor'}, {os.cpu_count()} cores"


def code() -> str:
    """8 hex digits of the files of fmjax."""
    root, digest = Path(fmjax.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


CODE = code()  # as they are when this program starts, whatever becomes of them while it runs
