"""Causal decoders as GPT-2 has them (Radford et al. 2019): learned positions, norms before.

    embed -> block_00 … block_L -> norm -> heads: vocabulary, tied or not; linear

A token sees itself and what is before it in its own document: several documents can share a row, of
which `segment_ids` say which is whose and `positions` restart at each. Letters: B batch, T time, D
width, N heads, H head size, V vocabulary, L depth.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmjax.models import layers, trunk
from fmjax.models.attention import attention, mask
from fmjax.params import randomness, sharding
from fmjax.params.precision import DTYPES

FACTS = ("vocab_size", "lm_head")  # arguments that follow from data and objectives


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; `VARIANTS` names the published ones."""

    vocab_size: int = 50257
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    max_len: int = 1024
    biases: bool = True  # of linear maps and norms
    tied: bool = True  # whether the output is the token embedding
    scaled: bool = True  # whether products of queries and keys are times 1/√H
    scaled_by_layer: bool = False  # and times 1/n in the n-th layer
    lm_head: bool = True  # whether tokens are predicted
    classes: tuple[tuple[str, int], ...] = ()  # linear heads: (name, outputs)
    prefix: bool = False  # whether tokens of type 1 are seen by all of their document
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu_tanh"
    eps: float = 1e-5
    # How it is computed, which changes no number
    dtype: str = "float32"
    attention: str = "auto"
    scan: bool = True
    remat: str = "none"


VARIANTS: dict[str, dict[str, Any]] = {
    # Ours: the smallest that learns to write within minutes on a CPU.
    "tiny": dict(depth=4, width=128, heads=4, mlp=512, dropout=0.0, attention_dropout=0.0),
    "gpt2": {},
    "medium": dict(depth=24, width=1024, heads=16, mlp=4096),
    "large": dict(depth=36, width=1280, heads=20, mlp=5120),
    "xl": dict(depth=48, width=1600, heads=25, mlp=6400),
}


def Model(variant: str = "gpt2", **overrides: Any) -> "Decoder":
    """The decoder of a named variant with fields replaced; `classes` may be a mapping.

    Raises ConfigError for an unknown variant, field or inconsistent size.
    """
    cfg = trunk.configured(Config, VARIANTS, variant, overrides)
    trunk.check_config(cfg, taken=("lm",))
    return Decoder(cfg)


class Block(nn.Module):
    """One transformer layer: attention and MLP, a norm before each and a residual around them."""

    cfg: Config
    kind: str = "block"

    @nn.compact
    def __call__(self, x, layer, shared):
        cfg, dtype = self.cfg, DTYPES[self.cfg.dtype]
        segment_ids, may_see, seeds = shared
        seeds = None if seeds is None else randomness.fold(seeds, layer["index"])
        site = lambda i: None if seeds is None else randomness.fold(seeds, i)
        norm = lambda name: layers.LayerNorm(cfg.eps, cfg.biases, dtype, name=name)
        drop = lambda y, i: layers.dropout(y, cfg.dropout, site(i))

        attend = Attention(cfg, name="attn")
        h = attend(norm("attn_norm")(x), may_see, segment_ids, site(0), layer["index"])
        x = x + drop(h, 1)
        mlp = layers.Mlp(
            cfg.mlp, cfg.activation, False, cfg.biases, dtype, towards_residual(cfg), name="mlp"
        )
        x = x + drop(mlp(norm("mlp_norm")(x)), 2)
        return sharding.constrain_batch(x), None


class Attention(nn.Module):
    """Multi-head self-attention."""

    cfg: Config

    @nn.compact
    def __call__(self, x, may_see, segment_ids, seeds, index=0):
        cfg, (batch, time, width) = self.cfg, x.shape
        make = lambda name, **how: layers.Linear(
            width, cfg.biases, DTYPES[cfg.dtype], name=name, **how
        )
        split = lambda y: y.reshape(batch, time, cfg.heads, -1).swapaxes(1, 2)  # (B, N, T, H)
        q, k, v = (split(make(name)(x)) for name in ("query", "key", "value"))
        if cfg.scaled_by_layer:  # which layer it is, a scan knows as an array only
            q = (q / jnp.float32(index + 1)).astype(q.dtype)
        k, v, may_see = layers.Memory(name="memory")(k, v, may_see)
        out = attention(
            q, k, v, may_see,
            segment_ids=segment_ids,
            causal=True,
            prefix=cfg.prefix,
            scale=None if cfg.scaled else 1.0,
            dropout=cfg.attention_dropout,
            seeds=seeds,
            # Initialisation runs one short row, which no kernel takes.
            implementation="xla" if self.is_initializing() else cfg.attention,
        )  # fmt: skip
        out = out.swapaxes(1, 2).reshape(batch, time, width)
        return make("out", kernel_init=towards_residual(cfg))(out)


def towards_residual(cfg: Config) -> nn.initializers.Initializer:
    """Initial scale of the projections that add to the residual stream, twice a layer: 1/√(2 L) of
    the others (§2.3)."""
    return nn.initializers.normal(0.02 * (2 * cfg.depth) ** -0.5)


class Embed(nn.Module):
    """Token and position embeddings, summed."""

    cfg: Config

    def setup(self):
        self.token = layers.Embedding(self.cfg.vocab_size, self.cfg.width)
        self.position = layers.Embedding(self.cfg.max_len, self.cfg.width)

    def __call__(self, input_ids, positions, seeds, bare=False):
        x = self.token(input_ids, bare=bare) + self.position(positions)
        return layers.dropout(x, self.cfg.dropout, seeds).astype(DTYPES[self.cfg.dtype])


class Decoder(trunk.Trunk):
    """The trunk and its heads."""

    block = Block
    causal = True
    endless = False
    heads = trunk.DecoderHeads

    def setup(self):
        self.embed = Embed(self.cfg)
        self.seen = layers.Seen()
        self.make_layers()
        self.norm = layers.LayerNorm(self.cfg.eps, self.cfg.biases, DTYPES[self.cfg.dtype])
        self.head = self.heads(self.cfg)

    def encode(
        self,
        input_ids: Int[Array, "B T"] | Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        token_types: Int[Array, "B T"],
        seeds: randomness.Seeds | None = None,
        more: bool = False,
    ) -> Float[Array, "B T D"]:
        """Hidden states of the last layer that runs; `token_types` are not used but for prefixes.
        `seeds` turn dropout on; `more` says that the tokens continue with those of the calls before
        (`layers.CACHE`)."""
        cfg = self.cfg
        if self.start:
            x = input_ids.astype(DTYPES[cfg.dtype])
        else:
            site = None if seeds is None else randomness.fold(seeds, cfg.depth)
            x = self.embed(input_ids, positions, site, more)
        segments, places, types = self.seen(segment_ids, positions, token_types)
        sees = dict(causal=True, prefix=types == 1 if cfg.prefix else None)
        sees |= dict(keys=(segments, places))
        shared = (segment_ids, mask(segment_ids, positions, **sees), seeds)
        layer = {"index": jnp.asarray(np.arange(cfg.depth))}
        x = self.run_layers(sharding.constrain_batch(x), layer, shared)
        return self.norm(x) if self.stop is None else x

    def vocabulary(self) -> trunk.Vocabulary:
        """The matrix that `logits` multiplies with."""
        self.need_vocabulary()
        if not self.cfg.tied:
            return self.head.lm()
        token = self.embed.token
        return trunk.Vocabulary(token.table(), True, token.spec, DTYPES[self.cfg.dtype])
