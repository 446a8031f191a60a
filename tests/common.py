"""Paths and looks into programs that several tests share."""

import os
from pathlib import Path

import jax
import jax.extend

from fmjax.params import paths

ROOT = Path(__file__).parent.parent
# One for each of pytest's workers: jax does not write its cache of programs atomically.
CACHE = ROOT / ".pytest_cache" / "fmjax" / os.environ.get("PYTEST_XDIST_WORKER", "alone")


def dots(closed) -> list:
    """All matrix products in a closed jaxpr, those inside calls and loops included.

    A product with a vector is a sum over rows (`precision.column_sums`) and no matrix product.
    """
    found = []
    for equation in closed.jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.invars[0].aval.ndim > 1:
            found.append(equation)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "eqns"):
                    inner = jax.extend.core.ClosedJaxpr(inner, ())
                if hasattr(inner, "jaxpr"):
                    found += dots(inner)
    return found


def least_sent(params, mesh, itemsize: int) -> float:
    """Bytes that a device must send in a step: every weight twice, every gradient once.

    Weights are gathered along `fsdp` for the forward and the backward pass in the dtype of the
    computation, of `itemsize` bytes; gradients are summed in float32, scattered along `fsdp` and
    then all-reduced along `data` (Rajbhandari et al. 2020, "ZeRO", section 7).
    """
    data, fsdp, size = mesh.shape["data"], mesh.shape["fsdp"], paths.size(params)
    gathered = 2 * itemsize * size * (fsdp - 1) / fsdp
    scattered = 4 * size * (fsdp - 1) / fsdp
    reduced = 2 * 4 * size / fsdp * (data - 1) / data
    return gathered + scattered + reduced
