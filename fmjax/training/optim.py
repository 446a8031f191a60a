"""Optimizers, schedules, and the moving average of parameters.

Every group of fmjax/params/groups.py that trains has its own optimizer under one
`optax.multi_transform`.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from fmjax.config import rules
from fmjax.errors import ConfigError, did_you_mean
from fmjax.params import paths
from fmjax.training import spike_skipping

# Parameters that an optimizer is tried on before a run is built with it.
PROBE = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}


def schedule(
    name: str,
    *,
    lr: float | jax.Array,
    warmup: int,
    total: int,
    decay: int,
    end: float,
    delay: int = 0,
) -> Callable[[jax.Array | int], jax.Array | float]:
    """Learning rate as a function of the step: linear warm-up to `lr`, then the named shape down to
    `end * lr`.

    "wsd" (warm-up, stable, decay) falls linearly over the last `decay` steps; "rsqrt" follows
    √(warmup / step), as in Vaswani et al. 2017 (§5.3), with the same linear cool-down at the end.
    All of it begins after `delay` steps, in which the rate is 0: groups that start one after the
    other are gradual unfreezing (Howard and Ruder 2018, §3.3).
    """
    if name not in rules.SCHEDULES:
        raise ConfigError(
            f"config.optim.schedule={name!r} is not known." + did_you_mean(name, rules.SCHEDULES)
        )
    for key, length in (("warmup", warmup), ("cooldown", decay), ("delay", delay)):
        if length > total:
            raise ConfigError(f"config.optim.{key} is {length} steps, more than the run's {total}.")
    # As floats, since arithmetic with integers of more than 31 bits overflows.
    warmup, total, decay = float(warmup), float(total - delay), float(decay)

    def rate(step):
        # For the log, which asks with Python numbers, in numpy: no device waits for it.
        xp = jnp if isinstance(step, jax.Array) else np
        step = xp.asarray(step, xp.float32) - float(delay)
        # Step 0 already moves: the first update uses lr / warmup.
        rising = xp.minimum(1.0, (step + 1) / max(warmup, 1))
        done = xp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
        cooling = xp.clip((total - step) / max(decay, 1), 0.0, 1.0)
        cooled = end + (1 - end) * cooling if decay else 1.0
        shape = {
            "constant": 1.0,
            "linear": end + (1 - end) * (1 - done),
            "cosine": end + (1 - end) * 0.5 * (1 + xp.cos(np.pi * done)),
            "rsqrt": xp.sqrt(max(warmup, 1) / xp.maximum(step + 1, max(warmup, 1))) * cooled,
            "wsd": cooled,
        }[name]
        return lr * rising * shape * (step >= 0) if delay else lr * rising * shape

    return rate


class Optimizer(NamedTuple):
    """`tx` over the trainable tree; `rates` are the learning rates of the groups, for the log."""

    tx: optax.GradientTransformationExtraArgs  # `update` takes the loss as a keyword
    rates: dict[str, Callable[[jax.Array], jax.Array]]


def make(
    trainable: Any,
    assigned: Mapping[str, str],
    *,
    steps: Callable[[Any], int],
    depths: Mapping[str, int],
    optim: Mapping[str, Any],
    group_optim: Mapping[str, Mapping[str, Any]],
) -> Optimizer:
    """The optimizer of a run.

    Args:
        trainable: stored tree of ShapeDtypeStructs or arrays, the part that `groups.split` calls
            trainable.
        assigned: {parameter name: group}.
        steps: converts a duration ("10%", "2 epochs") to steps; `steps("100%")` is the whole run.
        depths: {prefix of a trunk: number of its layers}, for `layer_decay`.
        optim: `config.optim`; group_optim: what a group sets differently.
    """
    optim = dict(optim)
    clip, ema = optim.pop("clip"), optim.pop("ema")
    layer_decay, sigma = optim.pop("layer_decay"), optim.pop("skip_spikes")
    transforms, rates, labels = {}, {}, {}
    for path, leaf in paths.flatten(trainable).items():
        group = assigned[paths.names(path)[0]]
        length = leaf.shape[0] if paths.is_stacked(path) else 0
        labels[path] = f"{group}:{length}"
        if group not in rates:
            settings = {**optim, **group_optim.get(group, {})}
            rates[group] = schedule(
                settings["schedule"],
                lr=settings["lr"],
                warmup=steps(settings["warmup"]),
                total=steps("100%"),
                decay=steps(settings["cooldown"]),
                end=settings["end"],
                delay=steps(settings["delay"]),
            )
        if labels[path] not in transforms:
            settings = {**optim, **group_optim.get(group, {})}
            section = f"group_optim.{group}" if group in group_optim else "optim"
            tx = _named(section, settings, rates[group])
            transforms[labels[path]] = _per_layer(tx) if length else tx
    parts = [optax.multi_transform(transforms, paths.unflatten(labels))]
    if clip:
        parts.insert(0, optax.clip_by_global_norm(clip))
    if layer_decay != 1.0:
        parts.append(_scale(_layerwise(trainable, layer_decay, depths)))
    if ema:
        parts.append(moving_average(ema))
    tx = optax.with_extra_args_support(optax.chain(*parts))
    return Optimizer(spike_skipping.guard(tx, sigma) if sigma else tx, rates)


class MovingAverage(NamedTuple):
    """State of `moving_average`: the averaged trainable parameters."""

    average: Any
    count: jax.Array


def moving_average(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential average of the parameters after each update; must be the last link of a
    chain.

    The decay rises as (1 + n) / (10 + n), so that the start is forgotten quickly.
    """

    def init(params):
        # A copy: the average must not share a buffer with the parameters, which are donated.
        return MovingAverage(jax.tree.map(jnp.array, params), jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        rate = jnp.minimum(decay, (1 + state.count) / (10 + state.count)).astype(jnp.float32)
        average = jax.tree.map(
            lambda a, p, u: rate * a + (1 - rate) * (p + u), state.average, params, updates
        )
        return updates, MovingAverage(average, state.count + 1)

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any) -> Any | None:
    """The averaged trainable parameters in an optimizer state, or None."""
    is_average = lambda x: isinstance(x, MovingAverage)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(x)]
    return found[0].average if found else None


def _named(
    section: str, settings: Mapping[str, Any], rate: Callable
) -> optax.GradientTransformation:
    """An optax optimizer by name, with weight decay masked to the parameters that `decay` matches.

    Raises ConfigError, naming keys of `config.<section>`, for one that cannot be made or applied.
    """
    name, args = settings["name"], dict(settings["args"])
    factory = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    takes = inspect.signature(factory).parameters if callable(factory) else {}
    if "learning_rate" not in takes:
        known = ("adamw", "lamb", "lion", "adafactor", "muon", "sgd", "adam", "nadamw", "adan")
        raise ConfigError(
            f"config.{section}.name={name!r} is not an optimizer of optax."
            + did_you_mean(name, known)
        )
    for key in args:
        if key not in takes:
            raise ConfigError(
                f"config.{section}.args.{key} is not known to config.{section}.name={name!r}."
                + did_you_mean(key, takes)
            )
    # Not Adafactor's weight_decay_rate, which takes its share at every step whatever the rate is.
    if "weight_decay" in takes:
        args["weight_decay"] = settings["weight_decay"]
        mask = next((key for key in ("mask", "weight_decay_mask") if key in takes), None)
        if mask:
            args[mask] = functools.partial(_matching, settings["decay"])
    elif settings["weight_decay"]:
        raise ConfigError(
            f"config.{section}.name={name!r} has no weight decay: set "
            f"config.{section}.weight_decay=0 or choose adamw."
        )
    try:
        tx = factory(learning_rate=rate, **args)
        jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), PROBE)
    except Exception as error:  # whatever optax and jax raise for values that they cannot use
        raise ConfigError(
            f"config.{section}.name={name!r} does not work with config.{section}.args="
            f"{settings['args']!r}: {' '.join(str(error).split())[:200]}"
        ) from error
    return tx


def _matching(pattern: str, params: Any) -> Any:
    """True where a parameter's name matches, in the shape of a (masked) stored tree."""

    def matches(path, _):
        names = paths.names("/".join(str(key.key) for key in path))
        found = {re.fullmatch(pattern, name) is not None for name in names}
        assert len(found) == 1, f"{names} are stacked, but {pattern!r} matches only some"
        return found.pop()

    return jax.tree_util.tree_map_with_path(matches, params)


def _per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on stacked leaves as if each layer were a leaf of its own (LAMB's and Muon's norms are
    per matrix)."""
    return optax.GradientTransformation(
        jax.vmap(tx.init),
        lambda updates, state, params: jax.vmap(tx.update)(updates, state, params),
    )


def _layerwise(trainable: Any, decay: float, depths: Mapping[str, int]) -> Any:
    """Factors decay^(depth + 1 - position) in each trunk: embeddings 0, block i at i + 1, heads
    depth + 1; 1 for what is of no trunk."""

    def factor(name):
        within = [trunk for trunk in depths if name.startswith(trunk)]
        if not within:
            return 1.0
        trunk = max(within, key=len)
        depth, place = depths[trunk], paths.layer(name)
        embeds = name.startswith(f"{trunk}embed/")
        position = place.index + 1 if place else 0 if embeds else depth + 1
        return decay ** (depth + 1 - position)

    def of_leaf(path, leaf):
        factors = [factor(name) for name in paths.names(path)]
        if not paths.is_stacked(path):
            return jnp.float32(factors[0])
        return jnp.asarray(factors, jnp.float32).reshape(-1, *[1] * (len(leaf.shape) - 1))

    return paths.map_names(of_leaf, trainable)


def _scale(factors: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))
