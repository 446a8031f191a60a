"""The training step: gradient over what trains, update, and nothing applied that is not finite."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fmjax import objectives as losses
from fmjax.params import groups
from fmjax.training import spike_skipping
from fmjax.training.state import TrainState

Batch = Mapping[str, jax.Array]


def make_train_step(
    apply: Callable,
    objectives: list[losses.Objective],
    tx: optax.GradientTransformationExtraArgs,
    split: Callable,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """`step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    metrics: "sums" {name: (sum, weight)}, "loss", "grad_norm" (of what trains, before clipping),
    "skipped" (1.0 when loss or gradient was not finite), "spike" (1.0 when they stood too far above
    the last ones), "units" (of the batch, without padding). After either of the two, parameters and
    optimizer stay what they were; the step still counts.
    """
    gradient = make_gradient(apply, objectives, split, accumulate)

    def train_step(state, batch):
        (loss, sums), grads = gradient(state, batch)
        trainable, frozen = split(state.params)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, trainable, loss=loss)
        spike = spike_skipping.spiked(
            opt_state
        )  # which keeps the optimizer itself; it remembers the spike
        moved = _where(finite & ~spike, optax.apply_updates(trainable, updates), trainable)
        moved = jax.lax.optimization_barrier(moved)  # else its first elements are made apart
        state = state.replace(
            step=state.step + 1,
            params=groups.merge(moved, frozen),
            opt_state=_where(finite & _written(moved), opt_state, state.opt_state),
        )
        return state, {
            "sums": sums,
            "loss": loss,
            "grad_norm": norm,
            "skipped": 1.0 - finite.astype(jnp.float32),
            "spike": spike.astype(jnp.float32),
            "units": jnp.sum(batch["units"]),
        }

    return train_step


def make_gradient(
    apply: Callable, objectives: list[losses.Objective], split: Callable, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[tuple[jax.Array, losses.Metrics], Any]]:
    """`gradient(state, batch) -> ((loss, sums), gradients)` over the trainable part only.

    Of objectives that are learnt one after the other the step decides which: one program has all.
    """
    cuts, phases = losses.phases(objectives)
    each = [_gradient(apply, learnt, split, accumulate) for learnt in phases]
    if not cuts:
        return each[0]

    def gradient(state, batch):
        told = {}
        for phase in each:
            told |= jax.eval_shape(phase, state, batch)[0][1]
        none = {
            name: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), x) for name, x in told.items()
        }

        def of(phase):
            def run(state, batch):
                (loss, sums), grads = phase(state, batch)
                return (loss, none | sums), grads

            return run

        place = jnp.searchsorted(jnp.asarray(cuts), state.step, side="right")
        return jax.lax.switch(place, [of(phase) for phase in each], state, batch)

    return gradient


def _gradient(
    apply: Callable, objectives: list[losses.Objective], split: Callable, accumulate: int
) -> Callable[[TrainState, Batch], tuple[tuple[jax.Array, losses.Metrics], Any]]:
    def gradient(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        trainable, frozen = split(state.params)

        def forward(trainable, part):
            params = groups.merge(trainable, frozen)
            return losses.metrics(objectives, apply, params, part, rng, True, state.step)

        def loss_fn(trainable, part, weights):
            found = forward(trainable, part)
            weights = weights or {name: weight for name, (_, weight) in found.items()}
            return losses.loss(objectives, found, weights), found

        part_gradient = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulate == 1:
            return part_gradient(trainable, batch, None)
        # Only the weights of this forward pass are used, and they do not depend on the parameters:
        # the compiler removes the pass.
        weights = {name: weight for name, (_, weight) in forward(trainable, batch).items()}
        return _accumulated(lambda part: part_gradient(trainable, part, weights), batch, accumulate)

    return gradient


def _accumulated(gradient: Callable, batch: Mapping[str, jax.Array], parts: int) -> Any:
    """The sum of `gradient(part)` over microbatches, one at a time in memory.

    Part i holds the rows i, i + parts, …, so that every device keeps the rows it has.
    """

    def cut(x):
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    micro = {name: cut(x) for name, x in batch.items()}
    first = jax.eval_shape(gradient, {name: x[0] for name, x in micro.items()})
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None)
    return jax.lax.scan(add, zero, micro)[0]


def _written(params: Any) -> jax.Array:
    """True; on a CPU known only once `params` are there.

    What waits for it may be written over what the parameters are made of. Without it XLA:CPU cannot
    tell which comes first, and copies the state of the optimizer at each step.
    """

    def there(params):
        first = [x[(0,) * x.ndim] for x in jax.tree.leaves(params)]
        return ~(jnp.max(jnp.stack(first)) > jnp.inf)  # nothing is, not even NaN

    return jax.lax.platform_dependent(params, cpu=there, default=lambda _: jnp.bool_(True))


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    """One of two trees. Selected, never multiplied: 0 * NaN is NaN."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
