"""Paths and looks into programs that several tests share."""

from pathlib import Path

import jax
import jax.extend

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".pytest_cache" / "fmjax"


def dots(closed) -> list:
    """All matrix products in a closed jaxpr, those inside calls and loops included."""
    found = []
    for equation in closed.jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "eqns"):
                    inner = jax.extend.core.ClosedJaxpr(inner, ())
                if hasattr(inner, "jaxpr"):
                    found += dots(inner)
    return found
