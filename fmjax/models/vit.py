"""Vision Transformer (Dosovitskiy et al. 2021): an encoder of image patches.

    patches -> embed (+ class token, + learned positions) -> block_00 … block_L -> norm -> heads

Letters: B batch, H and W height and width in pixels, C channels, P patch size, T tokens, D width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.errors import ConfigError
from fmjax.models import layers, trunk
from fmjax.models.attention import attention
from fmjax.params import randomness, sharding
from fmjax.params.precision import DTYPES

INIT = nn.initializers.xavier_uniform()  # of the layers, as in the code of the paper
FACTS = ("image_shape", "pool")  # arguments that follow from data and objectives


@dataclasses.dataclass(frozen=True)
class Config:
    """Choices of the family; `VARIANTS` names the published combinations."""

    image_shape: tuple[int, int, int] = (224, 224, 3)  # height, width, channels
    patch: int = 16  # pixels on each side
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    class_token: bool = True
    pool: str = ""  # vector of the whole image; "": the class token, else the mean
    classes: tuple[tuple[str, int], ...] = ()  # linear heads: (name, outputs)
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation: str = "gelu"
    eps: float = 1e-6
    # How it is computed, which changes no number
    dtype: str = "float32"
    attention: str = "auto"
    scan: bool = True
    remat: str = "none"

    lm_head = False  # it predicts no tokens

    @property
    def tokens(self) -> int:
        """Number of tokens of an image."""
        height, width, _ = self.image_shape
        return (height // self.patch) * (width // self.patch) + self.class_token


VARIANTS: dict[str, dict[str, Any]] = {
    # Ours: the smallest that learns handwritten digits within a minute on a CPU.
    "digits": dict(depth=4, width=64, heads=4, mlp=128, patch=2),
    # Touvron et al. 2021, table 1; Dosovitskiy et al. 2021, table 1; Zhai et al. 2022, table 2.
    "tiny": dict(depth=12, width=192, heads=3, mlp=768),
    "small": dict(depth=12, width=384, heads=6, mlp=1536),
    "base": {},
    "large": dict(depth=24, width=1024, heads=16, mlp=4096),
    "huge": dict(depth=32, width=1280, heads=16, mlp=5120, patch=14),
}


def Model(variant: str = "base", **overrides: Any) -> "Encoder":
    """The encoder of a named variant with fields replaced; `classes` may be a mapping.

    Raises ConfigError for an unknown variant or field, and for images that are not made of whole
    patches.
    """
    cfg = trunk.configured(Config, VARIANTS, variant, overrides)
    trunk.check_config(cfg)
    height, width, _ = cfg.image_shape
    if height % cfg.patch or width % cfg.patch:
        raise ConfigError(
            f"config.model.patch={cfg.patch} does not divide images of {height} x {width} pixels: "
            "choose a patch that divides both, or another config.data.size."
        )
    if cfg.pool == "first" and not cfg.class_token:
        raise ConfigError(
            "config.objectives.….pool='first' is the class token, but config.model.class_token is "
            "False: set one of them to the other's."
        )
    return Encoder(cfg)


class Block(nn.Module):
    """One transformer layer: attention and MLP, a norm before each and a residual around them."""

    cfg: Config
    kind: str = "block"

    @nn.compact
    def __call__(self, x, layer, seeds):
        cfg, dtype = self.cfg, DTYPES[self.cfg.dtype]
        seeds = None if seeds is None else randomness.fold(seeds, layer["index"])
        site = lambda i: None if seeds is None else randomness.fold(seeds, i)
        norm = lambda name: layers.LayerNorm(cfg.eps, dtype=dtype, name=name)
        drop = lambda y, i: layers.dropout(y, cfg.dropout, site(i))

        x = x + drop(Attention(cfg, name="attn")(norm("attn_norm")(x), site(0)), 1)
        inits = dict(up_init=INIT, down_init=INIT)
        mlp = layers.Mlp(cfg.mlp, cfg.activation, dtype=dtype, name="mlp", **inits)
        x = x + drop(mlp(norm("mlp_norm")(x)), 2)
        return sharding.constrain_batch(x), None


class Attention(nn.Module):
    """Multi-head self-attention among all tokens of an image."""

    cfg: Config

    @nn.compact
    def __call__(self, x, seeds):
        cfg, (batch, tokens, width) = self.cfg, x.shape
        dtype = DTYPES[cfg.dtype]
        make = lambda name: layers.Linear(width, dtype=dtype, kernel_init=INIT, name=name)
        split = lambda y: y.reshape(batch, tokens, cfg.heads, -1).swapaxes(1, 2)  # (B, N, T, H)
        q, k, v = (split(make(name)(x)) for name in ("query", "key", "value"))
        everything = jnp.ones((batch, 1, tokens, tokens), bool)
        k, v, may_see = layers.Memory(name="memory")(k, v, everything)
        out = attention(
            q, k, v, may_see,
            segment_ids=jnp.ones((batch, tokens), jnp.int32),
            dropout=cfg.attention_dropout,
            seeds=seeds,
            # Initialisation runs one image, which no kernel takes.
            implementation="xla" if self.is_initializing() else cfg.attention,
        )  # fmt: skip
        return make("out")(out.swapaxes(1, 2).reshape(batch, tokens, width))


class Embed(nn.Module):
    """Patches as tokens: a linear map of their pixels, the class token, and positions."""

    cfg: Config

    def setup(self):
        cfg = self.cfg
        init = nn.initializers.lecun_normal()
        self.patch = layers.Linear(cfg.width, dtype=DTYPES[cfg.dtype], kernel_init=init)
        if cfg.class_token:
            self.class_token = layers.Embedding(1, cfg.width)
        self.position = layers.Embedding(cfg.tokens, cfg.width)

    def __call__(self, images, seeds):
        x = self.patch(patches(images, self.cfg.patch), jnp.float32)
        if self.cfg.class_token:
            token = jnp.broadcast_to(self.class_token.table(), (len(x), 1, x.shape[-1]))
            x = jnp.concatenate([token, x], axis=1)
        x = x + self.position.table()[None]
        return layers.dropout(x, self.cfg.dropout, seeds).astype(DTYPES[self.cfg.dtype])


def patches(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B T P"]:
    """The pixels of each patch, row by row; patches from left to right and top to bottom, so that a
    linear map of them is a convolution with stride and kernel of `size`."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // size, size, width // size, size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # (B, rows, columns, P, P, C)
    return x.reshape(batch, -1, size * size * channels)


class Heads(trunk.Heads):
    """Linear heads on the class token, or on the mean of the patches."""

    def summary(self, hidden, segment_ids, pool):
        if self.cfg.class_token and pool != "first":
            hidden = hidden[:, 1:]
        return super().summary(hidden, segment_ids, pool)

    def whole(self, hidden, segment_ids, name, pool, seeds):
        pool = pool or self.cfg.pool or ("first" if self.cfg.class_token else "mean")
        return super().whole(hidden, segment_ids, name, pool, seeds)


class Encoder(trunk.Trunk):
    """The trunk and its heads."""

    inputs = ("images",)
    block = Block
    heads = Heads

    def example(self) -> tuple[jax.Array, ...]:
        """One image, for initialisation."""
        return (jnp.zeros((1, *self.cfg.image_shape), jnp.float32),)

    def setup(self):
        self.embed = Embed(self.cfg)
        self.make_layers()
        self.norm = layers.LayerNorm(self.cfg.eps, dtype=DTYPES[self.cfg.dtype])
        self.head = self.heads(self.cfg)

    def encode(
        self, images: Float[Array, "B H W C"], seeds: randomness.Seeds | None = None
    ) -> Float[Array, "B T D"]:
        """Hidden states of the last layer that runs, the class token first. `seeds` turn dropout
        on."""
        cfg = self.cfg
        site = None if seeds is None else randomness.fold(seeds, cfg.depth)
        layer = {"index": jnp.asarray(np.arange(cfg.depth))}
        x = self.run_layers(sharding.constrain_batch(self.embed(images, site)), layer, seeds)
        return self.norm(x) if self.stop is None else x
