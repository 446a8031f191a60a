"""Trials as the `get_sweep()` of a config puts them together, in the vocabulary of big_vision.

    from fmjax.experiments import sweep

    def get_sweep():
        return sweep.product(
            sweep.chain(
                sweep.fixed("arg", "head"),
                sweep.zip(sweep.fixed("arg", "lora"), sweep.grid("adapter.rank", (4, 16))),
            ),
            sweep.grid("seed", (0, 1, 2)),
        )

A trial is a dict of what it sets: keys of the config with dots between their parts, "arg", the
argument of `get_config`, and "group", the name under which results of several seeds are put
together where they differ in more. A sweep is a list of trials, so that Python's own lists work as
well.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fmjax.errors import ConfigError

Trial = dict[str, Any]
Draw = Callable[[np.random.Generator], Any]


def fixed(key: str, value: Any) -> list[Trial]:
    """One trial, with `key` set to `value`."""
    return [{key: value}]


def grid(key: str, values: Iterable[Any]) -> list[Trial]:
    """A trial for each of the `values`."""
    return [{key: value} for value in values]


def product(*sweeps: Sequence[Trial]) -> list[Trial]:
    """Every trial of each with every one of the others; the last varies fastest."""
    return [_joined(parts) for parts in itertools.product(*sweeps)]


def zip(*sweeps: Sequence[Trial]) -> list[Trial]:  # noqa: A001  (read as sweep.zip)
    """The first trials of all together, the second ones, and so on; one that is alone goes with
    each. Raises ConfigError for other lengths that differ."""
    longest = max(map(len, sweeps), default=0)
    if any(len(one) not in (1, longest) for one in sweeps):
        raise ConfigError(f"sweep.zip: the sweeps have {[len(one) for one in sweeps]} trials")
    rows = [one * longest if len(one) == 1 else one for one in map(list, sweeps)]
    return [_joined(parts) for parts in itertools.zip_longest(*rows)]


def chain(*sweeps: Sequence[Trial]) -> list[Trial]:
    """The trials of the first, then those of the second, and so on."""
    return list(itertools.chain(*sweeps))


def random(draws: Mapping[str, Any], count: int, seed: int = 0) -> list[Trial]:
    """At most `count` trials with each key drawn, those that were drawn before left out.

    The first trials stay the same where `count` grows. Raises ConfigError for a key that is given
    no draw.
    """
    if wrong := [key for key, draw in draws.items() if not callable(draw)]:
        raise ConfigError(
            f"sweep.random: {wrong[0]!r} is given {draws[wrong[0]]!r}, which is no draw such as "
            "sweep.choice(1, 2)"
        )
    rngs = {key: np.random.default_rng([seed, *key.encode()]) for key in draws}
    found = [{key: draw(rngs[key]) for key, draw in draws.items()} for _ in range(count)]
    return [trial for i, trial in enumerate(found) if trial not in found[:i]]


def uniform(low: float, high: float) -> Draw:
    """Evenly between the two."""
    return lambda rng: float(rng.uniform(low, high))


def log_uniform(low: float, high: float) -> Draw:
    """Evenly in the logarithm; three digits, as one would write it."""
    low, high = math.log(low), math.log(high)
    return lambda rng: float(f"{math.exp(rng.uniform(low, high)):.3g}")


def choice(*values: Any) -> Draw:
    """One of the values, each as likely."""
    return lambda rng: values[rng.integers(len(values))]


def _joined(parts: Iterable[Mapping[str, Any]]) -> Trial:
    whole: Trial = {}
    for part in parts:
        if twice := whole.keys() & part.keys():
            raise ConfigError(f"get_sweep: {sorted(twice)[0]!r} is set twice in one trial")
        whole |= part
    return whole
