"""Parameter trees and their names.

A parameter's name is its path, `block_07/attn/query/kernel`, and names are API: groups,
checkpoints, exports and configs use them. In memory the blocks of one kind may be stacked under
`blocks_00_11` (leading axis = layer), so that `scan` compiles one of them; that is storage and
never part of a name. This file is the only one that knows both.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

Tree = Any
_STACK = re.compile(r"blocks_(\d+)_(\d+)/(.*)")
_BLOCK = re.compile(r"block_(\d+)/(.*)")


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
    first, last, rest = int(match[1]), int(match[2]), match[3]
    return [f"block_{i:02d}/{rest}" for i in range(first, last + 1)]


def is_stacked(path: str) -> bool:
    return _STACK.fullmatch(path) is not None


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


def stack(named: Mapping[str, Any], stacks: Sequence[int] | None) -> Tree:
    """The stored tree of {parameter name: array} for runs of `stacks` layers (None: one by one)."""
    if stacks is None:
        return unflatten(named)
    flat, runs = {}, stack_names(stacks)
    members: dict[str, dict[int, Any]] = {}
    for name, leaf in named.items():
        match = _BLOCK.fullmatch(name)
        if match:
            members.setdefault(match[2], {})[int(match[1])] = leaf
        else:
            flat[name] = leaf
    for rest, layers in members.items():
        for run, (first, last) in runs.items():
            present = [i for i in range(first, last + 1) if i in layers]
            if len(present) not in (0, last - first + 1):
                raise ValueError(f"{run} mixes layers with and without {rest!r}: {present}")
            if present:
                flat[f"{run}/{rest}"] = jnp.stack([layers[i] for i in present])
    return unflatten(flat)


def restack(tree: Tree, stacks: Sequence[int] | None) -> Tree:
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


def map_names(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Maps `function(stored path, leaf)` over a nested dict."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def size(tree: Tree) -> int:
    """Number of elements in all leaves (a Python int)."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Bytes of all leaves; works on arrays and on ShapeDtypeStructs, PRNG keys included."""
    return sum(int(leaf.size) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
