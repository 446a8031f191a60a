"""The next token of a text, of the logits that a model gives."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fmjax.errors import ConfigError
from fmjax.params import randomness

FEW = 256  # tokens that mostly have what top_p asks for
NONE = jnp.finfo(jnp.float32).min  # logit of a token that cannot be drawn


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings; `temperature` 0 takes the most probable token, and the first of equal
    ones.

    What is left to draw from is cut in this order, each from what the one before has left.
    """

    temperature: float = 1.0
    top_k: int | None = None  # the k most probable (Fan et al. 2018); None: all
    top_p: float = 1.0  # the fewest most probable of this probability (Holtzman et al. 2020)
    min_p: float = 0.0  # as likely as this share of the most probable (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # above 1, against tokens of the text (Keskar et al. 2019)

    def __post_init__(self):
        possible = {
            "temperature": (self.temperature >= 0, "a number from 0, the likeliest token"),
            "top_k": (self.top_k is None or self.top_k >= 1, "a whole number from 1, or None"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1, which leaves all"),
            "min_p": (0 <= self.min_p <= 1, "from 0, which leaves all, to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1 changes nothing"),
        }
        for name, (fits, words) in possible.items():
            if not fits:
                raise ConfigError(f"config.{name}={getattr(self, name)!r}: give {words}.")

    @property
    def draws(self) -> bool:
        """True if a text depends on the seed."""
        return self.temperature > 0 and self.top_k != 1

    @property
    def remembers(self) -> bool:
        """True if the tokens written so far matter."""
        return self.repetition_penalty != 1


def chosen(
    logits: Float[Array, "B V"],
    how: Sampling,
    seeds: randomness.Seeds,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """A token of each row, drawn by the seed of the row; `seen` are the tokens of its text."""
    logits = left(logits, how, seen)
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return drawn(logits, seeds)


def left(
    logits: Float[Array, "B V"], how: Sampling, seen: Bool[Array, "B V"] | None = None
) -> Float[Array, "B V"]:
    """The logits that tokens are drawn by: `NONE` where one cannot be."""
    if how.remembers:
        penalised = jnp.where(
            logits < 0, logits * how.repetition_penalty, logits / how.repetition_penalty
        )
        logits = jnp.where(seen, penalised, logits)
    if how.temperature == 0:
        return logits
    logits = logits / how.temperature
    if how.top_k and how.top_k < logits.shape[-1]:
        # The last of them by jnp.min: for a slice of them XLA sorts the whole vocabulary.
        least = jnp.min(jax.lax.top_k(logits, how.top_k)[0], axis=-1, keepdims=True)
        logits = jnp.where(logits < least, NONE, logits)
    if how.top_p < 1:
        p = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(p < _least(p, how.top_p), NONE, logits)
    if how.min_p > 0:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(how.min_p)
        logits = jnp.where(logits < least, NONE, logits)
    return logits


def _least(p: Float[Array, "B V"], share: float) -> Float[Array, "B 1"]:
    """The least of the fewest most probable that have the share of the probability. These are
    mostly few; where they are not it is found by halving an interval, as a vocabulary is long to
    sort."""
    few = jax.lax.top_k(p, min(FEW, p.shape[-1]))[0]
    sums = jnp.cumsum(few, axis=-1)

    def of_few():
        short = jnp.sum((sums < share).astype(jnp.int32), axis=-1, keepdims=True)
        return jnp.take_along_axis(few, jnp.minimum(short, few.shape[-1] - 1), axis=-1)

    def halved(_, ends):
        # Above `low` is the share, above `high` is not.
        low, high = ends
        middle = (low + high) / 2
        enough = jnp.sum(jnp.where(p > middle, p, 0), axis=-1, keepdims=True) >= share
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    def of_all():
        ends = jnp.zeros((len(p), 1)), jnp.max(p, axis=-1, keepdims=True)
        low, _ = jax.lax.fori_loop(0, 40, halved, ends)
        return jnp.min(jnp.where(p > low, p, jnp.inf), axis=-1, keepdims=True)

    return jax.lax.cond(jnp.all(sums[:, -1] >= share), of_few, of_all)


def drawn(logits: Float[Array, "B V"], seeds: randomness.Seeds) -> Int[Array, "B"]:
    """By one uniform number a row: the first token up to which the probability exceeds it.

    Sums are of blocks of 256 tokens first, which a CPU has sooner than a sum along all.
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(logits == NONE, 0, weights)
    rows, size = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -size % 256))).reshape(rows, -1, 256)
    ends = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    goal = randomness.uniform(seeds, ())[:, None] * ends[:, -1:]
    block = jnp.argmax(ends > goal, axis=-1)
    before = jnp.where(block > 0, jnp.take_along_axis(ends, block[:, None] - 1, 1)[:, 0], 0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    sums = before[:, None] + jnp.cumsum(inside, axis=-1)
    # Rounding may leave the goal after all of the block: then its last that can be drawn.
    past = (sums > goal) & (inside > 0)
    last = 255 - jnp.argmax((inside > 0)[:, ::-1], axis=-1)
    place = jnp.where(jnp.any(past, axis=-1), jnp.argmax(past, axis=-1), last)
    return (256 * block + place).astype(jnp.int32)
