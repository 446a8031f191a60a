"""The trunk that the families share: layers that run one by one or in stacks, and heads on them.

A family's model is a `Trunk` with a `Block` of its own; its file says what comes before the layers,
what each is told, and what comes after.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fmjax.errors import ConfigError, did_you_mean
from fmjax.models import TOKEN_HEADS, experts, layers, text_pooling
from fmjax.params import paths, precision, randomness, sharding
from fmjax.params.precision import DTYPES

REMAT = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Vocabulary(NamedTuple):
    """The matrix between hidden states and logits."""

    kernel: Float[Array, "V D"] | Float[Array, "D V"] | precision.Rows
    out_in: bool  # which of the two
    spec: P  # layout on the mesh
    dtype: DTypeLike  # of the product's operands
    softcap: float = 0.0  # of the logits: c tanh(logit / c); 0: none

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """In float32."""
        logits = precision.linear(hidden, self.kernel, self.dtype, self.out_in, self.spec)
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits


class Output(nn.Module):
    """The matrix of an output that is not tied to the embedding."""

    cfg: Any
    deviation: float = 0.02  # of its elements at first

    @nn.compact
    def __call__(self) -> Vocabulary:
        shape = self.cfg.width, self.cfg.vocab_size
        initial = nn.initializers.normal(self.deviation)
        kernel = layers.matrix(self, "kernel", initial, shape)
        spec = sharding.spec_of("/".join((*self.path, "kernel")))
        return Vocabulary(kernel, False, spec, DTYPES[self.cfg.dtype])


class Heads(nn.Module):
    """Linear heads on hidden states: of the whole sequence, or of each token."""

    cfg: Any
    pool = "first"  # what stands for the whole where nothing is said

    def setup(self):
        for name, features in self.cfg.classes:
            setattr(self, name, self.linear(name, features))

    def linear(self, name: str, features: int) -> nn.Module:
        """The head `name`."""
        return layers.Linear(features, dtype=DTYPES[self.cfg.dtype])

    def summary(self, hidden, segment_ids, pool):
        """The vector of the whole sequence."""
        return text_pooling.pooled(hidden, segment_ids, pool)

    def whole(self, hidden, segment_ids, name, pool, seeds):
        pool = pool or getattr(self.cfg, "pool", "") or self.pool
        return self.each(self.summary(hidden, segment_ids, pool), name, seeds)

    def tokens(self, hidden, name, seeds):
        return self.each(hidden, name, seeds)

    def each(self, hidden, name, seeds):
        return getattr(self, name)(layers.dropout(hidden, self.cfg.dropout, seeds), jnp.float32)


class CausalHeads(Heads):
    """Heads of models whose last token alone has seen the whole; they have no bias, as in
    transformers."""

    pool = "last"

    def linear(self, name, features):
        return layers.Linear(features, name in TOKEN_HEADS, DTYPES[self.cfg.dtype])


class DecoderHeads(CausalHeads):
    """Linear heads, and the output matrix where it is not tied."""

    def setup(self):
        super().setup()
        if self.cfg.lm_head and not self.cfg.tied:
            self.lm = Output(self.cfg)


class Trunk(nn.Module):
    """Layers and heads: `encode`, `logits`, `classify`, `project`; `__call__` runs all, for init.

    Of an encoder–decoder, `decode` makes of a target and what `encode` gave the states that
    `logits` takes.

    `stacks` are the lengths of the runs of layers that are stored and scanned together (they sum to
    the depth and never cross `kinds`); None runs the layers one by one. `encode` runs the layers
    from `start` to before `stop`, which fall on ends of stacks.
    """

    cfg: Any
    stacks: tuple[int, ...] | None = None
    start: int = 0  # above 0, `encode` is given the hidden states of that layer for `input_ids`
    stop: int | None = None  # None: all, and the norm after them
    causal = False  # whether a token sees only what is before it
    decodes = False  # whether a decoder follows the encoder
    inputs = ("input_ids", "segment_ids", "positions", "token_types")  # of `encode`
    block: ClassVar[type[nn.Module]]  # of one layer
    endless = True  # whether it can be run on positions that no training text had
    heads = Heads  # its linear ones

    @property
    def kinds(self) -> list[str]:
        """One word a layer; only equal neighbours can be scanned together."""
        return ["block"] * self.cfg.depth

    @property
    def encoded(self) -> int:
        """Number of layers, from the first on, that `encode` runs."""
        return self.cfg.depth

    def example(self) -> tuple[jax.Array, ...]:
        """The smallest arguments of `__call__`, for initialisation."""
        return (jnp.zeros((1, 8), jnp.int32),) * 4

    def make_layers(self) -> None:
        """Makes the layers, `block(cfg, kind)` each; for `setup`."""
        cfg, block = self.cfg, self.block
        if cfg.remat != "none":
            block = nn.remat(block, policy=REMAT[cfg.remat], prevent_cse=self.stacks is None)
        if self.stacks is None:
            for i, kind in enumerate(self.kinds):
                setattr(self, f"block_{i:02d}", block(cfg, kind))
            return
        for name, (first, last) in paths.stack_names(self.stacks).items():
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, experts.COLLECTION: 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=last - first + 1,
            )
            setattr(self, name, scanned(cfg, self.kinds[first]))

    def run_layers(
        self,
        x: Float[Array, "B T D"],
        layer: Mapping[str, jax.Array],
        shared: Any,
        first: int = 0,
        last: int | None = None,
    ) -> Float[Array, "B T D"]:
        """The states after the layers from `first` to before `last` (None: all) of those that run,
        each called as `block(x, its row of layer, shared)`."""
        stop = min(end for end in (self.cfg.depth, self.stop, last) if end is not None)
        start = max(self.start, first)
        if self.stacks is None:
            for i in range(start, stop):
                one = {key: value[i] for key, value in layer.items()}
                x, _ = getattr(self, f"block_{i:02d}")(x, one, shared)
            return x
        for name, (low, high) in paths.stack_names(self.stacks).items():
            if not start <= low < stop:
                continue
            assert high < stop, f"layer {stop} is inside of {name}"
            run = {key: value[low : high + 1] for key, value in layer.items()}
            x, _ = getattr(self, name)(x, run, shared)
        return x

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Vocabulary logits in float32."""
        return self.vocabulary().logits(hidden)

    def need_vocabulary(self) -> None:
        """Raises ConfigError for a model that predicts no tokens."""
        if not self.cfg.lm_head:
            raise ConfigError(
                "The model has no vocabulary head, as its config.objectives does not need one."
            )

    def classify(
        self,
        hidden: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        name: str,
        pool: str = "",
        seeds: randomness.Seeds | None = None,
    ) -> Float[Array, "B C"]:
        """Outputs in float32 of the linear head `name` on the whole sequence, of which `pool` says
        what stands for it (`text_pooling.pooled`; "" is the family's own). Without `segment_ids` no
        position is padding. `seeds` turn dropout on."""
        return self.head.whole(hidden, segment_ids, name, pool, self._head_site(name, seeds))

    def project(
        self, hidden: Float[Array, "B T D"], name: str, seeds: randomness.Seeds | None = None
    ) -> Float[Array, "B T C"]:
        """Outputs in float32 of the linear head `name` on every token. `seeds` turn dropout on."""
        return self.head.tokens(hidden, name, self._head_site(name, seeds))

    def _head_site(self, name: str, seeds: randomness.Seeds | None) -> randomness.Seeds | None:
        """The seeds of dropout before the head `name`, which the model must have."""
        if name not in dict(self.cfg.classes):
            raise ConfigError(
                f"The model has no head {name!r}: it was not trained with config.objectives."
                f"{name}." + did_you_mean(name, dict(self.cfg.classes))
            )
        return None if seeds is None else randomness.fold(seeds, self.cfg.depth + 1)

    def __call__(self, *args):
        hidden = self.encode(*args)
        segment_ids = dict(zip(self.inputs, args, strict=True)).get("segment_ids")
        for name, _ in self.cfg.classes:
            if name in TOKEN_HEADS:
                self.project(hidden, name)
            else:
                self.classify(hidden, segment_ids, name)
        if self.decodes:
            hidden = self.decode(*args[:3], hidden, segment_ids)
        return self.logits(hidden[:, :1]) if self.cfg.lm_head else hidden


def check_config(cfg: Any, taken: Sequence[str] = ()) -> None:
    """Raise ConfigError for settings that no family can have: names of heads that are `taken`, an
    unknown way to compute.

    Raises ConfigError.
    """
    if cfg.width % cfg.heads and not getattr(cfg, "head_size", 0):
        raise ConfigError(
            f"config.model.heads={cfg.heads} does not divide config.model.width={cfg.width}."
        )
    for name, _ in cfg.classes:
        if not name.isidentifier() or name in (*taken, *dir(Heads(cfg))):
            raise ConfigError(f"classes: {name!r} cannot be the name of a head; use another word.")
    for key, table in (("dtype", DTYPES), ("remat", REMAT)):
        if getattr(cfg, key) not in table:
            raise ConfigError(
                f"config.model.{key}={getattr(cfg, key)!r} is not known."
                + did_you_mean(getattr(cfg, key), table)
            )


def configured(
    config: type, variants: Mapping[str, Mapping[str, Any]], variant: str, overrides: dict
) -> Any:
    """A `config` of a named variant with fields replaced; a mapping or a list becomes a tuple.

    Raises ConfigError for an unknown variant or field.
    """
    if variant not in variants:
        raise ConfigError(
            f"config.model.variant={variant!r} is not known." + did_you_mean(variant, variants)
        )
    fields = config.__dataclass_fields__
    for key in overrides.keys() - fields.keys():
        raise ConfigError(f"config.model.{key} is not known." + did_you_mean(key, fields))
    given = {key: _hashable(value) for key, value in overrides.items()}
    return config(**{**variants[variant], **given})


def _hashable(value: Any) -> Any:
    """Pairs for a mapping, and tuples for the lists that JSON makes of them."""
    if isinstance(value, Mapping):
        value = list(value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
