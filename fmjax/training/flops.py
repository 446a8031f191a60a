"""Floating-point operations of a program, counted from its matrix products.

The compiler's own count takes the body of a `scan` once; this one multiplies by its length, and
needs no compilation. Element-wise work is not counted, as in every published model-FLOPs
utilisation, nor are the products that attention's backward pass makes again (`precision.AGAIN`).
"""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from fmjax import build
from fmjax.params import precision
from fmjax.training.step import make_train_step


def count(function: Any, *args: Any) -> int:
    """FLOPs (two per multiply-add) of all dots in `function(*args)`; args may be abstract."""
    return _used(jax.make_jaxpr(function)(*args).jaxpr)


def of_step(run: Any, batch: Any, traced: jax.stages.Traced | None = None, times: int = 1) -> int:
    """FLOPs that the mathematics of one update needs: nothing recomputed, nothing twice.

    `traced` is the step as it runs, `times` over. Where that is the mathematics it is counted as it
    stands, which spares the seconds of another trace.
    """
    if traced and run.model.cfg.remat == "none" and run.config.accumulate == 1:
        return _used(traced.jaxpr.jaxpr) // times
    model = run.model.clone(cfg=dataclasses.replace(run.model.cfg, remat="none"))
    step = make_train_step(build.apply(model), run.objectives, run.optimizer.tx, run.split)
    return count(step, run.abstract, batch)


def _used(jaxpr: Any) -> int:
    """Without what no output needs, which the compiler leaves out too: a product's own VJP writes
    down the gradient of a weight whether it is frozen or not."""
    return _jaxpr(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _jaxpr(jaxpr: Any) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
    if precision.AGAIN in str(equation.source_info.name_stack):
        return 0
    if equation.primitive.name == "dot_general":
        (contract, _), _ = equation.params["dimension_numbers"]
        left, out = equation.invars[0].aval, equation.outvars[0].aval
        if left.ndim == 1:  # a sum over rows, written as a product with ones
            return 0
        return 2 * math.prod(out.shape) * math.prod(left.shape[i] for i in contract)
    if equation.primitive.name == "ragged_dot_general":  # each row meets one matrix
        left, out = equation.invars[0].aval, equation.outvars[0].aval
        return 2 * math.prod(left.shape) * out.shape[-1]
    inner = [_jaxpr(sub) for value in equation.params.values() for sub in _jaxprs(value)]
    if equation.primitive.name == "shard_map":
        # Shapes inside are one device's, and each device does as much.
        shape = equation.params["mesh"].shape
        return sum(inner) * math.prod(shape[axis] for axis in equation.params["newly_manual_axes"])
    if equation.primitive.name in ("cond", "platform_index"):
        return max(inner, default=0)
    return sum(inner) * (equation.params["length"] if equation.primitive.name == "scan" else 1)


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    return []
