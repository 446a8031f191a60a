"""The low-rank path beside a weight: s (x A) B, and DoRA's factor for each output.

W is never added to A B here: that would cost a product of the size of W in both passes, and its
gradient would be as large as W. x and x A are all that the backward pass keeps of the path.

Letters: B batch, T time, I in, O out, R rank, M adapters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fmjax.models import layers
from fmjax.params import precision, randomness


class Leaves(NamedTuple):
    """An adapter at one module; with `ids`, arrays have a leading axis of adapters."""

    a: jax.Array  # (I, R); of an embedding (rows, R), of a convolution (*window, I, R)
    b: jax.Array  # (R, O)
    m: jax.Array | None  # (O,): DoRA's magnitudes less the norms of the columns of W
    scale: float
    dropout: float = 0.0
    seeds: randomness.Seeds | None = None
    ids: jax.Array | None = None  # (B,): which adapter each example uses; NaN where there is none

    def dropped(self, x: jax.Array) -> jax.Array:
        return layers.dropout(x, self.dropout, self.seeds)


def linear(x: Float[Array, "B *S I"], leaves: Leaves, dtype: DTypeLike) -> Float[Array, "B *S O"]:
    """s (x A) B in float32."""
    if leaves.ids is None:
        down = lambda x: precision.linear(leaves.dropped(x), leaves.a, dtype)
        if leaves.dropout and leaves.seeds is not None:
            # Dropout is drawn again in the backward pass, or what it left of x would be kept too.
            down = jax.checkpoint(down)
        return up(down(x), leaves, dtype)
    return up(_each(x, leaves.a, leaves.ids, dtype), leaves, dtype)


def up(h: Float[Array, "B *S R"], leaves: Leaves, dtype: DTypeLike) -> Float[Array, "B *S O"]:
    """The second half of the path. Scaled before the product, where the array is small."""
    h = (leaves.scale * h).astype(dtype)
    if leaves.ids is None:
        return precision.linear(h, leaves.b, dtype)
    return _each(h, leaves.b, leaves.ids, dtype)


def lookup(ids: Int[Array, "B *S"], leaves: Leaves) -> Float[Array, "B *S O"]:
    """s A[ids] B for a table, in float32. A stray id gives NaN, as in the table itself."""
    if leaves.ids is None:
        rows = leaves.a.at[ids].get(mode="fill", fill_value=jnp.nan)
    else:
        which = leaves.ids.reshape(-1, *[1] * (ids.ndim - 1))
        rows = leaves.a.at[which, ids].get(mode="fill", fill_value=jnp.nan)
    return up(rows, leaves, jnp.float32)


def excess(weight: Float[Array, "*I O"], leaves: Leaves) -> Float[Array, "*M O"]:
    """DoRA's factor of each output, less one: m / ||W + s A B|| - 1 (Liu et al. 2024, eq. 5).

    The norm of a column follows from ||W||², <W, A B> and ||A B||² without the sum W + s A B. It is
    a constant for the gradient (section 4.3). `m` counts from ||W||, so that it starts at zero
    whatever base is loaded, and the factor at exactly one.
    """
    if leaves.ids is not None:
        one = lambda a, b, m: excess(weight, leaves._replace(a=a, b=b, m=m, ids=None))
        return jax.vmap(one)(leaves.a, leaves.b, leaves.m)
    w, a, b = jax.lax.stop_gradient((weight, leaves.a, leaves.b))
    w, a = w.reshape(-1, w.shape[-1]), a.reshape(-1, a.shape[-1])
    square = jnp.sum(jnp.square(w), axis=0)
    cross = jnp.sum(b * precision.matmul(a.T, w), axis=0)
    product = jnp.sum(b * precision.matmul(precision.matmul(a.T, a), b), axis=0)
    total = square + 2 * leaves.scale * cross + leaves.scale**2 * product
    # Rounding may leave a column that A B cancels below zero.
    before, norm = (jnp.sqrt(jnp.maximum(x, jnp.finfo(x.dtype).tiny)) for x in (square, total))
    return (before + leaves.m - norm) / norm


def product(leaves: Leaves) -> Float[Array, "*I O"]:
    """s A B, as large as the weight: for merging, never for training."""
    rows = leaves.a.reshape(-1, leaves.a.shape[-1])
    whole = leaves.scale * precision.matmul(rows, leaves.b)
    return whole.reshape(*leaves.a.shape[:-1], leaves.b.shape[-1])


def merged(weight: Float[Array, "*I O"], leaves: Leaves) -> Float[Array, "*I O"]:
    """The weight that gives what `weight` and the path give together."""
    total = weight + product(leaves)
    if leaves.m is None:
        return total
    return total * (1 + excess(weight, leaves)).reshape(*[1] * (total.ndim - 1), -1)


def add(base: Any, path: Any, bias: Any, weight: Any, leaves: Leaves) -> Float[Array, "B *S O"]:
    """`base` + `path`, all in float32; with magnitudes, both times DoRA's factor but for the bias.

    `base` (B, *S, O) is the module's output with its `bias` (O,) or None, `path` that of the
    adapter, `weight` (*I, O) the module's own.
    """
    if leaves.m is None:
        return base + path
    more = excess(weight, leaves)  # (O,), or (M, O)
    more = more if leaves.ids is None else _taken(more, leaves.ids)  # (O,), or (B, O)
    ones = [1] * (base.ndim - 1)
    more = (
        more.reshape(*ones, -1)
        if leaves.ids is None
        else more.reshape(-1, *ones[1:], more.shape[-1])
    )
    product = base if bias is None else base - bias.reshape(*ones, -1)
    return base + more * product + (1 + more) * path


def _each(x, weights, ids, dtype):
    """x times the matrix of each example's own adapter."""
    if x.shape[0] != ids.shape[0]:
        raise ValueError(f"adapter_ids has {ids.shape[0]} entries for {x.shape[0]} examples.")
    own = _taken(weights, ids).astype(dtype)
    rows = x.astype(dtype).reshape(x.shape[0], -1, x.shape[-1])
    return precision.matmul(rows, own).reshape(*x.shape[:-1], own.shape[-1])


def _taken(arrays, ids):
    return arrays.at[ids].get(mode="fill", fill_value=jnp.nan)
