"""Bidirectional encoders: BERT, RoBERTa, DistilBERT, ELECTRA and ModernBERT in one trunk.

    embed -> block_00 … block_L -> (norm) -> heads: vocabulary; linear, on the whole or each token

| family | norm | positions | MLP | attention | source |
|---|---|---|---|---|---|
| BERT | after | learned, token types | GELU | full | Devlin et al. 2019 |
| RoBERTa | after | learned, shifted by two | GELU | full | Liu et al. 2019 |
| DistilBERT | after | learned, no types | GELU | full | Sanh et al. 2019 |
| ELECTRA | after | learned, token types, narrower embeddings | GELU | full | Clark et al. 2020 |
| ModernBERT | before | rotary | GeGLU, without biases | full every third | Warner et al. 2024 |

Several documents can share a row: `segment_ids` keep them from seeing each other and `positions`
restart at each. Letters: B batch, T time, D width, N heads, H head size, V vocabulary, L depth.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmjax.errors import ConfigError, quoted
from fmjax.models import TOKEN_HEADS, WHOLE_HEADS, layers, trunk
from fmjax.models.attention import attention, mask
from fmjax.models.rope import rope
from fmjax.params import precision, randomness, sharding
from fmjax.params.precision import DTYPES

FACTS = ("vocab_size", "lm_head", "pool")  # arguments that follow from data and objectives


@dataclasses.dataclass(frozen=True)
class Config:
    """Every choice that distinguishes the encoders; `VARIANTS` names the published combinations."""

    vocab_size: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    max_len: int = 512
    embed_size: int = 0  # of embeddings, and of what they are compared with; 0: width
    types: int = 2  # token types (sentence A, B); 0 = none
    position_shift: int = 0  # RoBERTa's table starts two rows later, after its padding id
    pooler: bool | None = None  # a layer before linear heads; None: where the family has one
    pool: str = ""  # what stands for the whole sequence; "": its first token
    lm_head: bool = True  # the vocabulary head
    tied: bool = True  # whether its matrix is the token embedding
    classes: tuple[tuple[str, int], ...] = ()  # linear heads: (name, outputs)
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    head_activation: str = "gelu"
    eps: float = 1e-12
    # ModernBERT: pre-norm, rotary positions, gated MLP, local layers between full ones
    modern: bool = False
    window: int = 64  # tokens seen on each side by a local layer
    full_every: int = 3
    window_layers: tuple[int, ...] = ()  # the only local ones; (): as full_every says
    # Its biases, all of which the others have
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    head_bias: bool = False  # of the vocabulary head's dense map
    output_bias: bool = True  # of the vocabulary head's logits
    theta_full: float = 160_000.0
    theta_local: float = 10_000.0
    # How it is computed, which changes no number
    dtype: str = "float32"
    attention: str = "auto"
    scan: bool = True
    remat: str = "none"

    @property
    def embedded(self) -> int:
        """The size of embeddings."""
        return self.embed_size or self.width

    def biased(self, part: str) -> bool:
        """True if `part` (attention, mlp, norm, head, output) has a bias."""
        return not self.modern or getattr(self, f"{part}_bias")

    @property
    def full_layers(self) -> list[bool]:
        """The layers with attention over the whole row."""
        layers = range(self.depth)
        if self.window_layers:
            return [i not in self.window_layers for i in layers]
        return [i % self.full_every == 0 for i in layers]


_MODERN = dict(
    vocab_size=50368,
    max_len=8192,
    types=0,
    dropout=0.0,
    attention_dropout=0.0,
    eps=1e-5,
) | dict(modern=True)
_ROBERTA = dict(vocab_size=50265, types=1, position_shift=2, eps=1e-5)
_SIZES = {  # Turc et al. 2019, "Well-Read Students Learn Better", table 1
    "tiny": dict(depth=2, width=128, heads=2, mlp=512),
    "mini": dict(depth=4, width=256, heads=4, mlp=1024),
    "small": dict(depth=4, width=512, heads=8, mlp=2048),
    "medium": dict(depth=8, width=512, heads=8, mlp=2048),
    "base": dict(depth=12, width=768, heads=12, mlp=3072),
    "large": dict(depth=24, width=1024, heads=16, mlp=4096),
}
VARIANTS: dict[str, dict[str, Any]] = {
    **_SIZES,
    "roberta_base": _SIZES["base"] | _ROBERTA,
    "roberta_large": _SIZES["large"] | _ROBERTA,
    # Ours: the smallest that learns within minutes on a CPU. Rotary positions and pre-norm make the
    # difference: BERT's own layout of the same size learns little more than frequencies in that
    # time.
    "modernbert_tiny": _MODERN | dict(depth=2, width=128, heads=2, mlp=256, window=16),
    "distilbert": _SIZES["base"] | dict(depth=6, types=0),
    "modernbert_base": _MODERN | dict(depth=22, width=768, heads=12, mlp=1152),
    "modernbert_large": _MODERN | dict(depth=28, width=1024, heads=16, mlp=2624),
}


def Model(variant: str = "base", **overrides: Any) -> "Encoder":
    """The encoder of a named variant with fields replaced; `classes` may be a mapping.

    Raises ConfigError for an unknown variant, field or inconsistent size.
    """
    cfg = trunk.configured(Config, VARIANTS, variant, overrides)
    trunk.check_config(cfg, taken=("mlm", "pooler"))
    if cfg.embed_size and not cfg.tied:
        raise ConfigError(
            f"config.model.embed_size={cfg.embed_size} needs config.model.tied: an output of its "
            "own has the width of the layers."
        )
    for key in ("window", "full_every"):
        if getattr(cfg, key) < 1:
            raise ConfigError(f"config.model.{key}={getattr(cfg, key)} must be at least 1 here.")
    if not set(cfg.window_layers) <= set(range(cfg.depth)):
        raise ConfigError(
            f"config.model.window_layers={quoted(cfg.window_layers)} are not all numbers from 0 to "
            f"below config.model.depth={cfg.depth}."
        )
    if cfg.pooler is None:
        cfg = dataclasses.replace(cfg, pooler=_has_pooler(cfg))
    return Encoder(cfg)


def _has_pooler(cfg: Config) -> bool:
    """True if transformers has a layer between the trunk and the linear heads of `cfg`."""
    heads = {name for name, _ in cfg.classes}
    if cfg.modern:
        return bool(heads & {*WHOLE_HEADS, *TOKEN_HEADS})
    is_bert = cfg.types and not cfg.position_shift
    return bool(is_bert or heads & {*WHOLE_HEADS})


class Block(nn.Module):
    """One transformer layer: attention and MLP, each with its residual, norm and dropout.

    The `kind` "first" is ModernBERT's first layer, whose attention norm is the embedding norm
    before it.
    """

    cfg: Config
    kind: str = "rest"

    @nn.compact
    def __call__(self, x, layer, shared):
        cfg, dtype = self.cfg, DTYPES[self.cfg.dtype]
        segment_ids, positions, full, local, seeds = shared
        seeds = None if seeds is None else randomness.fold(seeds, layer["index"])
        site = lambda i: None if seeds is None else randomness.fold(seeds, i)
        norm = lambda name: layers.LayerNorm(cfg.eps, cfg.biased("norm"), dtype, name=name)
        drop = lambda y, i: layers.dropout(y, cfg.dropout, site(i))

        h = norm("attn_norm")(x) if cfg.modern and self.kind != "first" else x
        may_see, theta = full, None
        if cfg.modern:
            may_see = jnp.where(layer["full"], full, local)
            theta = jnp.where(layer["full"], cfg.theta_full, cfg.theta_local)
        h = Attention(cfg, name="attn")(h, may_see, theta, segment_ids, positions, site(0))
        x = x + drop(h, 1)
        x = x if cfg.modern else norm("attn_norm")(x)

        h = norm("mlp_norm")(x) if cfg.modern else x
        biased = cfg.biased("mlp")
        h = layers.Mlp(cfg.mlp, cfg.activation, cfg.modern, biased, dtype, name="mlp")(h)
        x = x + drop(h, 2)
        x = x if cfg.modern else norm("mlp_norm")(x)
        return sharding.constrain_batch(x), None


class Attention(nn.Module):
    """Multi-head self-attention."""

    cfg: Config

    @nn.compact
    def __call__(self, x, may_see, theta, segment_ids, positions, seeds):
        cfg, (batch, time, width) = self.cfg, x.shape
        biased = cfg.biased("attention")
        make = lambda name: layers.Linear(width, biased, DTYPES[cfg.dtype], name=name)
        split = lambda y: y.reshape(batch, time, cfg.heads, -1).swapaxes(1, 2)  # (B, N, T, H)
        q, k, v = (split(make(name)(x)) for name in ("query", "key", "value"))
        if theta is not None:
            q, k = rope(q, positions, theta), rope(k, positions, theta)
        k, v, may_see = layers.Memory(name="memory")(k, v, may_see)
        out = attention(
            q, k, v, may_see,
            segment_ids=segment_ids,
            windowed=cfg.modern,
            dropout=cfg.attention_dropout,
            seeds=seeds,
            # Initialisation runs one short row, which no kernel takes.
            implementation="xla" if self.is_initializing() else cfg.attention,
        )  # fmt: skip
        return make("out")(out.swapaxes(1, 2).reshape(batch, time, width))


class Embed(nn.Module):
    """Token, position and type embeddings, summed and normalised."""

    cfg: Config

    def setup(self):
        cfg = self.cfg
        self.token = layers.Embedding(cfg.vocab_size, cfg.embedded)
        if not cfg.modern:
            self.position = layers.Embedding(cfg.max_len + cfg.position_shift, cfg.embedded)
        if cfg.types:
            self.type = layers.Embedding(cfg.types, cfg.embedded)
        if cfg.embedded != cfg.width:
            self.project = layers.Linear(cfg.width, dtype=DTYPES[cfg.dtype])
        self.norm = layers.LayerNorm(cfg.eps, cfg.biased("norm"))

    def __call__(self, input_ids, positions, token_types, seeds):
        cfg = self.cfg
        x = self.token(input_ids)
        if not cfg.modern:
            x = x + self.position(positions + cfg.position_shift)
        if cfg.types:
            x = x + self.type(token_types)
        x = layers.dropout(self.norm(x), cfg.dropout, seeds).astype(DTYPES[cfg.dtype])
        return self.project(x) if cfg.embedded != cfg.width else x


class MlmHead(nn.Module):
    """Dense, activation, norm, and the projection, `table` where it is tied."""

    cfg: Config

    @nn.compact
    def __call__(self, x, table, spec):
        cfg, dtype = self.cfg, DTYPES[self.cfg.dtype]
        h = _transformed(cfg, x)
        if cfg.tied:
            logits = precision.linear(h, table, dtype, out_in=True, spec=spec)
        else:
            logits = trunk.Output(cfg, name="lm")().logits(h)
        if not cfg.biased("output"):
            return logits
        bias = self.param("bias", nn.initializers.zeros, (cfg.vocab_size,), jnp.float32)
        return precision.add_bias(logits, bias)


class ModernPooler(nn.Module):
    """ModernBERT's layer before a linear head: dense, activation, norm."""

    cfg: Config

    @nn.compact
    def __call__(self, x):
        return _transformed(self.cfg, x)


def _transformed(cfg: Config, x):
    """Dense, activation, norm: submodules of the module that calls."""
    dtype = DTYPES[cfg.dtype]
    h = layers.Linear(cfg.embedded, cfg.biased("head"), dtype, name="dense")(x, jnp.float32)
    h = layers.ACTIVATIONS[cfg.head_activation](h)
    return layers.LayerNorm(cfg.eps, cfg.biased("norm"), dtype, name="norm")(h)


class Heads(trunk.Heads):
    """The vocabulary head, and linear heads after the family's pooler: dense and tanh of the first
    token (BERT, RoBERTa), dense and ReLU (DistilBERT), or `ModernPooler` of anything."""

    def setup(self):
        super().setup()
        if self.cfg.lm_head:
            self.mlm = MlmHead(self.cfg)
        if self.cfg.pooler and self.cfg.modern:
            self.pooler = ModernPooler(self.cfg)
        elif self.cfg.pooler:
            self.pooler = layers.Linear(self.cfg.width, dtype=DTYPES[self.cfg.dtype])

    def summary(self, hidden, segment_ids, pool):
        cfg, whole = self.cfg, super().summary(hidden, segment_ids, pool)
        if cfg.pooler and cfg.modern:
            return self.pooler(whole)
        if not cfg.pooler or pool != "first":
            return whole
        activation = jnp.tanh if cfg.types or cfg.position_shift else jax.nn.relu
        return activation(self.pooler(whole, jnp.float32))

    def tokens(self, hidden, name, seeds):
        if self.cfg.pooler and self.cfg.modern:
            hidden = self.pooler(hidden)
        return super().tokens(hidden, name, seeds)


class Encoder(trunk.Trunk):
    """The trunk and its heads."""

    block = Block
    heads = Heads

    @property
    def kinds(self) -> list[str]:
        return ["first" if self.cfg.modern and i == 0 else "rest" for i in range(self.cfg.depth)]

    def setup(self):
        cfg = self.cfg
        self.embed = Embed(cfg)
        self.make_layers()
        if cfg.modern:
            self.norm = layers.LayerNorm(cfg.eps, cfg.norm_bias, DTYPES[cfg.dtype])
        self.head = self.heads(cfg)

    def encode(
        self,
        input_ids: Int[Array, "B T"] | Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        token_types: Int[Array, "B T"],
        seeds: randomness.Seeds | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states of the last layer that runs. `seeds` turn dropout on."""
        cfg = self.cfg
        if self.start:
            x = input_ids.astype(DTYPES[cfg.dtype])
        else:
            site = None if seeds is None else randomness.fold(seeds, cfg.depth)
            x = self.embed(input_ids, positions, token_types, site)
        local = mask(segment_ids, positions, cfg.window) if cfg.modern else None
        shared = (segment_ids, positions, mask(segment_ids, positions), local, seeds)
        index = np.arange(cfg.depth)
        layer = {"index": jnp.asarray(index), "full": jnp.asarray(cfg.full_layers)}
        x = self.run_layers(sharding.constrain_batch(x), layer, shared)
        return self.norm(x) if cfg.modern and self.stop is None else x

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Vocabulary logits in float32."""
        self.need_vocabulary()
        token = self.embed.token
        return self.head.mlm(hidden, token.table(), token.spec)
