"""The config files there are, for messages about one that is missing. No file is executed."""

import ast
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from fmjax.errors import did_you_mean

CHECKOUT = Path(__file__).parent.parent.parent
# Beside the package in a checkout, else where pip puts the data files of a wheel (setup.cfg).
HOMES = CHECKOUT / "configs", Path(sys.prefix) / "share/fmjax/configs"
SHIPPED = next((home for home in HOMES if home.is_dir()), HOMES[0])


def usage(words: Iterable[str]) -> str:
    """The way to name a config when --config is missing: the one among `words`, else all there
    are."""
    for word in words:
        name, colon, arg = word.partition(":")
        if name.endswith((".py", ".json")) and os.path.isfile(name):
            return f" Did you mean: python run.py --config={name}{colon}{arg}"
    return "\n".join([" Give one of these, or see python run.py --help:", *listed()])


def listed() -> list[str]:
    """A line for each config: how to give it, and the first line of its docstring."""
    home = next((home for home in (Path("configs"), SHIPPED) if any(home.glob("*.py"))), SHIPPED)
    files = [*sorted(home.glob("*.py")), *sorted(home.glob("*/*.py"))]
    names = {file: f"configs/{file.relative_to(home).as_posix()}" for file in files}
    width = max(map(len, names.values()), default=0)
    return [f"  --config={name:<{width}}  {summary(file)}" for file, name in names.items()]


def shipped(spec: str) -> str:
    """`spec` (FILE.py[:ARG]), or the shipped config of this name where no file has it."""
    name, colon, arg = spec.partition(":")
    parts = Path(name).parts
    if parts[:1] == ("configs",) and not os.path.isfile(name):
        file = SHIPPED.joinpath(*parts[1:])
        if ".." not in parts and os.path.isfile(file):
            return f"{file}{colon}{arg}"
    return spec


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
