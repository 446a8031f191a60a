"""Spikes: an update whose loss or gradient norm stands far above the last ones is left out.

The rule of OLMo-core's skip-step optimizers, with what it lacks mended: a number that is not finite
never enters the window, where one would make every later comparison false, and what is skipped is
selected, not multiplied by zero. A spike does enter the window. A single one passes; a loss that
has moved to another level is a spike four times at most, then the window knows the level: with n of
its 128 entries there, its standard deviation is √(f (1 - f)) of the distance, f = n/128, and at six
standard deviations that is enough from n = 4 on.

Off unless config.optim.skip_spikes says how many standard deviations: published recipes have no
such rule, and what is rare but right looks like a spike too. It is for long runs, where one bad
batch can cost days.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

WINDOW = 128  # numbers remembered; spikes are judged once half of it is filled


class Guarded(NamedTuple):
    """State of `guard`: the optimizer's own, and the last finite losses and gradient norms."""

    inner: Any
    losses: jax.Array  # float32[WINDOW], a ring
    norms: jax.Array  # float32[WINDOW]
    count: jax.Array  # int32, how many have been remembered
    spike: jax.Array  # bool, whether the last update was one


def guard(tx: optax.GradientTransformation, sigma: float) -> optax.GradientTransformationExtraArgs:
    """`tx`, whose state stays where it is on a spike: more than `sigma` standard deviations above
    the mean of the window, in the loss or in the norm of all gradients.

    `update` takes the loss as a keyword. Whoever applies the updates asks `spiked`.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        losses, norms = jnp.zeros(WINDOW, jnp.float32), jnp.zeros(WINDOW, jnp.float32)
        return Guarded(tx.init(params), losses, norms, jnp.zeros((), jnp.int32), jnp.array(False))

    def update(grads, state, params=None, *, loss, **extra):
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        known = jnp.minimum(state.count, WINDOW)
        high = _far_above(loss, state.losses, known, sigma)
        high |= _far_above(norm, state.norms, known, sigma)
        spike = finite & high & (known >= WINDOW // 2)
        updates, inner = tx.update(grads, state.inner, params, loss=loss, **extra)
        inner = jax.tree.map(lambda new, old: jnp.where(spike, old, new), inner, state.inner)
        place = state.count % WINDOW
        remember = lambda ring, x: ring.at[place].set(jnp.where(finite, x, ring[place]))
        return updates, Guarded(
            inner,
            remember(state.losses, loss),
            remember(state.norms, norm),
            state.count + finite,
            spike,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def spiked(opt_state: Any) -> jax.Array:
    """True if the update that gave this state was a spike; never without a guard."""
    return opt_state.spike if isinstance(opt_state, Guarded) else jnp.array(False)


def _far_above(x: jax.Array, ring: jax.Array, known: jax.Array, sigma: float) -> jax.Array:
    seen = jnp.arange(WINDOW) < known
    mean = jnp.sum(ring, where=seen) / jnp.maximum(known, 1)
    variance = jnp.sum(jnp.square(ring - mean), where=seen) / jnp.maximum(known - 1, 1)
    return x - mean > sigma * jnp.sqrt(variance)
