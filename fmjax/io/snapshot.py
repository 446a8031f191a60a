"""Folders that others made: models and tokenizers, on this disk or on the hub.

They are data and not trusted: nothing in them is executed, links may not lead out of them, and what
is read of a text is bounded. Nothing here imports jax.
"""

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmjax.errors import CheckpointError, ConfigError, quoted

TOKENIZER = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL = ("*.safetensors", *TOKENIZER)
MAX_JSON_BYTES = 2**27  # the largest tokenizers have 35 MB


def find(source: str | Path, revision: str = "", *, files: Sequence[str] = MODEL) -> Path:
    """The folder `source`, or the snapshot of a hub id, of which only `files` are fetched.

    `id@commit` says the revision too. Warns when a hub id is not pinned to a commit.

    Raises:
      ConfigError: it is neither.
      CheckpointError: the folder has a link that leads out of it.
    """
    folder = Path(os.path.expanduser(source))
    if os.path.isdir(folder):  # os.path: a Path raises for names that are too long
        _check_links(folder)
        return folder
    name, _, commit = str(source).partition("@")
    revision = revision or commit
    if not re.fullmatch(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", name) or ".." in revision:
        raise ConfigError(f"{quoted(str(source))} is neither a folder nor an id on the hub.")
    import huggingface_hub  # slow to import

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=list(files)
            )
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ConfigError(
            f"{quoted(str(source))} is not a folder, and the hub did not give it: {error}"
        ) from error
    if not is_commit(revision):
        warnings.warn(
            f"{name!r} is not pinned and can change; today's is {name}@{folder.name}.", stacklevel=2
        )
    return folder


def is_commit(revision: str) -> bool:
    """True if a revision can never mean anything else: branches and tags move."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError, and ValueError for all that is not JSON."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {size:,} bytes, the limit is {MAX_JSON_BYTES:,}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def _check_links(folder: Path) -> None:
    """A link to a private file would be read as a vocabulary, and copied by an export."""
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # the hub's cache, whose files are links
        allowed.append(root.parent.parent / "blobs")
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]  # .git, .cache
        for path in (Path(place, name) for name in [*folders, *names]):
            if path.is_symlink():
                target = Path(os.path.realpath(path))
                if not any(target.is_relative_to(parent) for parent in allowed):
                    raise CheckpointError(
                        f"{path} is a link to {target}, outside of its folder. If you trust it, "
                        "put the file itself there."
                    )
            elif not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{path} is no plain file.")
