"""The training step: gradient over what trains, update, and nothing applied that is not finite."""

import functools
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
    single = [objective for objective in objectives if not objective.whole_batch]
    whole = [objective for objective in objectives if objective.whole_batch]

    def gradient(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        trainable, frozen = split(state.params)
        merged = lambda trainable: groups.merge(trainable, frozen)

        def metrics(trainable, part, compared=True):
            params = merged(trainable)
            return losses.metrics(objectives, apply, params, part, rng, True, state.step, compared)

        def loss_fn(trainable, batch):
            found = metrics(trainable, batch)
            weights = {name: weight for name, (_, weight) in found.items()}
            return losses.loss(objectives, found, weights), found

        if accumulate == 1:
            return jax.value_and_grad(loss_fn, has_aux=True)(trainable, batch)
        # Only the weights of this forward pass are used, and they do not depend on the parameters:
        # the compiler removes the pass.
        weights = {name: weight for name, (_, weight) in metrics(trainable, batch).items()}

        def part_loss(trainable, part):
            found = metrics(trainable, part, compared=False)
            return losses.loss(single, found, weights), found

        def features(trainable, part):
            return losses.features(objectives, apply, merged(trainable), part, rng, state.step)

        def compared_loss(found):
            metrics = losses.compare(objectives, found, batch, rng, state.step)
            return losses.loss(whole, metrics, weights), metrics

        results = []
        if single:
            of_part = functools.partial(jax.value_and_grad(part_loss, has_aux=True), trainable)
            results.append(_accumulated(of_part, batch, accumulate))
        if whole:
            results.append(_feature_cached(features, compared_loss, trainable, batch, accumulate))
        return functools.reduce(_both, results)

    return gradient


def _both(one: Any, other: Any) -> Any:
    """The sum of two results of `value_and_grad`, with the metrics of both."""
    (loss, metrics), grads = one
    (more, others), other_grads = other
    return (loss + more, {**metrics, **others}), jax.tree.map(jnp.add, grads, other_grads)


def _feature_cached(
    features: Callable, compared: Callable, params: Any, batch: Batch, parts: int
) -> tuple[tuple[jax.Array, losses.Metrics], Any]:
    """As `value_and_grad` of `compared(features(params, batch))`, with one microbatch at a time in
    memory: features of all are made first, their gradient is taken, and then that of the parameters
    microbatch by microbatch (Gao et al. 2021, §3.2)."""
    micro = _microbatches(batch, parts)
    each = jax.lax.map(lambda part: features(params, part), micro)
    whole = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), each)
    result, towards = jax.value_and_grad(compared, has_aux=True)(whole)

    def pull(total, one):
        part, toward = one
        _, back = jax.vjp(lambda params: features(params, part), params)
        return jax.tree.map(jnp.add, total, back(toward)[0]), None

    zero = jax.tree.map(jnp.zeros_like, params)
    return result, jax.lax.scan(pull, zero, (micro, _microbatches(towards, parts)))[0]


def _accumulated(gradient: Callable, batch: Mapping[str, jax.Array], parts: int) -> Any:
    """The sum of `gradient(part)` over microbatches, one at a time in memory."""
    micro = _microbatches(batch, parts)
    first = jax.eval_shape(gradient, {name: x[0] for name, x in micro.items()})
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None)
    return jax.lax.scan(add, zero, micro)[0]


def _microbatches(tree: Any, parts: int) -> Any:
    """[parts, B / parts, …] of arrays [B, …]: part i has the rows i, i + parts, …, so that every
    device keeps the rows it has."""
    cut = lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return jax.tree.map(cut, tree)


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
