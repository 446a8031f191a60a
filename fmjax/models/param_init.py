"""Parameters of a model: their initialisation, and their shapes and shardings without memory."""

import functools
from typing import Any

import jax

from fmjax.models import AnyModel
from fmjax.params import paths, sharding


def init_params(model: AnyModel, key: jax.Array) -> Any:
    """Fresh parameters in the model's stacks; the numbers do not depend on the stacking."""
    canonical = model.clone(stacks=paths.kind_runs(model.kinds))
    params = canonical.init(key, *model.example())["params"]
    return params if model.stacks == canonical.stacks else paths.restack(params, model.stacks)


def abstract_params(model: AnyModel, mesh: jax.sharding.Mesh | None = None) -> Any:
    """Shapes (and shardings, given a mesh) of the stored parameters; costs no memory."""
    shapes = _shapes(model)
    if mesh is None:
        return shapes
    return _placed(shapes, sharding.shardings(shapes, mesh))


@functools.cache  # several parts of a run ask, and each trace takes a tenth of a second and more
def _shapes(model: AnyModel) -> Any:
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
