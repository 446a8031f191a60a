"""fmjax: objective x model x adaptation x mesh, each a plain function or a Linen module.

For notebooks and scripts: `fmjax.load`, `fmjax.train` and `fmjax.configs` (fmjax/api.py).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmjax.api import load, train

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are asked for: the command line starts without."""
    if name in ("load", "train"):
        from fmjax import api

        return getattr(api, name)
    if name == "configs":
        import importlib

        return importlib.import_module("fmjax.configs")
    raise AttributeError(f"module 'fmjax' has no attribute {name!r}")
