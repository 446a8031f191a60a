"""Parameter trees and their names.

A parameter's name is its path, `block_07/attn/query/kernel`, and names are API: groups,
checkpoints, exports and configs use them. A model of several trunks has each under a prefix:
`image/block_07/attn/query/kernel`, `text/block_03/…`. In memory the blocks of one kind may be
stacked under `blocks_00_11` (leading axis = layer), so that `scan` compiles one of them; that is
storage and never part of a name. This file is the only one that knows both.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

Tree = Any
# Lengths of the runs of layers that are stored together, of one trunk or {prefix: those of each};
# None: the layers are stored one by one.
Stacks = Sequence[int] | Mapping[str, Sequence[int] | None] | None
_STACK = re.compile(r"((?:\w+/)*?)blocks_(\d+)_(\d+)/(.*)")
_LAYER = re.compile(r"((?:\w+/)*?)block_(\d+)/(.*)")


class Layer(NamedTuple):
    """The place of a layer's parameter: `image/block_07/attn/out/bias` is `attn/out/bias` of layer
    7 of the trunk `image/`. A model that is one trunk has the prefix ""."""

    trunk: str
    index: int
    rest: str

    @property
    def prefix(self) -> str:
        """`image/block_07`."""
        return f"{self.trunk}block_{self.index:02d}"


def layer(name: str) -> Layer | None:
    """The layer of a parameter, None for one that is of no layer."""
    match = _LAYER.fullmatch(name)
    return Layer(match[1], int(match[2]), match[3]) if match else None


def span(first: str, last: str) -> str:
    """One name for a parameter of the layers from that of `first` to that of `last`:
    `image/block_00…11/attn/out/bias`."""
    one, other = layer(first), layer(last)
    return first if one == other else f"{one.prefix}…{other.index:02d}/{one.rest}"


def depths(names: Iterable[str]) -> dict[str, int]:
    """{trunk: number of its layers} of a model's parameter names."""
    found: dict[str, int] = {}
    for one in filter(None, map(layer, names)):
        found[one.trunk] = max(found.get(one.trunk, 0), one.index + 1)
    return found


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}, in the order of the sorted paths."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(flat: Mapping[str, Any]) -> Tree:
    return traverse_util.unflatten_dict(flat, sep="/")


def names(path: str) -> list[str]:
    """The parameter names that a stored path holds: one, or one for each layer of a stack."""
    match = _STACK.fullmatch(path)
    if not match:
        return [path]
    trunk, first, last, rest = match[1], int(match[2]), int(match[3]), match[4]
    return [f"{trunk}block_{i:02d}/{rest}" for i in range(first, last + 1)]


def is_stacked(path: str) -> bool:
    return _STACK.fullmatch(path) is not None


def stored_layers(tree: Tree) -> dict[str, str]:
    """{`image/block_07`: `image/blocks_04_11`} for all layers of a stored tree that are stacked."""
    found = {}
    for path in filter(is_stacked, flatten(tree)):
        match = _STACK.fullmatch(path)
        run = path.removesuffix(f"/{match[4]}")
        found |= {layer(name).prefix: run for name in names(path)}
    return found


def unstack(tree: Tree) -> dict[str, Any]:
    """{parameter name: array} of a stored tree; a stack gives its layers one by one.

    `jax.ShapeDtypeStruct` leaves give structs, so names and shapes are known without any memory.
    """
    flat = {}
    for path, leaf in flatten(tree).items():
        if not is_stacked(path):
            flat[path] = leaf
            continue
        for i, name in enumerate(names(path)):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                flat[name] = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            else:
                flat[name] = leaf[i]
    return flat


def stack(named: Mapping[str, Any], stacks: Stacks) -> Tree:
    """The stored tree of {parameter name: array} for runs of `stacks` layers."""
    of_trunks = stacks if isinstance(stacks, Mapping) else {"": stacks}
    flat: dict[str, Any] = {}
    members: dict[tuple[str, str], dict[int, Any]] = {}
    for name, leaf in named.items():
        place = layer(name)
        if place is None or of_trunks.get(place.trunk) is None:
            flat[name] = leaf
        else:
            members.setdefault((place.trunk, place.rest), {})[place.index] = leaf
    for (trunk, rest), layers in members.items():
        for run, (first, last) in stack_names(of_trunks[trunk]).items():
            present = [i for i in range(first, last + 1) if i in layers]
            if len(present) not in (0, last - first + 1):
                raise ValueError(f"{trunk}{run} mixes layers with and without {rest!r}: {present}")
            if present:
                flat[f"{trunk}{run}/{rest}"] = jnp.stack([layers[i] for i in present])
    return unflatten(flat)


def restack(tree: Tree, stacks: Stacks) -> Tree:
    """The same parameters, stored in other runs of layers."""
    return stack(unstack(tree), stacks)


def stack_names(stacks: Sequence[int]) -> dict[str, tuple[int, int]]:
    """{"blocks_00_09": (0, 9), …} for runs of the given lengths."""
    runs, first = {}, 0
    for length in stacks:
        last = first + length - 1
        runs[f"blocks_{first:02d}_{last:02d}"] = (first, last)
        first = last + 1
    return runs


def runs(keys: Sequence[Any]) -> tuple[int, ...]:
    """Lengths of the runs of equal neighbours: (a, a, b) -> (2, 1)."""
    lengths: list[int] = []
    for i, key in enumerate(keys):
        if i and key == keys[i - 1]:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return tuple(lengths)


def kind_runs(kinds: Sequence[str] | Mapping[str, Sequence[str]]) -> Stacks:
    """`Stacks` with runs as long as layers are of one kind: of a model's `kinds`, a word a layer,
    or {prefix: those of each trunk}."""
    if isinstance(kinds, Mapping):
        return {prefix: runs(words) for prefix, words in kinds.items()}
    return runs(kinds)


def layer_counts(kinds: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, int]:
    """{prefix of a trunk: number of its layers} of a model's `kinds`."""
    trunks = kinds if isinstance(kinds, Mapping) else {"": kinds}
    return {prefix: len(words) for prefix, words in trunks.items()}


def map_names(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Maps `function(stored path, leaf)` over a nested dict."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def size(tree: Tree) -> int:
    """Number of elements in all leaves (a Python int)."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Bytes of all leaves; works on arrays and on ShapeDtypeStructs, PRNG keys included."""
    return sum(int(leaf.size) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
