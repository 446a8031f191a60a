"""Layers shared by all model families: linear maps, norms, embeddings, MLPs, dropout.

Every module computes in `dtype` with float32 accumulation (`fmjax.params.precision`), keeps its
parameters in float32 and takes its randomness as one seed per example (`fmjax.params.randomness`);
`seeds=None` means deterministic.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from fmjax.params import precision, randomness, sharding


@jax.custom_vjp
def gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """x Φ(x), exactly (Hendrycks and Gimpel 2016). Keeps x alone for the backward pass, where jax's
    own keeps four arrays of that size, which cost a CPU more than computing Φ again."""
    return x * _normal_cdf(x)


def _gelu_backward(x, g):
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * np.pi) ** -0.5
    return (g * (_normal_cdf(x) + x * density),)


def _normal_cdf(x):
    return 0.5 + 0.5 * jax.lax.erf(x * 2**-0.5)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)

ACTIVATIONS: dict[str, Callable] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def matrix(
    module: nn.Module, name: str, init: Callable, shape: tuple[int, int]
) -> Float[Array, "I O"] | precision.Rows:
    """The module's parameter, which inference may keep otherwise (`decoding.Writer`)."""
    if module.has_variable("params", name):
        kept = module.get_variable("params", name)
        if isinstance(kept, precision.Rows):
            return kept
    return module.param(name, init, shape, jnp.float32)


class Linear(nn.Module):
    """`x @ kernel + bias` with a (in, out) kernel; the bias is added in float32."""

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(
        self, x: Float[Array, "... D"], out_dtype: DTypeLike | None = None
    ) -> Float[Array, "... F"]:
        kernel = matrix(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        spec = sharding.spec_of("/".join((*self.path, "kernel")))
        y = precision.linear(x, kernel, self.dtype, spec=spec)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = precision.add_bias(y, bias)
        return y.astype(self.dtype if out_dtype is None else out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "... D"], scale: Float[Array, "D"], bias: Float[Array, "D"] | None, eps: float
) -> Float[Array, "... D"]:
    """Layer normalisation in float32 (Ba et al. 2016). Keeps x and two numbers a row for the
    backward pass, where the derived one keeps three arrays."""
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x, scale, bias, eps):
    mean = jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)
    centred = x.astype(jnp.float32) - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = centred * inverse * _row(scale, x.ndim)
    return y if bias is None else y + _row(bias, x.ndim), (x, mean, inverse, scale, bias)


def _layer_norm_backward(eps, residuals, g):
    x, mean, inverse, scale, bias = residuals
    normal = (x.astype(jnp.float32) - mean) * inverse
    along = lambda y: jnp.mean(y, axis=-1, keepdims=True)
    scaled = g * _row(scale, x.ndim)
    dx = inverse * (scaled - along(scaled) - normal * along(scaled * normal))
    dbias = None if bias is None else precision.column_sums(g)
    return dx.astype(x.dtype), precision.column_sums(g * normal), dbias


def _row(vector, ndim):
    return vector.reshape((1,) * (ndim - 1) + (-1,))


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """Layer normalisation with float32 statistics, as a module with its parameters."""

    eps: float
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return layer_norm(x, scale, bias, self.eps).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float, offset: float
) -> Float[Array, "... D"]:
    """x / rms(x) · (scale + offset) in float32 (Zhang and Sennrich 2019). Keeps x and one number a
    row for the backward pass."""
    return _rms_norm_forward(x, scale, eps, offset)[0]


def _rms_norm_forward(x, scale, eps, offset):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide * inverse * _row(scale + offset, x.ndim), (x, inverse, scale)


def _rms_norm_backward(eps, offset, residuals, g):
    x, inverse, scale = residuals
    normal = x.astype(jnp.float32) * inverse
    scaled = g * _row(scale + offset, x.ndim)
    along = jnp.mean(scaled * normal, axis=-1, keepdims=True)
    dx = inverse * (scaled - normal * along)
    return dx.astype(x.dtype), precision.column_sums(g * normal)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class RmsNorm(nn.Module):
    """Division by the root mean square, as a module with its parameter; `offset` is added to it."""

    eps: float
    offset: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        initial = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", initial, (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale, self.eps, self.offset).astype(self.dtype)


CACHE = "cache"  # collection of what was seen before, for text that is written token by token


class Memory(nn.Module):
    """Keys, values and mask of attention. The identity; adapters add to it.

    Where the collection `CACHE` is mutable they are kept there, and from the second call on those
    given are written after the kept, all of which come back; what is `fixed` stays as the first
    call had it.
    """

    fixed: bool = False

    def __call__(
        self,
        k: Float[Array, "B K T H"],
        v: Float[Array, "B K T H"],
        may_see: Bool[Array, "B 1 R S"],
    ) -> tuple[Any, Any, Any]:
        if self.is_mutable_collection(CACHE):
            if not self.fixed:
                k, v = map(sharding.constrain_heads, remembered(self, (k, v), axis=2))
            elif not self.full():
                self.put_variable(CACHE, "rows", (k, v))
        return k, v, may_see

    def full(self) -> bool:
        """True if something is cached."""
        return self.has_variable(CACHE, "rows")

    def kept(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the calls before."""
        return self.get_variable(CACHE, "rows")


class Seen(nn.Module):
    """Per-token arrays (B, T) that attention masks by: as given, or with those of earlier tokens,
    as `Memory` keeps keys."""

    def __call__(self, *arrays: Int[Array, "B T"]) -> tuple[Int[Array, "B S"], ...]:
        if not self.is_mutable_collection(CACHE):
            return arrays
        return remembered(self, arrays, axis=1)


def remembered(module: nn.Module, new: tuple[jax.Array, ...], axis: int) -> tuple[Any, ...]:
    """`new` after what the module's cache has along the axis: `rows`, of which `used` are.

    The first call makes the cache as long as it is; whoever calls again has made it longer, and may
    have put it into eight bits (`precision.Coded`).
    """
    if not module.has_variable(CACHE, "rows"):
        module.put_variable(CACHE, "rows", new)
        module.put_variable(CACHE, "used", jnp.int32(new[0].shape[axis]))
        return new
    rows, used = (module.get_variable(CACHE, name) for name in ("rows", "used"))
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=used, axis=axis)

    def written(old, x):
        x = precision.coded(x) if isinstance(old, precision.Coded) else x.astype(old.dtype)
        return jax.tree.map(write, old, x)

    rows = tuple(written(old, x) for old, x in zip(rows, new, strict=True))
    module.put_variable(CACHE, "rows", rows)
    module.put_variable(CACHE, "used", used + new[0].shape[axis])
    return tuple(
        kept.whole(x.dtype) if isinstance(kept, precision.Coded) else kept
        for kept, x in zip(rows, new, strict=True)
    )


class Embedding(nn.Module):
    """A table of `count` vectors."""

    count: int
    features: int
    embedding_init: Callable = nn.initializers.normal(0.02)

    def setup(self):
        shape = self.count, self.features
        self.embedding = matrix(self, "embedding", self.embedding_init, shape)

    def __call__(self, ids: Int[Array, "*B"], bare: bool = False) -> Float[Array, "*B D"]:
        """The rows; where they are `bare`, without what adapters put before a text."""
        table = self.table()
        if not isinstance(table, precision.Rows):
            return _lookup(table, ids, self.spec)
        return table.rows(ids)

    def table(self) -> Float[Array, "V D"] | precision.Rows:
        """The matrix itself, for tied output projections."""
        if isinstance(self.embedding, precision.Rows):
            return self.embedding
        # Gathered whole before a lookup: rows of a table cut along its width would come out cut
        # along the width, and the partitioner could only replicate them to cut them by example.
        return sharding.gather(self.embedding, self.spec)

    @property
    def spec(self) -> P:
        """Layout of the table on the mesh."""
        return sharding.spec_of("/".join((*self.path, "embedding")))


class Mlp(nn.Module):
    """Two-layer perceptron; `gated` multiplies with a second projection (GeGLU, SwiGLU). `dropout`
    is of what is between the layers."""

    hidden: int
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    down_init: Callable = nn.initializers.normal(0.02)
    up_init: Callable = nn.initializers.normal(0.02)
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "... D"], seeds: randomness.Seeds | None = None
    ) -> Float[Array, "... D"]:
        make = functools.partial(
            Linear, use_bias=self.use_bias, dtype=self.dtype, kernel_init=self.up_init
        )
        up = make(self.hidden, name="up")(x, jnp.float32)
        gate = make(self.hidden, name="gate")(x, jnp.float32) if self.gated else None

        # The activation is computed again in the backward pass, which costs a CPU as much as
        # writing and reading it, and saves an array as large as `up` a layer.
        @functools.partial(nn.remat, policy=jax.checkpoint_policies.dots_saveable)
        def down(mlp, up, gate, seeds):
            h = ACTIVATIONS[mlp.activation](up)
            h = dropout(h if gate is None else h * gate, mlp.dropout, seeds)
            make = functools.partial(Linear, name="down", kernel_init=mlp.down_init)
            return make(x.shape[-1], mlp.use_bias, mlp.dtype)(h.astype(mlp.dtype))

        return down(self, up, gate, seeds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table, ids, spec):
    # Ids are checked on the host (fmjax.data); a stray one here must not read a wrong row.
    return table.at[ids].get(mode="fill", fill_value=jnp.nan)


def _lookup_forward(table, ids, spec):
    return _lookup(table, ids, spec), (table, ids)


def _lookup_backward(spec, residuals, g):
    table, ids = residuals
    add = lambda ids, g: jnp.zeros(table.shape, g.dtype).at[ids].add(g, mode="drop")
    return sharding.sum_rows(add, spec, ids, g), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def dropout(
    x: Float[Array, "B *S"], rate: float, seeds: randomness.Seeds | None
) -> Float[Array, "B *S"]:
    """Zeroes elements with probability `rate` and rescales the rest; the identity without seeds."""
    if seeds is None or rate == 0.0:
        return x
    dropped = randomness.bernoulli(seeds, rate, x.shape[1:])
    return jnp.where(dropped, jnp.zeros((), x.dtype), x * jnp.asarray(1 / (1 - rate), x.dtype))
