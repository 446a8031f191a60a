"""The config files there are, for messages about one that is missing. No file is executed."""

import ast
import os
from collections.abc import Iterable
from pathlib import Path

from fmjax.errors import did_you_mean

SHIPPED = Path(__file__).parent.parent.parent / "configs"


def usage(words: Iterable[str]) -> str:
    """The way to name a config when --config is missing: the one among `words`, else all there
    are."""
    for word in words:
        name, colon, arg = word.partition(":")
        if name.endswith((".py", ".json")) and os.path.isfile(name):
            return f" Did you mean: python run.py --config={name}{colon}{arg}"
    files = sorted(Path("configs").glob("*.py"))
    if not files:
        return f" Configs are in {SHIPPED}; python run.py --help shows more."
    width = max(len(str(file)) for file in files)
    lines = [f"  --config={file!s:<{width}}  {summary(file)}" for file in files]
    return "\n".join([" Give one of these, or see python run.py --help:", *lines])


def summary(file: Path) -> str:
    """The first line of a config file's docstring, without the colon at its end."""
    try:
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    except (OSError, ValueError, SyntaxError):
        return ""
    return text.partition("\n")[0].rstrip(":.")


def hint(path: Path) -> str:
    """The config file that a `path` to nothing probably meant."""
    name = path.name
    for folder in (Path("configs"), SHIPPED):
        if os.path.isfile(folder / name) and path.parent.name in ("", "configs"):
            return f" Did you mean --config={folder / name}?"
    # os.path: a Path raises for names that are too long.
    near = path.parent if os.path.isdir(path.parent) else Path("configs")
    return did_you_mean(str(path), near.glob("*.py"))
