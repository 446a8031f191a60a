"""From tokens to their experts and back.

| `capacity` | |
|---|---|
| 0 | `dropless`: tokens sorted by expert, a product of ragged groups (Gale et al. 2023) |
| c | `limited`: an expert takes c times its fair share of a row, c k T / E tokens; later ones in the row pass it by (GShard, Lepikhin et al. 2021, §2.2, with rows as groups) |

A row's result depends neither on other rows nor on padding, nor a token's on what comes later
(but on how many are). Experts are along the mesh axis `expert`, which rows are cut along, too.
Letters: B batch, T time, D width, F mlp, E experts, k of a token, C places of an expert in a row.
"""  # noqa: E501  a row of a table is one line

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fmjax.errors import ConfigError
from fmjax.models import layers
from fmjax.params import precision, sharding


def by_device(way: Callable, rows: int, experts: int) -> Callable:
    """`way` on each device's rows and experts; all at once where no mesh cuts the rows."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = sharding.batch_ways(mesh)
    if ways == 1 or rows % ways:
        return way
    if experts % mesh.shape["expert"]:
        raise ConfigError(
            f"config.mesh.expert={mesh.shape['expert']} does not divide config.model.experts="
            f"{experts}: each device along the axis has as many of them."
        )
    cut, whole = sharding.BATCH, sharding.P("expert")
    specs = dict(in_specs=(cut,) * 4 + (whole,) * 3, out_specs=(cut, cut))
    return sharding.by_device(functools.partial(way, axis="expert"), **specs)


def dropless(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    chosen: Int[Array, "B T k"],
    real: Bool[Array, "B T"],
    up: Float[Array, "E D F"],
    gate: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    activation: str,
    dtype: Any,
    axis: str | None = None,
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T k"]]:
    """(Σ w MLP(x) in float32, which choices were served: all but those of padding).

    Along the mesh `axis` a device gets the tokens of all, runs those that chose its own experts,
    and the results are added up where the tokens came from.
    """
    served = jnp.broadcast_to(real[..., None], chosen.shape)
    if axis:
        gathered = functools.partial(jax.lax.all_gather, axis_name=axis, tiled=True)
        x, weights, chosen, real = map(gathered, (x, weights, chosen, real))
        chosen = chosen - jax.lax.axis_index(axis) * len(up)
    here = real[..., None] & (chosen >= 0) & (chosen < len(up))
    expert = jnp.where(here, chosen, len(up)).reshape(-1)  # (B T k); what is of no expert is last
    order = jnp.argsort(expert)
    back = jnp.argsort(order)
    sizes = jnp.bincount(expert, length=len(up) + 1)[:-1].astype(jnp.int32)
    tokens = jnp.repeat(x.reshape(-1, x.shape[-1]), chosen.shape[-1], axis=0)  # (B T k, D)
    product = lambda h, kernel: ragged(h, kernel, sizes, dtype)
    y = _mlp(permuted(tokens, order, back), up, gate, down, product, activation, dtype)
    y = permuted(y, back, order).reshape(*chosen.shape, -1)  # (B, T, k, D)
    out = jnp.sum(y * weights[..., None], axis=2)
    if axis:
        out = jax.lax.psum_scatter(out, axis, scatter_dimension=0, tiled=True)
    return out, served


def limited(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    chosen: Int[Array, "B T k"],
    real: Bool[Array, "B T"],
    up: Float[Array, "E D F"],
    gate: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    capacity: float,
    activation: str,
    dtype: Any,
    axis: str | None = None,
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T k"]]:
    """As `dropless`, but an expert has room for `capacity` times its fair share of a row alone.

    Along the mesh `axis` the places of each expert go to the device that has it, and back.
    """
    (time, k), experts = chosen.shape[1:], len(up) * (jax.lax.axis_size(axis) if axis else 1)
    shares = np.minimum(np.ceil(capacity * k * np.arange(time + 1) / experts), time).astype(int)
    room = int(shares[-1])  # of an expert, as an array has it; a padded row fills less of it

    def places(chosen, real):
        """(which token is in each place, the place of each choice, whether it has one)."""
        expert = jnp.where(real[:, None], chosen, experts).reshape(-1)  # (T k), in order of tokens
        queue = jax.nn.one_hot(expert, experts, dtype=jnp.int32)
        before = jnp.sum((jnp.cumsum(queue, axis=0) - queue) * queue, axis=-1)
        limit = jnp.asarray(shares)[jnp.sum(real)]
        served = (expert < experts) & (before < limit)
        place = jnp.where(served, expert * room + before, experts * room)
        choices = jnp.arange(time * k) // k
        token = jnp.full(experts * room, time).at[place].set(choices, mode="drop")
        return token, place, served.reshape(time, k)

    token, place, served = jax.vmap(places)(chosen, real)
    taken = functools.partial(jnp.take_along_axis, axis=1, mode="fill", fill_value=0)
    h = taken(x, token[..., None]).reshape(len(x), experts, room, -1)  # (B, E, C, D)
    if axis:
        h = jax.lax.all_to_all(h, axis, split_axis=1, concat_axis=0, tiled=True)
    rows = len(h)
    h = h.swapaxes(0, 1).reshape(len(up), rows * room, -1)
    y = _mlp(h, up, gate, down, lambda h, w: batched(h, w, dtype), activation, dtype)
    y = y.reshape(len(up), rows, room, -1).swapaxes(0, 1)
    if axis:
        y = jax.lax.all_to_all(y, axis, split_axis=0, concat_axis=1, tiled=True)
    y = taken(y.reshape(len(x), experts * room, -1), place[..., None])
    return jnp.sum(y.reshape(*chosen.shape, -1) * weights[..., None], axis=2), served


def _mlp(h, up, gate, down, product, activation, dtype):
    h = layers.ACTIVATIONS[activation](product(h, up)) * product(h, gate)
    return product(h.astype(dtype), down)


# --- Products that write their own gradients, as those of `fmjax.params.precision` do ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def ragged(
    x: Float[Array, "M I"], kernels: Float[Array, "E I O"], sizes: Int[Array, "E"], dtype: Any
) -> Float[Array, "M O"]:
    """The first `sizes[0]` rows times the first matrix, and so on, in float32; what rows are left
    give 0."""
    return _ragged_forward(x, kernels, sizes, dtype)[0]


def _ragged_forward(x, kernels, sizes, dtype):
    return _ragged(x.astype(dtype), kernels.astype(dtype), sizes), (x, kernels, sizes)


def _ragged(x, kernels, sizes):
    y = jax.lax.ragged_dot(x, kernels, sizes, **_accurate(x))
    # What a kernel writes after the last group is its own affair.
    inside = jnp.arange(len(x)) < jnp.sum(sizes)
    return jnp.where(inside[:, None], y, jnp.float32(0))


def _accurate(x):
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return dict(precision=exact, preferred_element_type=jnp.float32)


def _ragged_backward(dtype, residuals, g):
    x, kernels, sizes = residuals
    g = g.astype(dtype)
    dx = _ragged(g, kernels.astype(dtype).swapaxes(1, 2), sizes)
    over_rows = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    dkernels = jax.lax.ragged_dot_general(x.astype(dtype), g, sizes, over_rows, **_accurate(g))
    return dx.astype(x.dtype), dkernels.astype(kernels.dtype), None


ragged.defvjp(_ragged_forward, _ragged_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def batched(
    x: Float[Array, "E M I"], kernels: Float[Array, "E I O"], dtype: Any
) -> Float[Array, "E M O"]:
    """The rows of each expert times its matrix, in float32."""
    return _batched_forward(x, kernels, dtype)[0]


def _batched_forward(x, kernels, dtype):
    return precision.matmul(x.astype(dtype), kernels.astype(dtype)), (x, kernels)


def _batched_backward(dtype, residuals, g):
    x, kernels = residuals
    g = g.astype(dtype)
    dx = precision.matmul_transposed(g, kernels.astype(dtype))
    dkernels = precision.matmul(precision.transposed(x.astype(dtype)), g)
    return dx.astype(x.dtype), dkernels.astype(kernels.dtype)


batched.defvjp(_batched_forward, _batched_backward)


@jax.custom_vjp
def permuted(
    x: Float[Array, "M D"], order: Int[Array, "M"], back: Int[Array, "M"]
) -> Float[Array, "M D"]:
    """x[order], whose gradient is g[back], not a sum over places: `back` undoes `order`."""
    return x[order]


permuted.defvjp(lambda x, order, back: (x[order], back), lambda back, g: (g[back], None, None))
