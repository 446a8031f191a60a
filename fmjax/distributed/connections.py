"""The connections between processes on CPUs, made while all of them are there."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def connect(mesh: jax.sharding.Mesh) -> None:
    """Connect the devices that a computation over `mesh` may combine.

    gloo connects them where they first compute together, and gives up if one comes half a minute
    after another, which may have compiled for longer or read a slower disk. Once they are connected
    they wait for each other. Accelerators have no such limit.
    """
    if jax.default_backend() != "cpu":
        return
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ones = jax.make_array_from_callback((mesh.size,), place, lambda index: jnp.ones(1))
    jax.block_until_ready(jax.jit(sums(mesh))(ones))


def sums(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], list[jax.Array]]:
    """A function of [devices], an element each, that adds over every set of axes of `mesh`."""
    axes = [name for name, size in mesh.shape.items() if size > 1]
    sets = [some for n in range(len(axes)) for some in itertools.combinations(axes, n + 1)]
    place = PartitionSpec(mesh.axis_names)
    added = lambda x: [jax.lax.psum(x, some) for some in sets]
    return jax.shard_map(added, mesh=mesh, in_specs=place, out_specs=place, check_vma=False)
