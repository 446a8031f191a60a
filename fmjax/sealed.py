"""JSON files with a digest of their own content, so that a flipped bit is noticed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmjax import workdir
from fmjax.logs import plain

DIGEST = "digest"


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as a whole or not at all. Raises CheckpointError where it cannot be."""
    body = json.loads(json.dumps(plain(content)))
    workdir.write_atomic(file, json.dumps(body | {DIGEST: _digest(body)}, indent=2))


def read(file: Path) -> dict[str, Any]:
    """The object in a file. Raises FileNotFoundError, and ValueError where it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}")
    # Files of before there were digests have none.
    digest = content.pop(DIGEST, None)
    if digest is not None and digest != _digest(content):
        raise ValueError("its content differs from its digest")
    return content


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
