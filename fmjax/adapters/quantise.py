"""A frozen base in few bits (QLoRA: Dettmers et al. 2023), for whatever trains beside it.

    model = quantise.wrap(model, name="nf4", targets=r"block_.*/(attn|mlp)/.*")

A matrix that matches becomes arrays under its own name, `…/kernel/codes` and so on. The product
makes the matrix of them, forwards, and again backwards instead of keeping it; they get no gradient.
(On a CPU the compiler finds out that both are one and keeps it where layers are not scanned.)

| name | codes | scales | bits a weight |
|---|---|---|---|
| `nf4` | 16 quantiles of a normal distribution (appendix E), two in a byte | the largest magnitude of 64 inputs of one output, itself int8 in groups of 256 with a float32 scale, less their mean (section 3) | 4 + 8/64 + 32/(64 · 256) = 4.127 |
| `int8` | whole numbers to ±127 | float32, one an output | 8 |
| `fp8` | float8_e4m3fn to ±448 | float32, one an output | 8 |

The codes of NF4 are packed as bitsandbytes packs them, the first of two inputs in the high half of
the byte; its blocks are the same, as torch has (out, in) weights and counts along a row.

Letters: I in, O out.
"""  # noqa: E501  a row of a table is one line

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmjax.adapters import merge
from fmjax.adapters.wrapper import Adapted, Adapter, Call, Leaves, Module, around, chosen
from fmjax.errors import ConfigError
from fmjax.models import layers
from fmjax.params import precision, sharding

BLOCK, GROUP = 64, 256  # weights that share a scale; scales that share one
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
Packed = dict[str, jax.Array]


class Scheme(NamedTuple):
    """Storage format of a quantized matrix."""

    pack: Callable[[Float[Array, "I O"]], Packed]
    unpack: Callable[[Packed], Float[Array, "I O"]]
    rows: int  # of a matrix must be a multiple of this


@dataclasses.dataclass(frozen=True)
class Quantised(Adapter):
    """Settings of `config.quantise`."""

    name: str
    targets: str
    keeps = True

    def sites(self, modules: Mapping[str, Module]) -> dict[str, tuple[int, int]]:
        """{path: shape of the matrix}."""
        fits = lambda module: isinstance(module.module, layers.Linear | nn.Dense)
        rows, key = ((self.targets, 1),), "config.quantise.targets"
        paths = chosen(modules, rows, fits, "Dense, Linear", key)
        shapes = {path: modules[path].leaves["kernel"] for path in paths}
        for path, shape in shapes.items():
            if shape[0] % SCHEMES[self.name].rows:
                raise ConfigError(
                    f"config.quantise.name={self.name!r} cuts the {shape[0]} inputs of {path} into "
                    f"blocks of {BLOCK}, which does not come out even: leave it out of "
                    "config.quantise.targets, or use int8 or fp8."
                )
        return shapes

    def start(self, site: Any, key: jax.Array, own: Leaves) -> Leaves:
        return own | {"kernel": SCHEMES[self.name].pack(own["kernel"])}

    def call(
        self, site: Any, here: Call, x: jax.Array, out_dtype: DTypeLike | None = None
    ) -> jax.Array:
        """As `layers.Linear`, which would look for a matrix."""
        dtype = x.dtype if here.module.dtype is None else here.module.dtype
        spec = sharding.spec_of("/".join((*here.module.path, "kernel")))
        unpack = functools.partial(_whole, spec)
        y = precision.linear(x, here.leaf("kernel"), dtype, unpack=unpack)
        if here.module.use_bias:
            y = precision.add_bias(y, here.leaf("bias"))
        return y.astype(dtype if out_dtype is None else out_dtype)

    def merge(self, site: Any, own: Leaves) -> Leaves:
        return own | {"kernel": dense(own["kernel"])}


def wrap(model: Any, *, name: str, targets: str) -> Adapted:
    """`model`, a Linen module with `example()`, with the matrices of the modules whose whole path
    matches `targets` kept as `name` says.

    Raises ConfigError for modules that hold no matrix, or one that the blocks do not divide.
    """
    return around(model, Quantised(name, targets))


@functools.partial(jax.jit, static_argnums=0)
def packed(name: str, weight: Float[Array, "I O"]) -> tuple[Packed, Float[Array, ""]]:
    """(the arrays of `weight` in the scheme `name`, the share of its norm that is lost)."""
    kept, norm = SCHEMES[name].pack(weight), jnp.linalg.norm(weight)
    return kept, jnp.linalg.norm(dense(kept) - weight) / jnp.where(norm > 0, norm, 1)


def restored(model: Any, params: Any) -> tuple[Any, Any]:
    """(the model without `Quantised`, its parameters with whole matrices in float32)."""
    if not isinstance(model, Adapted):
        return model, params
    if not isinstance(model.adapter, Quantised):
        inner, params = restored(model.model, params)
        return dataclasses.replace(model, model=inner), params
    return restored(model.model, merge.merge(model, params))


def dense(weight: jax.Array | Packed) -> jax.Array:
    """The matrix of its arrays, in float32; one that is not quantized as it is."""
    if not isinstance(weight, Mapping):
        return weight
    kinds = {"uint8": "nf4", "int8": "int8", "float8_e4m3fn": "fp8"}
    return SCHEMES[kinds[str(weight["codes"].dtype)]].unpack(weight)


def matrix(named: Mapping[str, Any], name: str) -> Any:
    """The parameter `name` of {parameter name: array}, whole if it is quantized there."""
    if name in named:
        return named[name]
    start = f"{name}/"
    own = {n.removeprefix(start): x for n, x in named.items() if n.startswith(start)}
    return dense(jax.tree.map(jnp.asarray, own))


def _whole(spec: P, weight: Packed) -> jax.Array:
    """The matrix, brought together along `fsdp` while it is small."""
    gathered = {name: x if x.ndim < 2 else sharding.gather(x, spec) for name, x in weight.items()}
    return dense(gathered)


def pack_nf4(weight: Float[Array, "I O"]) -> Packed:
    """codes uint8 [I/2, O], absmax int8 [I/64, O], scales float32 [I O / (64 · 256)], mean []."""
    inputs, outputs = weight.shape
    blocks = weight.astype(jnp.float32).reshape(-1, BLOCK, outputs)
    largest = jnp.max(jnp.abs(blocks), axis=1)  # (I/64, O)
    unit = blocks / jnp.where(largest > 0, largest, 1)[:, None]
    # The nearest of 16: how many of the 15 midpoints are below.
    middles = (NF4[1:] + NF4[:-1]) / 2
    codes = sum((unit > middle).astype(jnp.uint8) for middle in middles)
    pairs = codes.reshape(-1, 2, outputs)
    mean = jnp.mean(largest)
    groups = _grouped(largest - mean)
    scales = jnp.max(jnp.abs(groups), axis=1) / 127
    eight = jnp.round(groups / jnp.where(scales > 0, scales, 1)[:, None]).astype(jnp.int8)
    return {
        "codes": (pairs[:, 0] << 4) | pairs[:, 1],
        "absmax": eight.reshape(-1)[: largest.size].reshape(largest.shape),
        "scales": scales,
        "mean": mean,
    }


def unpack_nf4(weight: Packed) -> Float[Array, "I O"]:
    codes, table = weight["codes"], jnp.asarray(NF4)
    outputs = codes.shape[1]
    halves = [table[codes >> 4], table[codes & 15]]
    values = jnp.stack(halves, axis=1).reshape(-1, BLOCK, outputs)
    scales = weight["scales"].reshape(-1, 1)
    groups = _grouped(weight["absmax"].astype(jnp.float32)) * scales
    largest = groups.reshape(-1)[: weight["absmax"].size].reshape(-1, 1, outputs) + weight["mean"]
    return (values * largest).reshape(-1, outputs)


def _grouped(x: Float[Array, "N O"]) -> Float[Array, "M 256"]:
    """In groups, the last filled up with zeros."""
    return jnp.pad(x.reshape(-1), (0, -x.size % GROUP)).reshape(-1, GROUP)


def _by_output(dtype: DTypeLike, most: float) -> Scheme:
    """Codes of `dtype` up to `most` with a scale for each output: codes [I, O], scales [O]."""

    def pack(weight):
        weight = weight.astype(jnp.float32)
        scales = jnp.max(jnp.abs(weight), axis=0) / most
        codes = weight / jnp.where(scales > 0, scales, 1).reshape(1, -1)
        whole = jnp.issubdtype(dtype, jnp.integer)
        return {"codes": (jnp.round(codes) if whole else codes).astype(dtype), "scales": scales}

    def unpack(weight):
        return weight["codes"].astype(jnp.float32) * weight["scales"].reshape(1, -1)

    return Scheme(pack, unpack, 1)


SCHEMES = {
    "nf4": Scheme(pack_nf4, unpack_nf4, BLOCK),
    "int8": _by_output(jnp.int8, 127),
    "fp8": _by_output(jnp.float8_e4m3fn, 448),
}
