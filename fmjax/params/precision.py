"""One rule for every matrix product: compute-dtype operands, float32 accumulation, both passes.

Parameters and optimizer stay in float32. On a CPU with AMX the same bfloat16 product runs five
times faster when its result is asked for in float32, and JAX's derived gradients lose that (they
multiply a float32 cotangent with a bfloat16 operand, which upcasts), so the products below carry
their own VJP whose dots are all written out.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8, Num

from fmjax.params import sharding

FEW = 64  # rows, for which a product is made as `_by_output` has it
AGAIN = "made_again"  # scope of what a backward pass makes again of the forward one
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Coded(NamedTuple):
    """Vectors in eight bits, each with its scale."""

    codes: Int8[Array, "*S D"]
    scales: Float[Array, "*S 1"]

    def whole(self, dtype: DTypeLike) -> Float[Array, "*S D"]:
        """The vectors, nearly."""
        return (self.codes.astype(jnp.float32) * self.scales).astype(dtype)


def coded(x: Float[Array, "*S D"]) -> Coded:
    """Vectors as whole numbers to ±127, which stands for their largest magnitude."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    return Coded(jnp.round(x / jnp.where(scales > 0, scales, 1)).astype(jnp.int8), scales)


class Rows(NamedTuple):
    """A matrix as inference keeps it, by output, which products with few rows read soonest: in the
    dtype of the product, or in eight bits with a scale for each output."""

    matrix: Float[Array, "F D"] | Int8[Array, "F D"]
    scales: Float[Array, "F"] | None = None

    def rows(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Some of them, in float32; zeros where there is none."""
        take = lambda x: x.at[ids].get(mode="fill", fill_value=0)
        if self.scales is not None:
            return take(self.matrix).astype(jnp.float32) * take(self.scales)[..., None]
        if self.matrix.dtype == jnp.float32:
            return take(self.matrix)
        # As whole numbers: of bfloat16 XLA:CPU makes all of them float32 first.
        bits = take(jax.lax.bitcast_convert_type(self.matrix, jnp.uint16))
        return jax.lax.bitcast_convert_type(bits, self.matrix.dtype).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def linear(
    x: Float[Array, "... D"],
    kernel: Any,
    dtype: DTypeLike,
    out_in: bool = False,
    spec: P = sharding.WHOLE,
    unpack: Callable[[Any], jax.Array] | None = None,
) -> Float[Array, "... F"]:
    """`x @ kernel` with operands in `dtype`, accumulated and returned in float32.

    The `kernel` is (in, out), or (out, in) with `out_in`: the layout decides which operand of the
    weight gradient has to be transposed, and a tied embedding (vocabulary, width) must not become a
    transpose of a transpose. `spec` is its layout on the mesh (`fmjax.params.sharding`): cast
    first and then gathered, in both passes, so that no device keeps more than one layer whole.

    With `unpack`, `kernel` is what a quantized one is kept as, of which `unpack` makes the whole,
    in both passes; it gets no gradient, and of x nothing is kept. With `Rows` the product has no
    gradient either, and `out_in` says nothing.
    """
    return _linear_forward(x, kernel, dtype, out_in, spec, unpack)[0]


def _linear_forward(x, kernel, dtype, out_in, spec, unpack):
    if isinstance(kernel, Rows):
        return _of_rows(x, kernel, dtype), None
    contract = ((x.ndim - 1,), (int(out_in),))
    y = dot(x.astype(dtype), _whole(kernel, dtype, spec, unpack), contract)
    return y, (x if unpack is None else jnp.zeros(0, x.dtype), kernel)


def _linear_backward(dtype, out_in, spec, unpack, residuals, g):
    x, kernel = residuals
    g = g.astype(dtype)
    if unpack is not None:
        # Else the compiler finds the same matrix in the forward pass, and keeps it.
        kernel, g = jax.lax.optimization_barrier((kernel, g))
    dx = dot(g, _whole(kernel, dtype, spec, unpack), ((g.ndim - 1,), (1 - out_in,)))
    if unpack is not None:
        return dx.astype(x.dtype), None
    rows = x.astype(dtype).reshape(-1, x.shape[-1])  # (N, in)
    cotangents = g.reshape(-1, g.shape[-1])  # (N, out)
    left, right = (cotangents, rows) if out_in else (rows, cotangents)
    product = lambda left, right: dot(transposed(left), right, ((1,), (0,)))
    dkernel = sharding.sum_rows(product, spec, left, right)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


def _whole(kernel, dtype, spec, unpack):
    if unpack is not None:
        return unpack(kernel).astype(dtype)
    return sharding.gather(kernel.astype(dtype), spec)


linear.defvjp(_linear_forward, _linear_backward)


def _of_rows(x, kernel, dtype):
    # Of an array of three axes XLA would transpose the matrix, in front of each loop of steps.
    rows = x.reshape(-1, x.shape[-1])
    if kernel.scales is None:
        y = _by_output(rows.astype(dtype), kernel.matrix.astype(dtype))
    else:  # each row of x in eight bits too, with a scale of its own (Dettmers et al. 2022, §2.2)
        whole = coded(rows)
        y = _by_output(whole.codes, kernel.matrix).astype(jnp.float32)
        y = y * whole.scales * kernel.scales.reshape(1, -1)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _by_output(x: Num[Array, "N D"], matrix: Num[Array, "F D"]) -> Num[Array, "N F"]:
    """`x @ matrix.T`. Of few rows XLA:CPU's kernels of float32 and whole numbers are up to a third
    faster with the matrix as the first operand; without the barrier XLA swaps the two back."""

    def last(x, matrix):
        return dot(x, matrix, ((1,), (1,)))

    def first(x, matrix):
        return jax.lax.optimization_barrier(dot(matrix, x, ((1,), (1,)))).T

    if x.dtype == jnp.bfloat16 or len(x) > FEW:
        return last(x, matrix)
    return jax.lax.platform_dependent(x, matrix, cpu=first, default=last)


def affine(
    x: Float[Array, "P D"], kernel: Float[Array, "D F"], bias: Float[Array, "F"]
) -> Float[Array, "P F"]:
    """`x @ kernel + bias` in float32 for an x that is made of parameters, not of examples: its rows
    are not cut over devices, as `linear` takes them to be."""
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias.reshape(1, -1)


@jax.custom_vjp
def add_bias(x: Float[Array, "... F"], bias: Float[Array, "F"]) -> Float[Array, "... F"]:
    """`x + bias` for every row."""
    return x + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def _add_bias_forward(x, bias):
    return add_bias(x, bias), None


def _add_bias_backward(_, g):
    return g, column_sums(g)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def column_sums(x: Float[Array, "... F"]) -> Float[Array, "F"]:
    """The sum over all axes but the last.

    XLA:CPU walks the rows of such a reduction on one core: for a vocabulary's bias that took as
    long as a product of the same array, so there it is a product with ones.
    """

    def product(x):
        rows = x.reshape(-1, x.shape[-1])
        return dot(jnp.ones(rows.shape[:1], x.dtype), rows, ((0,), (0,)))

    def plain(x):
        return jnp.sum(x, axis=tuple(range(x.ndim - 1)))

    return jax.lax.platform_dependent(x, cpu=product, default=plain)


def transposed(x: Float[Array, "*B N D"]) -> Float[Array, "*B D N"]:
    """The last two axes swapped, and on CPU kept from being folded into the dot that reads it.

    XLA:CPU's fast bfloat16 kernel does not take a transposed operand: the folded dot runs at a
    fifth of the speed. A transpose assembled from two halves is not recognised as one.
    """

    def halves(x):
        half = x.shape[-2] // 2
        first, second = x[..., :half, :], x[..., half:, :]
        return jnp.concatenate([jnp.swapaxes(first, -1, -2), jnp.swapaxes(second, -1, -2)], -1)

    def plain(x):
        return jnp.swapaxes(x, -1, -2)

    if x.dtype == jnp.float32 or x.shape[-2] < 2:
        return plain(x)
    return jax.lax.platform_dependent(x, cpu=halves, default=plain)


def dot(
    a: jax.Array, b: jax.Array, contract: tuple[tuple, tuple], batch: tuple = ((), ())
) -> jax.Array:
    """`jax.lax.dot_general` in float32, of whole numbers in int32; not differentiable by itself, as
    those that follow."""
    # HIGHEST: float32 means float32 on GPU and TPU too, not TF32 or one bfloat16 pass.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    wide = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(
        a, b, (contract, batch), precision=precision, preferred_element_type=wide
    )


def matmul(a: Float[Array, "*B M K"], b: Float[Array, "*B K N"]) -> Float[Array, "*B M N"]:
    """Batched product of equal-dtype operands in float32; not differentiable by itself on purpose:
    its callers write their own VJP (`attention` does)."""
    return _batched(a, b, a.ndim - 2)


def matmul_transposed(
    a: Float[Array, "*B M K"], b: Float[Array, "*B N K"]
) -> Float[Array, "*B M N"]:
    """`a @ b.T` over the last axis of both, in float32."""
    return _batched(a, b, a.ndim - 1)


def _batched(a, b, axis):
    """The product over a's last axis and b's `axis`, all axes before the last two being batch.

    XLA:CPU has its kernels for operands that are in memory in the order of their axes, and raises
    any other to float32: attention's heads, which are a transpose, would be. A reshape to one batch
    axis is in order. Elsewhere the axes stay apart, for the partitioner to cut each.
    """

    def apart(a, b):
        batch = tuple(range(a.ndim - 2))
        return dot(a, b, ((a.ndim - 1,), (axis,)), (batch, batch))

    def merged(a, b):
        rows, columns = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
        out = dot(rows, columns, ((2,), (axis - a.ndim + 3,)), ((0,), (0,)))
        return out.reshape(*a.shape[:-2], *out.shape[1:])

    if a.dtype == jnp.float32:
        return apart(a, b)
    return jax.lax.platform_dependent(a, b, cpu=merged, default=apart)
