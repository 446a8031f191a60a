"""Scaled dot-product attention: one function, with implementations chosen by device.

Tokens see each other when they belong to the same segment: `segment_ids` are 1-based within a row
and 0 is padding, so packing and padding are one mechanism. A query that may see nothing (padding)
gets zeros, and a zero gradient.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from fmjax.errors import ConfigError, did_you_mean
from fmjax.params import precision, randomness, sharding

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "tpu")
# Of head, query and key in the number of a pair, which dropout is drawn by: a batch may be padded
# to any width. Multiples of the golden ratio, modulo 2^32, are far apart, so that rows do not meet.
STRIDES = (0x85EBCA6B, 0x9E3779B1, 1)


def mask(
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    window: int | None = None,
    causal: bool = False,
    prefix: Bool[Array, "B S"] | None = None,
    keys: tuple[Int[Array, "B S"], Int[Array, "B S"]] | None = None,
) -> Bool[Array, "B 1 T S"]:
    """Attention mask: same segment, not padding, at most `window` positions apart, and if `causal`
    none that is later, except those of the `prefix` (Raffel et al. 2020, §3.2.1). `keys` are
    segments and positions of the keys if they are not those of the queries."""
    others, theirs = keys or (segment_ids, positions)
    same = segment_ids[:, :, None] == others[:, None, :]
    same &= others[:, None, :] > 0
    before = positions[:, :, None] - theirs[:, None, :]
    if window is not None:
        same &= jnp.abs(before) <= window
    if causal:
        same &= (before >= 0) if prefix is None else (before >= 0) | prefix[:, None, :]
    return same[:, None]


def attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B 1 T S"],
    *,
    segment_ids: Int[Array, "B T"],
    bias: Float[Array, "N T S"] | Float[Array, "B N T S"] | None = None,
    windowed: bool = False,
    causal: bool = False,
    prefix: bool = False,
    cross: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout: float = 0.0,
    seeds: randomness.Seeds | None = None,
    implementation: str = "auto",
) -> Float[Array, "B N T H"]:
    """softmax(q kᵀ / √H) v over the positions that `mask` allows (Vaswani et al. 2017, §3.2.1).

    Of fewer heads of keys and values, K, each serves N / K neighbouring queries (Ainslie et al.
    2023). `scale` is in the place of 1 / √H. With `softcap` c products are c tanh(product / c)
    (Gemma 2, 2024, §2). `bias` is added to them after that, before the mask, and may be learnt:
    it gets a gradient, in float32.

    `implementation`: "xla" runs anywhere; "cudnn" is NVIDIA's fused kernel (float16/bfloat16);
    "tpu" is the Pallas flash kernel, which reads `segment_ids` and `causal` instead of the mask and
    so refuses `windowed`, `prefix` and `cross` (keys of another sequence); "auto" takes the fused
    kernel of the device where it applies. Probabilities can be dropped out, and a bias added, only
    by "xla".

    Raises ConfigError when a kernel is asked for by name and cannot serve the request.
    """
    if seeds is None:
        dropout = 0.0
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"config.model.attention={implementation!r} is not known."
            + did_you_mean(implementation, IMPLEMENTATIONS)
        )
    half = q.dtype in (jnp.float16, jnp.bfloat16)
    obstacles = {
        "cudnn": _first(
            (not half, f"it takes bfloat16 or float16, not {q.dtype} (config.precision)"),
            (dropout > 0, "it has no dropout (config.model.attention_dropout)"),
            (softcap > 0, "it has no soft cap (config.model.attention_softcap)"),
            (bias is not None, "it adds no bias to the products"),
            (q.shape[-1] % 8 or q.shape[-1] > 128, f"head size {q.shape[-1]} is not 8, 16, … 128"),
            (q.shape[2] % 2, f"sequence length {q.shape[2]} is odd"),
            (k.shape[2] % 2, f"the number of keys, {k.shape[2]}, is odd"),
        ),
        "tpu": _first(
            (windowed, "it has no local window"),
            (prefix, "it shows nothing that is behind, as config.objectives.prefix_lm needs"),
            (cross, "it takes no target beside a source"),
            (softcap > 0, "it has no soft cap (config.model.attention_softcap)"),
            (bias is not None, "it adds no bias to the products"),
            (k.shape[2] != q.shape[2], "it takes no keys beside those of the tokens"),
            (dropout > 0, "it has no dropout (config.model.attention_dropout)"),
            (q.shape[2] % 128, f"sequence length {q.shape[2]} is not a multiple of 128"),
        ),
    }
    if implementation == "auto":
        preferred = {"gpu": "cudnn", "tpu": "tpu"}.get(jax.default_backend(), "xla")
        implementation = "xla" if obstacles.get(preferred) else preferred
    elif obstacles.get(implementation):
        raise ConfigError(
            f"config.model.attention={implementation!r} cannot be used here: "
            f"{obstacles[implementation]}. 'auto' and 'xla' always work."
        )
    if implementation == "cudnn":
        out = _cudnn(q, k, v, mask, scale)
    elif implementation == "tpu":
        out = _tpu(q, k, v, segment_ids, causal, scale)
    else:
        keep = None
        if dropout > 0:
            pairs = q.shape[1], q.shape[2], k.shape[2]
            keep = ~randomness.bernoulli(seeds, dropout, pairs, STRIDES)
        return _xla(q, k, v, bias, mask, keep, _How(dropout, scale, softcap))
    return jnp.where((segment_ids > 0)[:, None, :, None], out, jnp.zeros((), out.dtype))


def _first(*cases: tuple[Any, str]) -> str:
    return next((why for condition, why in cases if condition), "")


# --- XLA: all dots explicit, for compute-dtype operands and float32 accumulation in both passes ---


class _How(NamedTuple):
    rate: float  # of dropout
    scale: float
    softcap: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _xla(q, k, v, bias, mask, keep, how):
    return _xla_forward(q, k, v, bias, mask, keep, how)[0]


def _grouped(x, heads):
    """[B, N, T, …] as [B, K, N / K · T, …]: the queries of one head of keys below each other."""
    return x.reshape(x.shape[0], heads, -1, x.shape[-1])


def _scores(q, k, how):
    """[B, N, T, S], before the soft cap."""
    scores = precision.matmul_transposed(_grouped(q, k.shape[1]), k)
    return scores.reshape(*q.shape[:3], k.shape[2]) * jnp.float32(how.scale)


def _capped(scores, bias, mask, how):
    """[B, N, T, S], what the softmax is taken of."""
    if how.softcap:
        scores = how.softcap * jnp.tanh(scores / how.softcap)
    if bias is not None:
        scores += bias.astype(jnp.float32).reshape(-1, *scores.shape[1:])  # (1 or B, N, T, S)
    return jnp.where(mask, scores, jnp.float32(-1e30))


def _divided(weights, mask, total):
    # Rows that see nothing have a uniform softmax; the mask makes them zero instead.
    return jnp.where(mask, weights / total, jnp.float32(0))


def _drop(p, keep, rate):
    return p if keep is None else jnp.where(keep, p * jnp.float32(1 / (1 - rate)), jnp.float32(0))


def _xla_forward(q, k, v, bias, mask, keep, how):
    """Keeps two numbers a row of the softmax, which the backward pass makes again: what grows with
    the square of the length is kept by no layer (Dao et al. 2022, §3.1)."""
    scores = _capped(_scores(q, k, how), bias, mask, how)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    p = _divided(weights, mask, total)
    seen = _grouped(_drop(p, keep, how.rate).astype(q.dtype), k.shape[1])
    out = precision.matmul(seen, v).reshape(q.shape)
    return out.astype(q.dtype), (q, k, v, bias, mask, keep, top, total)


def _xla_backward(how, residuals, g):
    q, k, v, bias, mask, keep, top, total = residuals
    # Else the compiler finds the same softmax in the forward pass, and keeps it.
    q, k, g = jax.lax.optimization_barrier((q, k, g))
    dtype, heads = q.dtype, k.shape[1]
    with jax.named_scope(precision.AGAIN):
        scores = _scores(q, k, how)
    p = _divided(jnp.exp(_capped(scores, bias, mask, how) - top), mask, total)
    g = _grouped(g.astype(dtype), heads)
    seen = _grouped(_drop(p, keep, how.rate).astype(dtype), heads)
    dv = precision.matmul(precision.transposed(seen), g)
    dp = _drop(precision.matmul_transposed(g, v).reshape(p.shape), keep, how.rate)
    ds = p * (dp - jnp.sum(dp * p, axis=-1, keepdims=True))
    dbias = None
    if bias is not None:
        dbias = (ds if bias.ndim == 4 else jnp.sum(ds, axis=0)).astype(bias.dtype)
    ds = ds * jnp.float32(how.scale)
    if how.softcap:
        ds = ds * (1 - jnp.square(jnp.tanh(scores / how.softcap)))
    ds = _grouped(ds.astype(dtype), heads)
    dq = precision.matmul(ds, k).reshape(q.shape)
    dk = precision.matmul(precision.transposed(ds), _grouped(q, heads))
    return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype), dbias, None, None


_xla.defvjp(_xla_forward, _xla_backward)


# --- Fused kernels ---


def _cudnn(q, k, v, mask, scale):
    swap = lambda x: jnp.swapaxes(x, 1, 2)  # (B, N, T, H) <-> (B, T, N, H)
    how = dict(mask=mask, scale=scale, implementation="cudnn")
    return swap(jax.nn.dot_product_attention(swap(q), swap(k), swap(v), **how))


def _tpu(q, k, v, segment_ids, causal, scale):
    k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    def kernel(q, k, v, segment_ids):
        ids = flash.SegmentIds(segment_ids, segment_ids)
        return flash.flash_attention(q, k, v, segment_ids=ids, causal=causal, sm_scale=scale)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, segment_ids)
    # The partitioner cannot cut a kernel: each device runs it on its own rows and heads.
    cut = sharding.fitted(q.shape, P(*sharding.BATCH, "tensor"), mesh)
    rows = P(cut[0])
    kernel = jax.shard_map(kernel, in_specs=(cut, cut, cut, rows), out_specs=cut, check_vma=False)
    return kernel(q, k, v, segment_ids)
