"""The training state: arrays only, laid over the mesh from the moment they exist."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.models import AnyModel
from fmjax.models.param_init import _placed, abstract_params, init_params
from fmjax.params import sharding


@struct.dataclass
class TrainState:
    """The state that a step reads and replaces; model, optimizer and loss are closed over by the
    step."""

    step: Any  # int32 scalar, updates tried so far (= batches consumed)
    params: Any  # stored tree, float32
    opt_state: Any  # over the trainable part only
    rng: Any  # typed key, never changed: randomness is fold_in(rng, step)


def abstract(
    model: AnyModel, tx: optax.GradientTransformation, split: Any, mesh: jax.sharding.Mesh
) -> TrainState:
    """The whole state as ShapeDtypeStructs with shardings, for `create` and for restoring."""
    params = abstract_params(model, mesh)
    shapes = jax.eval_shape(tx.init, split(params)[0])
    here = NamedSharding(mesh, P())
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=here),
        params=params,
        opt_state=_placed(shapes, sharding.like_params(shapes, params, mesh)),
        rng=jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=here),
    )


def create(
    abstract: TrainState,
    model: AnyModel,
    tx: optax.GradientTransformation,
    split: Any,
    seed: int,
    params: Any = None,
) -> TrainState:
    """A state at step 0, each array made where it is; `params` replaces fresh parameters."""

    def fresh(key):
        # One stream a purpose: initialisation and training never share a key.
        return init_params(model, jax.random.fold_in(key, 0))

    place = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    key = jax.random.key(seed)
    if params is None:
        params = jax.jit(fresh, out_shardings=place(abstract.params))(key)
    init = jax.jit(lambda p: tx.init(split(p)[0]), out_shardings=place(abstract.opt_state))
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding),
        params=params,
        opt_state=init(params),
        rng=jax.device_put(jax.random.fold_in(key, 1), abstract.rng.sharding),
    )
