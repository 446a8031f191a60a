"""JSON with a digest of its own content, so that a flipped bit is noticed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from fmjax.io import atomic
from fmjax.io.metrics_log import plain

DIGEST = "digest"


def dumps(body: Mapping[str, Any]) -> bytes:
    """JSON of `body` and its digest. Raises ValueError for a body that has a key of that name."""
    if DIGEST in body:
        raise ValueError(f"the key {DIGEST!r} is that of the digest of all others")
    digest = xxhash.xxh3_128(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, DIGEST: digest}, indent=1).encode()


def loads(raw: bytes) -> dict[str, Any]:
    """The body that `dumps` made JSON of. Raises ValueError where a byte of it has changed."""
    try:
        content = json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}")
    content.pop(DIGEST, None)
    if raw != dumps(content):
        raise ValueError("differs from its own digest")
    return content


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as a whole or not at all. Raises CheckpointError where it cannot be."""
    atomic.write_atomic(file, dumps(plain(content)).decode())


def read(file: Path) -> dict[str, Any]:
    """The object in a file. Raises FileNotFoundError, and ValueError where it is damaged."""
    try:
        return loads(file.read_bytes().removesuffix(b"\n"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(error.strerror) from error
