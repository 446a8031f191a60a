"""Bidirectional encoders: BERT, RoBERTa, DistilBERT and ModernBERT in one trunk.

    embed -> block_00 … block_L -> (norm) -> heads: vocabulary; linear, on the whole or each token

| family | norm | positions | MLP | attention | source |
|---|---|---|---|---|---|
| BERT | after | learned, token types | GELU | full | Devlin et al. 2019 |
| RoBERTa | after | learned, shifted by two | GELU | full | Liu et al. 2019 |
| DistilBERT | after | learned, no types, no pooler | GELU | full | Sanh et al. 2019 |
| ModernBERT | before | rotary | GeGLU, no biases | full every third | Warner et al. 2024 |

Several documents can share a row: `segment_ids` keep them from seeing each other and `positions`
restart at each. Letters: B batch, T time, D width, N heads, H head size, V vocabulary, L depth.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmjax import losses, precision, sharding, streams, trees
from fmjax.errors import ConfigError, did_you_mean
from fmjax.models import TOKEN_HEADS, layers
from fmjax.models.attention import attention, mask
from fmjax.precision import DTYPES


@dataclasses.dataclass(frozen=True)
class Config:
    """Every choice that distinguishes the encoders; `VARIANTS` names the published combinations."""

    vocab_size: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    max_len: int = 512
    types: int = 2  # token types (sentence A, B); 0 = none
    position_shift: int = 0  # RoBERTa's table starts two rows later, after its padding id
    pooler: bool = True
    lm_head: bool = True  # the vocabulary head
    classes: tuple[tuple[str, int], ...] = ()  # linear heads: (name, outputs)
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    head_activation: str = "gelu"
    eps: float = 1e-12
    # ModernBERT: pre-norm, rotary positions, gated MLP, no biases, local layers between full ones
    modern: bool = False
    window: int = 64  # tokens seen on each side by a local layer
    full_every: int = 3
    theta_full: float = 160_000.0
    theta_local: float = 10_000.0
    # How it is computed, which changes no number
    dtype: str = "float32"
    attention: str = "auto"
    scan: bool = True
    remat: str = "none"


_MODERN = dict(
    vocab_size=50368,
    max_len=8192,
    types=0,
    pooler=False,
    dropout=0.0,
    attention_dropout=0.0,
    eps=1e-5,
) | dict(modern=True)
_ROBERTA = dict(vocab_size=50265, types=1, position_shift=2, pooler=False, eps=1e-5)
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
    "distilbert": _SIZES["base"] | dict(depth=6, types=0, pooler=False),
    "modernbert_base": _MODERN | dict(depth=22, width=768, heads=12, mlp=1152),
    "modernbert_large": _MODERN | dict(depth=28, width=1024, heads=16, mlp=2624),
}
REMAT = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def Model(variant: str = "base", **overrides: Any) -> "Encoder":
    """The encoder of a named variant with fields replaced; `classes` may be a mapping.

    Raises ConfigError for an unknown variant, field or inconsistent size.
    """
    if variant not in VARIANTS:
        raise ConfigError(
            f"config.model.variant={variant!r} is not known." + did_you_mean(variant, VARIANTS)
        )
    fields = {field.name for field in dataclasses.fields(Config)}
    for key in set(overrides) - fields:
        raise ConfigError(f"config.model.{key} is not known." + did_you_mean(key, fields))
    if isinstance(overrides.get("classes"), Mapping):
        overrides["classes"] = tuple(overrides["classes"].items())
    cfg = Config(**{**VARIANTS[variant], **overrides})
    if cfg.width % cfg.heads:
        raise ConfigError(
            f"config.model.heads={cfg.heads} does not divide config.model.width={cfg.width}."
        )
    for name, _ in cfg.classes:
        if not name.isidentifier() or name in ("mlm", "pooler", *dir(Heads(cfg))):
            raise ConfigError(f"classes: {name!r} cannot be the name of a head; use another word.")
    for key, table in (("dtype", DTYPES), ("remat", REMAT)):
        if getattr(cfg, key) not in table:
            raise ConfigError(
                f"config.model.{key}={getattr(cfg, key)!r} is not known."
                + did_you_mean(getattr(cfg, key), table)
            )
    return Encoder(cfg)


class Block(nn.Module):
    """One transformer layer: attention and MLP, each with its residual, norm and dropout.

    `first` marks ModernBERT's first layer, whose attention norm is the embedding norm before it.
    """

    cfg: Config
    first: bool = False

    @nn.compact
    def __call__(self, x, layer, shared):
        cfg, dtype = self.cfg, DTYPES[self.cfg.dtype]
        segment_ids, positions, full, local, seeds = shared
        seeds = None if seeds is None else streams.fold(seeds, layer["index"])
        site = lambda i: None if seeds is None else streams.fold(seeds, i)
        norm = lambda name: layers.LayerNorm(cfg.eps, not cfg.modern, dtype, name=name)
        drop = lambda y, i: layers.dropout(y, cfg.dropout, site(i))

        h = norm("attn_norm")(x) if cfg.modern and not self.first else x
        may_see, theta = full, None
        if cfg.modern:
            may_see = jnp.where(layer["full"], full, local)
            theta = jnp.where(layer["full"], cfg.theta_full, cfg.theta_local)
        h = Attention(cfg, name="attn")(h, may_see, theta, segment_ids, positions, site(0))
        x = x + drop(h, 1)
        x = x if cfg.modern else norm("attn_norm")(x)

        h = norm("mlp_norm")(x) if cfg.modern else x
        h = layers.Mlp(cfg.mlp, cfg.activation, cfg.modern, not cfg.modern, dtype, name="mlp")(h)
        x = x + drop(h, 2)
        x = x if cfg.modern else norm("mlp_norm")(x)
        return sharding.constrain_batch(x), None


class Attention(nn.Module):
    """Multi-head self-attention."""

    cfg: Config

    @nn.compact
    def __call__(self, x, may_see, theta, segment_ids, positions, seeds):
        cfg, (batch, time, width) = self.cfg, x.shape
        make = lambda name: layers.Linear(width, not cfg.modern, DTYPES[cfg.dtype], name=name)
        split = lambda y: y.reshape(batch, time, cfg.heads, -1).swapaxes(1, 2)  # (B, N, T, H)
        q, k, v = (split(make(name)(x)) for name in ("query", "key", "value"))
        if theta is not None:
            q, k = layers.rope(q, positions, theta), layers.rope(k, positions, theta)
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
        self.token = layers.Embedding(cfg.vocab_size, cfg.width)
        if not cfg.modern:
            self.position = layers.Embedding(cfg.max_len + cfg.position_shift, cfg.width)
        if cfg.types:
            self.type = layers.Embedding(cfg.types, cfg.width)
        self.norm = layers.LayerNorm(cfg.eps, not cfg.modern)

    def __call__(self, input_ids, positions, token_types, seeds):
        cfg = self.cfg
        x = self.token(input_ids)
        if not cfg.modern:
            x = x + self.position(positions + cfg.position_shift)
        if cfg.types:
            x = x + self.type(token_types)
        x = layers.dropout(self.norm(x), cfg.dropout, seeds)
        return x.astype(DTYPES[cfg.dtype])


class MlmHead(nn.Module):
    """Dense, activation, norm; the projection itself is tied to the token embedding."""

    cfg: Config

    @nn.compact
    def __call__(self, x, table, spec):
        cfg, dtype = self.cfg, DTYPES[self.cfg.dtype]
        h = layers.Linear(cfg.width, not cfg.modern, dtype, name="dense")(x, jnp.float32)
        h = layers.ACTIVATIONS[cfg.head_activation](h)
        h = layers.LayerNorm(cfg.eps, not cfg.modern, dtype, name="norm")(h)
        bias = self.param("bias", nn.initializers.zeros, (cfg.vocab_size,), jnp.float32)
        logits = precision.linear(h, table, dtype, out_in=True, spec=spec)
        return precision.add_bias(logits, bias)


class Heads(nn.Module):
    """The vocabulary head, the pooler and the linear classifiers on it."""

    cfg: Config

    def setup(self):
        cfg, dtype = self.cfg, DTYPES[self.cfg.dtype]
        if cfg.lm_head:
            self.mlm = MlmHead(cfg)
        if cfg.pooler:
            self.pooler = layers.Linear(cfg.width, dtype=dtype)
        for name, features in cfg.classes:
            setattr(self, name, layers.Linear(features, dtype=dtype))

    def whole(self, hidden, segment_ids, name, pool, seeds):
        whole = losses.pooled(hidden, segment_ids, pool)
        if self.cfg.pooler and pool == "first":
            whole = jnp.tanh(self.pooler(whole, jnp.float32))
        return self.each(whole, name, seeds)

    def each(self, hidden, name, seeds):
        return getattr(self, name)(layers.dropout(hidden, self.cfg.dropout, seeds), jnp.float32)


class Encoder(nn.Module):
    """The trunk and its heads: `encode`, `logits`, `classify`, `project`; `__call__` runs all, for
    init.

    `stacks` are the lengths of the runs of layers that are stored and scanned together (they sum to
    the depth and never cross `kinds`); None runs the layers one by one. `encode` runs the layers
    from `start` to before `stop`, which fall on ends of stacks.
    """

    cfg: Config
    stacks: tuple[int, ...] | None = None
    start: int = 0  # above 0, `encode` is given the hidden states of that layer for `input_ids`
    stop: int | None = None  # None: all, and the norm behind them

    @property
    def kinds(self) -> list[str]:
        """One word a layer; only equal neighbours can be scanned together."""
        return ["first" if self.cfg.modern and i == 0 else "rest" for i in range(self.cfg.depth)]

    def example(self) -> tuple[jax.Array, ...]:
        """The smallest arguments of `__call__`, for initialisation."""
        return (jnp.zeros((1, 8), jnp.int32),) * 4

    def setup(self):
        cfg = self.cfg
        self.embed = Embed(cfg)
        block = Block
        if cfg.remat != "none":
            block = nn.remat(Block, policy=REMAT[cfg.remat], prevent_cse=self.stacks is None)
        if self.stacks is None:
            for i, kind in enumerate(self.kinds):
                setattr(self, f"block_{i:02d}", block(cfg, kind == "first"))
        else:
            for name, (first, last) in trees.stack_names(self.stacks).items():
                scanned = nn.scan(
                    block,
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    in_axes=(0, nn.broadcast),
                    length=last - first + 1,
                )
                setattr(self, name, scanned(cfg, self.kinds[first] == "first"))
        if cfg.modern:
            self.norm = layers.LayerNorm(cfg.eps, False, DTYPES[cfg.dtype])
        self.head = Heads(cfg)

    def encode(
        self,
        input_ids: Int[Array, "B T"] | Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        token_types: Int[Array, "B T"],
        seeds: streams.Seeds | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states of the last layer that runs. `seeds` turn dropout on."""
        cfg, stop = self.cfg, self.cfg.depth if self.stop is None else self.stop
        if self.start:
            x = input_ids.astype(DTYPES[cfg.dtype])
        else:
            site = None if seeds is None else streams.fold(seeds, cfg.depth)
            x = self.embed(input_ids, positions, token_types, site)
        x = sharding.constrain_batch(x)
        local = mask(segment_ids, positions, cfg.window) if cfg.modern else None
        shared = (segment_ids, positions, mask(segment_ids, positions), local, seeds)
        index = np.arange(cfg.depth)
        layer = {"index": jnp.asarray(index), "full": jnp.asarray(index % cfg.full_every == 0)}
        if self.stacks is None:
            for i in range(self.start, stop):
                one = {key: value[i] for key, value in layer.items()}
                x, _ = getattr(self, f"block_{i:02d}")(x, one, shared)
        else:
            for name, (first, last) in trees.stack_names(self.stacks).items():
                if not self.start <= first < stop:
                    continue
                assert last < stop, f"layer {stop} is inside of {name}"
                run = {key: value[first : last + 1] for key, value in layer.items()}
                x, _ = getattr(self, name)(x, run, shared)
        return self.norm(x) if cfg.modern and self.stop is None else x

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Vocabulary logits in float32."""
        if not self.cfg.lm_head:
            raise ConfigError(
                "The model has no vocabulary head, as its config.objectives does not need one."
            )
        token = self.embed.token
        return self.head.mlm(hidden, token.table(), token.spec)

    def classify(
        self,
        hidden: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        name: str,
        pool: str = "first",
        seeds: streams.Seeds | None = None,
    ) -> Float[Array, "B C"]:
        """Outputs in float32 of the linear head `name` on the whole sequence: its first token,
        through the pooler if there is one, or the mean of its tokens. `seeds` turn dropout on."""
        return self.head.whole(hidden, segment_ids, name, pool, self._head_site(name, seeds))

    def project(
        self, hidden: Float[Array, "B T D"], name: str, seeds: streams.Seeds | None = None
    ) -> Float[Array, "B T C"]:
        """Outputs in float32 of the linear head `name` on every token. `seeds` turn dropout on."""
        return self.head.each(hidden, name, self._head_site(name, seeds))

    def _head_site(self, name: str, seeds: streams.Seeds | None) -> streams.Seeds | None:
        """The seeds of dropout before the head `name`, which the model must have."""
        if name not in dict(self.cfg.classes):
            raise ConfigError(
                f"The model has no head {name!r}: it was not trained with config.objectives."
                f"{name}." + did_you_mean(name, dict(self.cfg.classes))
            )
        return None if seeds is None else streams.fold(seeds, self.cfg.depth + 1)

    def __call__(self, input_ids, segment_ids, positions, token_types):
        hidden = self.encode(input_ids, segment_ids, positions, token_types)
        for name, _ in self.cfg.classes:
            if name in TOKEN_HEADS:
                self.project(hidden, name)
            else:
                self.classify(hidden, segment_ids, name)
        return self.logits(hidden[:, :1]) if self.cfg.lm_head else hidden
