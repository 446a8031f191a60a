"""Groups of parameters by name: which train, and which are frozen.

Groups are ordered (regex over parameter names, group name); the first full match wins and an
uncovered parameter is an error. Layers are numbered from the front, `block_00`, and from the back:
`block_-1` is the last, of each trunk (`image/block_-1`). "freeze" does not train: its parameters
are split off before the gradient is taken, so they cost neither a weight gradient nor optimizer
memory.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fmjax.errors import ConfigError, did_you_mean
from fmjax.params import paths

FREEZE = "freeze"


def assign(names: Sequence[str], groups: Sequence[tuple[str, str]]) -> dict[str, str]:
    """{parameter name: group}, first full match wins; a layer's parameters have two names.

    Raises ConfigError for an uncovered parameter, a pattern that decides nothing, or when nothing
    trains.
    """
    assigned, used = {}, set()
    depths = paths.depths(names)
    for name in names:
        both = [name]
        if place := paths.layer(name):
            from_last = place.index - depths[place.trunk]
            both.append(f"{place.trunk}block_{from_last}/{place.rest}")
        matches = lambda p, both=both: any(re.fullmatch(p, one) for one in both)
        match = next((i for i, (p, _) in enumerate(groups) if matches(p)), None)
        if match is None:
            raise ConfigError(
                f"config.groups covers no group for parameter {name!r}: add a pattern, for example "
                "('.*', 'train')."
            )
        assigned[name] = groups[match][1]
        used.add(match)
    for i, (pattern, group) in enumerate(groups):
        if i not in used:
            raise ConfigError(
                f"config.groups: the pattern {pattern!r} ({group!r}) decides no parameter; earlier "
                "patterns win, and patterns must match the whole name."
                + did_you_mean(pattern, names)
            )
    if all(group == FREEZE for group in assigned.values()):
        raise ConfigError("config.groups freezes every parameter, so nothing would train.")
    return assigned


def trained(assigned: Mapping[str, str]) -> list[str]:
    """The names of the parameters that train."""
    return [name for name, group in assigned.items() if group != FREEZE]


def stacks(
    kinds: Sequence[str] | Mapping[str, Sequence[str]],
    assigned: Mapping[str, str],
    optim: Mapping[str, Any],
    group_optim: Mapping[str, Mapping[str, Any]],
) -> paths.Stacks:
    """Run lengths of neighbouring layers that are of one kind, train in the same groups and decay
    alike; of a model of several trunks {prefix: those of each}."""
    if isinstance(kinds, Mapping):
        return {
            prefix: _stacks(words, assigned, optim, group_optim, prefix)
            for prefix, words in kinds.items()
        }
    return _stacks(kinds, assigned, optim, group_optim, "")


def _stacks(
    kinds: Sequence[str],
    assigned: Mapping[str, str],
    optim: Mapping[str, Any],
    group_optim: Mapping[str, Mapping[str, Any]],
    trunk: str,
) -> tuple[int, ...]:
    keys: list[Any] = [(kind, []) for kind in kinds]
    for name, group in assigned.items():
        place = paths.layer(name)
        if place and place.trunk == trunk:
            pattern = group_optim.get(group, {}).get("decay", optim["decay"])
            decays = re.fullmatch(pattern, name) is not None
            keys[place.index][1].append((place.rest, group, decays))
    return paths.runs([(kind, tuple(sorted(members))) for kind, members in keys])


def split(params: Any, assigned: Mapping[str, str]) -> tuple[Any, Any]:
    """(trainable, frozen): two stored trees that `merge` puts together again."""
    flat = paths.flatten(params)
    frozen = {p: x for p, x in flat.items() if assigned[paths.names(p)[0]] == FREEZE}
    return (
        paths.unflatten({p: x for p, x in flat.items() if p not in frozen}),
        paths.unflatten(frozen),
    )


def merge(trainable: Any, frozen: Any) -> Any:
    return paths.unflatten({**paths.flatten(trainable), **paths.flatten(frozen)})
