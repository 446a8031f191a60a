"""Causal decoders of the Llama family: RMS norms, rotary positions, gated MLPs, and what differs.

    embed -> block_00 … block_L -> norm -> heads: vocabulary, tied or not; linear

| family | differs from Llama 2 (Touvron et al. 2023) in |
|---|---|
| Llama 3 | grouped keys and values, stretched rotary positions |
| Mistral | grouped keys and values, a window; Ministral: in some layers |
| Qwen 2 | biases of query, key and value |
| Qwen 3 | norms of queries and keys, head size of its own |
| Gemma | norms with 1 + scale, embedding times √D, GELU, tied |
| Gemma 2 | … norms after attention and MLP too, soft caps, every other layer with a window |
| Gemma 3 | … norms of queries and keys, no caps; two bases of positions, five of six layers near |
| OLMo 2 | norms after attention and MLP only, and of whole queries and keys |
| OLMo 3 | … three of four layers with a window, only the others stretched |
| OLMo | norms without parameters, clipped queries, keys and values |
| SmolLM 3 | grouped keys and values, no positions in every fourth layer |
| BLOOM | linear biases for positions (alibi.py), layer norms, also of the embedding; GELU, no gate; biases, tied |
| Mixtral | experts for the MLP (experts.py) |
| Qwen 2 MoE, Qwen 3 MoE | … one of them for all tokens; norms of queries and keys |

A token sees itself and what is before it in its own document: several documents can share a row, of
which `segment_ids` say which is whose and `positions` restart at each. Letters: B batch, T time, D
width, N heads, K heads of keys and values, H head size, V vocabulary, L depth.
"""  # noqa: E501  a row of a table is one line

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmjax.errors import ConfigError, did_you_mean, quoted
from fmjax.models import alibi, experts, layers, rope, trunk
from fmjax.models.attention import attention, mask
from fmjax.params import randomness, sharding
from fmjax.params.precision import DTYPES

NORM = ("rms", "layer", "plain")
NORMS = ("before", "behind", "around")
QK_NORMS = ("", "head", "whole")


FACTS = ("vocab_size", "lm_head")  # arguments that follow from data and objectives


@dataclasses.dataclass(frozen=True)
class Config:
    """Every choice that tells the family's members apart; `VARIANTS` names published ones."""

    vocab_size: int = 32000
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 0  # of keys and values; 0: as many as of queries
    head_size: int = 0  # 0: width / heads
    mlp: int = 11008
    max_len: int = 4096
    tied: bool = False  # whether the output is the token embedding
    lm_head: bool = True  # whether tokens are predicted
    classes: tuple[tuple[str, int], ...] = ()  # linear heads: (name, outputs)
    prefix: bool = False  # whether tokens of type 1 are seen by all of their document
    activation: str = "silu"
    gated: bool = True  # whether MLPs are
    norm: str = "rms"  # or layer, with scales and biases; or plain, a layer norm without
    eps: float = 1e-5
    norms: str = "before"  # attention and MLP; or after them, or around
    norm_offset: float = 0.0  # added to the scales of norms
    qk_norm: str = ""  # norms of queries and keys: of each head, or of the whole
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    clip_qkv: float = 0.0  # what no query, key and value is above or below; 0: none
    embed_scale: bool = False  # the embedding times √D
    embed_norm: bool = False
    query_scale: float = 0.0  # of products of queries and keys; 0: 1/√H
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    window: int = 0  # tokens that a layer sees, itself included; 0: all
    full_every: int = 0  # of layers with a window every n-th sees all; 0: none
    window_layers: tuple[int, ...] = ()  # the only ones with the window; (): as full_every says
    theta: float = 10_000.0
    theta_window: float = 0.0  # of layers with a window; 0: as the others
    rope: tuple[tuple[str, Any], ...] = ()  # how positions are stretched: `models.rope`
    nope_every: int = 0  # every n-th layer has no positions; 0: none
    nope_layers: tuple[int, ...] = ()  # the only ones without; (): as nope_every says
    alibi: bool = False  # linear biases in the place of rotary positions
    experts: int = 0  # MLPs of a layer, of which each token takes a few; 0: one for all
    experts_per_token: int = 2
    experts_normed: bool = True  # whether the weights of those that a token takes sum to 1
    expert_mlp: int = 0  # 0: as mlp
    shared_mlp: int = 0  # of an expert that all tokens take, too; 0: none
    dense_layers: tuple[int, ...] = ()  # which have one MLP all the same
    capacity: float = 0.0  # of an expert, in fair shares of a row; 0: for all that choose it
    router_aux_loss: float = 0.01  # factors in the loss of clm: of balance,
    router_z_loss: float = 0.0  # and of the size of the router's logits
    dropout: float = 0.0
    attention_dropout: float = 0.0
    # How it is computed, which changes no number
    dtype: str = "float32"
    attention: str = "auto"
    scan: bool = True
    remat: str = "none"

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def size(self) -> int:
        """Width of a head."""
        return self.head_size or self.width // self.heads

    @property
    def full_layers(self) -> list[bool]:
        """The layers with attention over all earlier tokens."""
        if not self.window:
            return [True] * self.depth
        if self.window_layers:
            return [i not in self.window_layers for i in range(self.depth)]
        return _each(self.full_every, self.depth)

    @property
    def rotary_layers(self) -> list[bool]:
        """The layers with rotary positions."""
        if self.nope_layers:
            return [i not in self.nope_layers for i in range(self.depth)]
        return [not nope for nope in _each(self.nope_every, self.depth)]


def _each(period: int, depth: int) -> list[bool]:
    """True for every `period`-th layer; 0: for none."""
    return [bool(period) and i % period == 0 for i in range(1, depth + 1)]


_LLAMA3 = dict(vocab_size=128256, kv_heads=8, theta=500_000.0, max_len=8192)
VARIANTS: dict[str, dict[str, Any]] = {
    # Ours: the smallest that learns to write within minutes on a CPU.
    "tiny": dict(depth=4, width=128, heads=4, kv_heads=2, mlp=344, max_len=1024, tied=True),
    # The same with eight MLPs of half the size for one, of which a token takes two.
    "tiny_experts": dict(
        depth=4, width=128, heads=4, kv_heads=2, mlp=172, max_len=1024, tied=True, experts=8
    ),
    "llama2_7b": {},
    "tinyllama_1b": dict(depth=22, width=2048, kv_heads=4, mlp=5632, max_len=2048),
    "mixtral_8x7b": dict(mlp=14336, kv_heads=8, max_len=32768, theta=1e6, experts=8),
    "olmo_1b": dict(
        vocab_size=50304,
        depth=16,
        width=2048,
        heads=16,
        mlp=8192,
        max_len=2048,
        tied=True,
        norm="plain",
    ),  # fmt: skip
    "bloom_560m": dict(
        vocab_size=250880,
        depth=24,
        width=1024,
        heads=16,
        mlp=4096,
        max_len=2048,
        tied=True,
        alibi=True,
        norm="layer",
        embed_norm=True,
        gated=False,
        activation="gelu_tanh",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    ),  # fmt: skip
    "llama3_8b": _LLAMA3 | dict(mlp=14336),
    "llama3_1b": _LLAMA3 | dict(depth=16, width=2048, mlp=8192, tied=True),
}


def Model(variant: str = "llama2_7b", **overrides: Any) -> "Decoder":
    """The decoder of a named variant with fields replaced; `classes` and `rope` may be mappings.

    Raises ConfigError for an unknown variant, field or inconsistent size.
    """
    cfg = trunk.configured(Config, VARIANTS, variant, overrides)
    trunk.check_config(cfg, taken=("lm",))
    for key, possible in (("norm", NORM), ("norms", NORMS), ("qk_norm", QK_NORMS)):
        if (value := getattr(cfg, key)) not in possible:
            raise ConfigError(
                f"config.model.{key}={value!r} is not known." + did_you_mean(value, possible)
            )
    if cfg.heads % cfg.key_heads:
        raise ConfigError(
            f"config.model.kv_heads={cfg.kv_heads} does not divide config.model.heads={cfg.heads}."
        )
    if cfg.size % 2 and not cfg.alibi:
        raise ConfigError(f"config.model.head_size={cfg.size} is odd: rotary positions turn pairs.")
    if cfg.full_every and not cfg.window:
        raise ConfigError(
            f"config.model.full_every={cfg.full_every} needs config.model.window: without one "
            "every layer sees all."
        )
    if cfg.experts and (cfg.mlp_bias or not getattr(cfg, "gated", True)):
        raise ConfigError(
            f"config.model.experts={cfg.experts} are gated and have no biases: leave "
            "config.model.mlp_bias and config.model.gated out."
        )
    if cfg.experts and not 0 < cfg.experts_per_token <= cfg.experts:
        raise ConfigError(
            f"config.model.experts_per_token={cfg.experts_per_token} is not a number from 1 to "
            f"config.model.experts={cfg.experts}."
        )
    for key, needed in (("window_layers", "window"), ("dense_layers", "experts")):
        if getattr(cfg, key) and not getattr(cfg, needed):
            raise ConfigError(
                f"config.model.{key}={getattr(cfg, key)} needs config.model.{needed}."
            )
    for one, other in (("window_layers", "full_every"), ("nope_layers", "nope_every")):
        if getattr(cfg, one) and getattr(cfg, other):
            raise ConfigError(
                f"config.model.{one}={getattr(cfg, one)} and config.model.{other}="
                f"{getattr(cfg, other)} both say which layers: leave one out."
            )
    for key in ("dense_layers", "window_layers", "nope_layers"):
        if not set(getattr(cfg, key)) <= set(range(cfg.depth)):
            raise ConfigError(
                f"config.model.{key}={quoted(getattr(cfg, key))} are not all numbers from 0 to "
                f"below config.model.depth={cfg.depth}."
            )
    rope.check(dict(cfg.rope))
    return Decoder(cfg)


class Block(nn.Module):
    """One transformer layer: attention and MLP, each with its norms and a residual around it."""

    cfg: Config
    kind: str = "block"

    @nn.compact
    def __call__(self, x, layer, shared):
        cfg = self.cfg
        seeds = (
            None if shared["seeds"] is None else randomness.fold(shared["seeds"], layer["index"])
        )
        site = lambda i: None if seeds is None else randomness.fold(seeds, i)
        if self.kind == "experts":
            routed = experts.Experts(cfg, name="mlp")
            mlp = lambda h: routed(h, shared["segment_ids"] > 0)
        else:
            how = cfg.activation, cfg.gated, cfg.mlp_bias, DTYPES[cfg.dtype]
            mlp = layers.Mlp(cfg.mlp, *how, name="mlp")

        def residual(x, name, function, i):
            h = norm(cfg, f"{name}_norm")(x) if cfg.norms != "behind" else x
            h = function(h)
            h = norm(cfg, f"{name}_norm_behind")(h) if cfg.norms != "before" else h
            return x + layers.dropout(h, cfg.dropout, site(i))

        norms = {}
        if cfg.qk_norm:  # here, as what is in `attn` are matrices
            norms = {name: norm(cfg, f"{name}_norm") for name in ("query", "key")}
        attend = Attention(cfg, name="attn")
        x = residual(x, "attn", lambda h: attend(h, norms, layer, shared, site(0)), 1)
        x = residual(x, "mlp", mlp, 2)
        return sharding.constrain_batch(x), None


def norm(cfg: Config, name: str | None = None) -> Callable:
    dtype = DTYPES[cfg.dtype]
    if cfg.norm == "rms":
        return layers.RmsNorm(cfg.eps, cfg.norm_offset, dtype, name=name)
    if cfg.norm == "layer":
        return layers.LayerNorm(cfg.eps, dtype=dtype, name=name)
    ones = lambda x: jnp.ones(x.shape[-1], jnp.float32)
    return lambda x: layers.layer_norm(x, ones(x), None, cfg.eps).astype(dtype)


class Attention(nn.Module):
    """Self-attention with rotary positions, of which keys and values may have fewer heads."""

    cfg: Config

    @nn.compact
    def __call__(self, x, norms, layer, shared, seeds):
        cfg, (batch, time, width), size = self.cfg, x.shape, self.cfg.size
        make = lambda name, features, bias: layers.Linear(
            features, bias, DTYPES[cfg.dtype], name=name
        )
        split = lambda y: y.reshape(batch, time, -1, size).swapaxes(1, 2)  # (B, N, T, H)

        def projected(name, heads):
            y = make(name, heads * size, cfg.qkv_bias)(x)
            y = jnp.clip(y, -cfg.clip_qkv, cfg.clip_qkv) if cfg.clip_qkv else y
            normed = norms.get(name, lambda y: y)
            return split(normed(y)) if cfg.qk_norm == "whole" else normed(split(y))

        q = projected("query", cfg.heads)
        k, v = (projected(name, cfg.key_heads) for name in ("key", "value"))
        if not cfg.alibi:
            table = jnp.where(layer["full"], shared["far"], shared["near"])
            factor = jnp.where(layer["full"], *shared["factors"])
            if not all(cfg.rotary_layers):
                table = jnp.where(layer["nope"], jnp.zeros_like(table), table)
                factor = jnp.where(layer["nope"], jnp.ones_like(factor), factor)
            q, k = (rope.turned(y, shared["positions"], table, factor) for y in (q, k))
        may_see = jnp.where(layer["full"], shared["all"], shared["window"])
        k, v, may_see = layers.Memory(name="memory")(k, v, may_see)
        bias = None
        if cfg.alibi:
            before = k.shape[2] - shared["keys"].shape[1]
            bias = alibi.bias(cfg.heads, shared["positions"], shared["keys"], before)
        out = attention(
            q, k, v, may_see,
            segment_ids=shared["segment_ids"],
            bias=bias,
            causal=True,
            prefix=cfg.prefix,
            windowed=cfg.window > 0,
            scale=cfg.query_scale or None,
            softcap=cfg.attention_softcap,
            dropout=cfg.attention_dropout,
            seeds=seeds,
            # Initialisation runs one short row, which no kernel takes.
            implementation="xla" if self.is_initializing() else cfg.attention,
        )  # fmt: skip
        out = out.swapaxes(1, 2).reshape(batch, time, cfg.heads * size)
        return make("out", width, cfg.out_bias)(out)


class Embed(nn.Module):
    """Token embeddings."""

    cfg: Config

    def setup(self):
        self.token = layers.Embedding(self.cfg.vocab_size, self.cfg.width)
        if self.cfg.embed_norm:
            self.norm = norm(self.cfg)

    def __call__(self, input_ids, seeds, bare=False):
        cfg = self.cfg
        x = self.token(input_ids, bare=bare)
        if cfg.embed_scale:
            x = x * jnp.asarray(cfg.width**0.5, DTYPES[cfg.dtype]).astype(x.dtype)
        if cfg.embed_norm:
            x = self.norm(x)
        return layers.dropout(x, cfg.dropout, seeds).astype(DTYPES[cfg.dtype])


class Decoder(trunk.Trunk):
    """The trunk and its heads."""

    block = Block
    causal = True
    heads = trunk.DecoderHeads

    @property
    def kinds(self) -> list[str]:
        """A word for layers with experts, and one for those with a single MLP."""
        dense = self.cfg.dense_layers if self.cfg.experts else range(self.cfg.depth)
        return ["block" if i in dense else "experts" for i in range(self.cfg.depth)]

    def setup(self):
        self.embed = Embed(self.cfg)
        self.seen = layers.Seen()
        self.make_layers()
        self.norm = norm(self.cfg)
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
            x = self.embed(input_ids, site, more)
        segments, places, types = self.seen(segment_ids, positions, token_types)
        sees = dict(causal=True, prefix=types == 1 if cfg.prefix else None)
        sees |= dict(keys=(segments, places))
        seen = mask(segment_ids, positions, **sees)
        window = mask(segment_ids, positions, cfg.window - 1, **sees) if cfg.window else seen
        # What is written after a text does not turn what is kept of it.
        length = input_ids.shape[1] if segments is segment_ids else cfg.max_len
        how = dict(cfg.rope), length, cfg.max_len
        far, factor = rope.frequencies(cfg.size, cfg.theta, *how)
        near, near_factor = far, factor
        if cfg.theta_window:
            near, near_factor = rope.frequencies(cfg.size, cfg.theta_window, {}, *how[1:])
        shared = dict(
            segment_ids=segment_ids,
            positions=positions,
            keys=places,
            all=seen,
            window=window,
            far=jnp.asarray(far, jnp.float32),
            near=jnp.asarray(near, jnp.float32),
            factors=(jnp.float32(factor), jnp.float32(near_factor)),
            seeds=seeds,
        )
        index = np.arange(cfg.depth)
        layer = {"index": jnp.asarray(index), "full": jnp.asarray(cfg.full_layers)}
        if not all(cfg.rotary_layers):
            layer["nope"] = ~jnp.asarray(cfg.rotary_layers)
        x = self.run_layers(sharding.constrain_batch(x), layer, shared)
        return self.norm(x) if self.stop is None else x

    def vocabulary(self) -> trunk.Vocabulary:
        """The matrix that `logits` multiplies with."""
        self.need_vocabulary()
        if not self.cfg.tied:
            return self.head.lm()._replace(softcap=self.cfg.logit_softcap)
        token = self.embed.token
        dtype = DTYPES[self.cfg.dtype]
        return trunk.Vocabulary(token.table(), True, token.spec, dtype, self.cfg.logit_softcap)
