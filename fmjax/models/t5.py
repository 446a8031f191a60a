"""Encoder–decoders as T5 has them (Raffel et al. 2020): relative positions, norms before.

    source -> embed -> block_00 … block_E-1 -> encoder_norm
    target -> embed -> block_E … block_L-1 -> norm -> vocabulary

One table embeds both. The layers of the encoder come first and those of the decoder, which also
look at what the encoder has made of the source, after them: `decode` follows `encode`. Pairs can
share a row: a target sees the source of its own segment. Letters: B batch, T and S times of source
and target, D width, N heads, H head size, V vocabulary, L depth, E depth of the encoder.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmjax.errors import ConfigError
from fmjax.models import layers, trunk
from fmjax.models.attention import attention, mask
from fmjax.params import randomness, sharding
from fmjax.params.precision import DTYPES

FACTS = ("vocab_size", "lm_head")  # arguments that follow from data and objectives


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; `VARIANTS` names the published ones."""

    vocab_size: int = 32128
    width: int = 512
    depth: int = 12  # layers of the encoder and of the decoder together
    encoder_depth: int = 0  # of these the encoder's; 0: half
    heads: int = 8
    head_size: int = 64
    mlp: int = 2048
    max_len: int = 512  # of source and of target in training; positions are relative
    buckets: int = 32  # of distances, half of them for one direction where there are two
    layer_distances: bool = False  # whether each layer has its own table of them
    far: int = 128  # distances from here on share the last bucket
    activation: str = "relu"
    gated: bool = False
    tied: bool = True  # the output to the embedding, with states times 1/√D
    eps: float = 1e-6
    start_id: int | None = None  # token before a target's first; None: the tokenizer's padding
    lm_head: bool = True  # whether tokens are predicted
    classes: tuple[tuple[str, int], ...] = ()  # linear heads on the encoder: (name, outputs)
    dropout: float = 0.1
    attention_dropout: float = 0.1
    # How it is computed, which changes no number
    dtype: str = "float32"
    attention: str = "auto"
    scan: bool = True
    remat: str = "none"


_GATED = dict(activation="gelu_tanh", gated=True, tied=False)  # T5 1.1 and Flan-T5
_SMALL = dict(depth=16, heads=6, mlp=1024)
_BASE = dict(depth=24, width=768, heads=12)
_LARGE = dict(depth=48, width=1024, heads=16)
VARIANTS: dict[str, dict[str, Any]] = {
    # Ours: the smallest that learns to translate within minutes on a CPU.
    "tiny": dict(depth=6, width=128, heads=4, head_size=32, mlp=512)
    | dict(dropout=0.0, attention_dropout=0.0),
    "small": {},
    "base": _BASE | dict(mlp=3072),
    "large": _LARGE | dict(mlp=4096),
    "v1_1_small": _GATED | _SMALL,
    "v1_1_base": _GATED | _BASE | dict(mlp=2048),
    "v1_1_large": _GATED | _LARGE | dict(mlp=2816),
    "v1_1_xl": _GATED | _LARGE | dict(width=2048, heads=32, mlp=5120),
    "v1_1_xxl": _GATED | _LARGE | dict(width=4096, heads=64, mlp=10240),
}


def Model(variant: str = "small", **overrides: Any) -> "EncoderDecoder":
    """The model of a named variant with fields replaced; `classes` may be a mapping.

    Raises ConfigError for an unknown variant, field or inconsistent size.
    """
    cfg = trunk.configured(Config, VARIANTS, variant, overrides)
    cfg = dataclasses.replace(cfg, encoder_depth=cfg.encoder_depth or cfg.depth // 2)
    trunk.check_config(cfg, taken=("lm",))
    if not 0 < cfg.encoder_depth < cfg.depth:
        raise ConfigError(
            f"config.model.encoder_depth={cfg.encoder_depth} of config.model.depth={cfg.depth} "
            f"layers: the encoder needs one at least, and so does the decoder."
        )
    if cfg.head_size < 1:
        raise ConfigError(f"config.model.head_size={cfg.head_size}: T5 has a size of its own.")
    if cfg.buckets < 4 or cfg.buckets % 4:
        raise ConfigError(
            f"config.model.buckets={cfg.buckets}: a multiple of 4, as half of them are of one "
            "direction, and half of these of single distances."
        )
    if cfg.far <= cfg.buckets // 2:
        raise ConfigError(
            f"config.model.far={cfg.far} is within the {cfg.buckets // 2} distances that have a "
            "bucket each: raise it above half of config.model.buckets."
        )
    return EncoderDecoder(cfg)


class Block(nn.Module):
    """One layer: attention, in a decoder ("decoder") attention to the source, and an MLP; a norm
    before each and a residual around them."""

    cfg: Config
    kind: str

    @nn.compact
    def __call__(self, x, layer, shared):
        cfg, dtype = self.cfg, DTYPES[self.cfg.dtype]
        seeds = (
            None if shared["seeds"] is None else randomness.fold(shared["seeds"], layer["index"])
        )
        site = lambda i: None if seeds is None else randomness.fold(seeds, i)
        mlp = layers.Mlp(
            cfg.mlp, cfg.activation, cfg.gated, False, dtype,
            nn.initializers.normal(cfg.mlp**-0.5),
            up_init=nn.initializers.normal(cfg.width**-0.5),
            dropout=cfg.dropout,
            name="mlp",
        )  # fmt: skip

        def residual(x, name, function, i):
            h = function(layers.RmsNorm(cfg.eps, 0.0, dtype, name=f"{name}_norm")(x))
            return x + layers.dropout(h, cfg.dropout, site(i))

        own = Attention(cfg, self.kind == "decoder", name="attn")
        bias = shared["bias"]
        if cfg.layer_distances:
            bias = distances(cfg, name="distance").bias(shared["bucket"])
        x = residual(x, "attn", lambda h: own(h, h, shared["may_see"], bias, shared, site(0)), 1)
        if self.kind == "decoder":
            cross = Attention(cfg, name="cross")
            source = shared["source"], shared["may_see_source"], None
            x = residual(x, "cross", lambda h: cross(h, *source, shared, site(2)), 3)
        x = residual(x, "mlp", lambda h: mlp(h, site(4)), 5)
        return sharding.constrain_batch(x), None


class Attention(nn.Module):
    """Multi-head attention of `x` to `source`; products of queries and keys are not scaled."""

    cfg: Config
    causal: bool = False

    @nn.compact
    def __call__(self, x, source, may_see, bias, shared, seeds):
        cfg, (batch, _, width) = self.cfg, x.shape
        inner = cfg.heads * cfg.head_size

        def make(name, features, inputs):
            init = nn.initializers.normal(inputs**-0.5)
            return layers.Linear(features, False, DTYPES[cfg.dtype], init, name=name)

        def projected(name, y, inputs=width):  # (B, N, T, H)
            heads = make(name, inner, inputs)(y).reshape(batch, -1, cfg.heads, cfg.head_size)
            return heads.swapaxes(1, 2)

        q = projected("query", x, width * cfg.head_size)
        memory = layers.Memory(fixed=bias is None, name="memory")
        if memory.fixed and memory.full():
            k, v = memory.kept()
        else:
            k, v = projected("key", source), projected("value", source)
        k, v, may_see = memory(k, v, may_see)
        if bias is not None:  # what an adapter puts in front has no place
            bias = jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(k.shape[2] - bias.shape[-1], 0)])
        out = attention(
            q, k, v, may_see,
            segment_ids=shared["segment_ids"],
            causal=self.causal,
            cross=bias is None,
            bias=bias,
            scale=1.0,
            dropout=cfg.attention_dropout,
            seeds=seeds,
            # Initialisation runs one short row, which no kernel takes.
            implementation="xla" if self.is_initializing() else cfg.attention,
        )  # fmt: skip
        return make("out", width, inner)(out.swapaxes(1, 2).reshape(batch, -1, inner))


class Distances(layers.Embedding):
    """The attention bias for the distance of two tokens, by head."""

    def bias(
        self, bucket: Int[Array, "T S"] | Int[Array, "B T S"]
    ) -> Float[Array, "N T S"] | Float[Array, "B N T S"]:
        """The rows of the tokens' buckets."""
        return jnp.moveaxis(self.table()[bucket], -1, bucket.ndim - 2)


def distances(cfg: Config, name: str | None = None) -> Distances:
    init = nn.initializers.normal(cfg.width**-0.5)
    return Distances(cfg.buckets, cfg.heads, init, name=name)


class Embed(nn.Module):
    """Token embeddings, and the distances that all layers of a trunk share."""

    cfg: Config

    def setup(self):
        cfg = self.cfg
        self.token = layers.Embedding(cfg.vocab_size, cfg.width, nn.initializers.normal(1.0))
        if not cfg.layer_distances:
            self.encoder_distance = distances(cfg)
            self.decoder_distance = distances(cfg)

    def __call__(self, input_ids, seeds):
        return self._dropped(self.token(input_ids), seeds)

    def target(self, input_ids, seeds):
        """Embeddings of the decoder's input tokens."""
        return self._dropped(self.token(input_ids, bare=True), seeds)

    def _dropped(self, x, seeds):
        return layers.dropout(x, self.cfg.dropout, seeds).astype(DTYPES[self.cfg.dtype])

    def distances(self, buckets: Int[Array, "T S"] | Int[Array, "B T S"], decoder: bool) -> dict:
        """`bucket`, or where all layers share it the `bias` that they make."""
        if self.cfg.layer_distances:
            return {"bucket": buckets, "bias": None}
        table = self.decoder_distance if decoder else self.encoder_distance
        return {"bias": table.bias(buckets)}


def row_buckets(cfg: Config, time: int, causal: bool) -> Int[Array, "T T"]:
    """Buckets of a row of `time` tokens. In a row the tokens of a segment are side by side, so that
    their columns are as far apart as their positions."""
    place = np.arange(time)
    return jnp.asarray(bucket(place - place[:, None], not causal, cfg.buckets, cfg.far))


def written_buckets(
    cfg: Config, positions: Int[Array, "B T"], keys: Int[Array, "B S"]
) -> Int[Array, "B T S"]:
    """Buckets of the tokens that a decoder writes, and of the earlier ones: keys of so many columns
    have no larger distances."""
    place = np.arange(keys.shape[1])
    found = jnp.asarray(bucket(-place, False, cfg.buckets, cfg.far))
    return found[jnp.clip(positions[:, :, None] - keys[:, None, :], 0, len(place) - 1)]


def bucket(distance: np.ndarray, both: bool, buckets: int, far: int) -> np.ndarray:
    """The buckets of distances, that of the key minus that of the query (§2.1): half of them of one
    distance each, the others of ranges that grow up to `far`. With `both` directions half of all
    are of keys after the query; otherwise these share the bucket of the query itself."""
    behind = np.zeros_like(distance)
    if both:
        buckets //= 2
        behind, distance = np.where(distance > 0, buckets, 0), np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    single = buckets // 2
    # In float32, as published tables were trained: a border is where this rounds it to.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(single))
    grown = ratio / np.float32(np.log(far / single)) * np.float32(buckets - single)
    ranges = np.minimum(single + grown.astype(np.int64), buckets - 1)
    return behind + np.where(distance < single, distance, ranges)


class Heads(trunk.Heads):
    """Linear heads on what the encoder gives, and the output matrix where it is not tied."""

    pool = "mean"

    def setup(self):
        super().setup()
        if self.cfg.lm_head and not self.cfg.tied:
            self.lm = trunk.Output(self.cfg, self.cfg.width**-0.5)


class EncoderDecoder(trunk.Trunk):
    """The two trunks and the heads."""

    block = Block
    decodes = True
    heads = Heads

    @property
    def kinds(self):
        encoder = self.cfg.encoder_depth
        return ["encoder"] * encoder + ["decoder"] * (self.cfg.depth - encoder)

    @property
    def encoded(self):
        return self.cfg.encoder_depth

    def setup(self):
        cfg = self.cfg
        self.embed = Embed(cfg)
        self.seen = layers.Seen()
        self.make_layers()
        self.encoder_norm = layers.RmsNorm(cfg.eps, 0.0, DTYPES[cfg.dtype])
        self.norm = layers.RmsNorm(cfg.eps, 0.0, DTYPES[cfg.dtype])
        self.head = self.heads(cfg)

    def encode(
        self,
        input_ids: Int[Array, "B T"] | Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        token_types: Int[Array, "B T"],
        seeds: randomness.Seeds | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states of the encoder's last layer that runs; `token_types` are not used. `seeds`
        turn dropout on."""
        cfg, time = self.cfg, input_ids.shape[1]
        if self.start:
            x = input_ids.astype(DTYPES[cfg.dtype])
        else:
            x = self.embed(input_ids, self._site(seeds, 0))
        shared = dict(
            segment_ids=segment_ids,
            may_see=mask(segment_ids, positions),
            seeds=seeds,
            **self.embed.distances(row_buckets(cfg, time, causal=False), decoder=False),
        )
        x = self._run(x, shared, 0, cfg.encoder_depth)
        if self.stop is not None:
            return x
        return layers.dropout(self.encoder_norm(x), cfg.dropout, self._site(seeds, 2))

    def decode(
        self,
        input_ids: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        source: Float[Array, "B T D"] | None,
        source_segment_ids: Int[Array, "B T"],
        seeds: randomness.Seeds | None = None,
    ) -> Float[Array, "B S D"]:
        """Hidden states of the decoder's last layer, as the vocabulary takes them: each of the
        tokens `input_ids` with those before it, and of what `encode` gave as `source` with the
        tokens of its segment. `seeds` turn dropout on. What earlier calls were given is before the
        tokens where it is kept (`layers.CACHE`), and the source is theirs: then it may be None."""
        cfg = self.cfg
        keys = self.seen(segment_ids, positions)
        if keys[0] is segment_ids:
            buckets = row_buckets(cfg, input_ids.shape[1], causal=True)
        else:
            buckets = written_buckets(cfg, positions, keys[1])
        same = segment_ids[:, :, None] == source_segment_ids[:, None, :]
        shared = dict(
            segment_ids=segment_ids,
            may_see=mask(segment_ids, positions, causal=True, keys=keys),
            may_see_source=(same & (source_segment_ids > 0)[:, None])[:, None],
            source=source,
            seeds=seeds,
            **self.embed.distances(buckets, decoder=True),
        )
        x = self.embed.target(input_ids, self._site(seeds, 1))
        x = self._run(x, shared, cfg.encoder_depth, cfg.depth)
        x = layers.dropout(self.norm(x), cfg.dropout, self._site(seeds, 3))
        return x * jnp.asarray(cfg.width**-0.5, x.dtype) if cfg.tied else x

    def _run(self, x, shared, first, last):
        layer = {"index": jnp.asarray(np.arange(self.cfg.depth))}
        return self.run_layers(sharding.constrain_batch(x), layer, shared, first, last)

    def _site(self, seeds, i):
        """Seeds of the dropout outside of layers and heads."""
        return None if seeds is None else randomness.fold(seeds, self.cfg.depth + 2 + i)

    def vocabulary(self) -> trunk.Vocabulary:
        """The matrix that `logits` multiplies with."""
        self.need_vocabulary()
        if not self.cfg.tied:
            return self.head.lm()
        token = self.embed.token
        return trunk.Vocabulary(token.table(), True, token.spec, DTYPES[self.cfg.dtype])
