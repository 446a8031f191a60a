"""Layout of arrays: one mesh, one table of rules, one program for any number of devices.

The mesh has the axes `data` (batch), `fsdp` (batch, and parameters cut along one dimension),
`expert` (batch, and which experts of a layer a device has) and `tensor` (heads and hidden units).
Rules are ordered (regex over parameter names, PartitionSpec); the first full match wins. A stacked
parameter gets its layer's spec after an unsharded layer axis.
"""

import collections
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.errors import ConfigError
from fmjax.params import devices, paths

AXES = ("data", "fsdp", "expert", "tensor")
BATCH = P(("data", "fsdp", "expert"))
WHOLE = P()
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/token/embedding", P("tensor", "fsdp")),
    (r"embed/\w+/embedding", P(None, "fsdp")),
    (r"block_.*/experts/(up|gate)/kernel", P("expert", "fsdp", "tensor")),
    (r"block_.*/experts/down/kernel", P("expert", "tensor", "fsdp")),
    # A quantized matrix is several arrays.
    (r".*/(query|key|value|up|gate)/kernel(/codes|/absmax)?", P("fsdp", "tensor")),
    (r".*/(out|down)/kernel(/codes|/absmax)?", P("tensor", "fsdp")),
    (r"block_.*/(query|key|value|up|gate)/bias", P("tensor")),
    (r"head/mlm/bias", P("tensor")),
    (r"head/(mlm/)?lm/kernel", P("fsdp", "tensor")),
    (r"head/.*/kernel", P("fsdp", None)),
    (r".*", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, expert: int = 1) -> jax.sharding.Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave.

    Raises ConfigError naming the legal counts.
    """
    sizes = dict(zip(AXES, (data, fsdp, expert, tensor), strict=True))
    available = jax.device_count()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or available % fixed or (not free and fixed != available):
        divisors = [n for n in range(1, available + 1) if available % n == 0]
        raise ConfigError(
            f"config.mesh={sizes} does not fit {available} devices: the product of the axes must "
            f"be {available}, one axis may be -1 (takes the rest), sizes can be {divisors}."
        )
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"the processes have different numbers of devices ({dict(counts)}): give each the same "
            "number, for each feeds the same number of rows."
        )
    shape = tuple(available // fixed if size == -1 else size for size in sizes.values())
    # Auto: the compiler propagates layouts. Explicit axes (the default of make_mesh) reject Linen's
    # modules.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def table(mesh: jax.sharding.Mesh) -> str:
    """The devices and mesh that the program runs on, for people.

    devices     16 x TPU v5 lite (tpu), 15.7 GiB each, 4 in each of 4 processes
    mesh        data 2 x fsdp 4 x tensor 2
    """
    device = mesh.local_mesh.devices.flat[0]
    facts = [devices.describe(device, mesh.size)]
    if jax.process_count() > 1:
        facts.append(f"{mesh.local_mesh.size} in each of {jax.process_count()} processes")
    lines = [f"devices     {', '.join(facts)}"]
    if device.platform == "cpu" and (idle := devices.unused()):
        lines.append(f"            {idle}")
    if mesh.size > 1:
        lines.append("mesh        " + " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items()))
    return "\n".join(lines)


def check_batch(mesh: jax.sharding.Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raise ConfigError for a batch that the batch axes of the mesh, or the processes, do not
    divide."""
    ways = batch_ways(mesh)
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = owners.reshape(ways, mesh.shape["tensor"])
    if (owners != owners[:, :1]).any():
        raise ConfigError(
            f"config.mesh.tensor={mesh.shape['tensor']} joins devices of several processes, but "
            f"each process feeds rows of its own: use a divisor of the {mesh.local_mesh.size} "
            "devices that a process has."
        )
    if batch_size % (ways * accumulate):
        raise ConfigError(
            f"config.batch_size={batch_size} cannot be cut into {accumulate} microbatches "
            f"(config.accumulate) over {ways} devices (config.mesh.data x config.mesh.fsdp x "
            f"config.mesh.expert): use a multiple of {ways * accumulate}."
        )


def batch_ways(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Over how many devices the rows of a batch are cut; 1 where no mesh is set."""
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH[0])


def shardings(tree: Any, mesh: jax.sharding.Mesh, rules=RULES) -> Any:
    """NamedShardings for a stored parameter tree (arrays or ShapeDtypeStructs)."""

    def place(path, leaf):
        spec = spec_of(path, rules)
        if paths.is_stacked(path):
            spec = P(None, *spec)
        return NamedSharding(mesh, fitted(leaf.shape, spec, mesh))

    return paths.map_names(place, tree)


def spec_of(path: str, rules=RULES) -> P:
    """Layout of one layer's parameter, given its stored path, under whatever prefix."""
    name = paths.names(path)[0]
    matches = lambda pattern: re.fullmatch(rf"(\w+/)*?({pattern})", name)
    return next(spec for pattern, spec in rules if matches(pattern))


def like_params(tree: Any, params: Any, mesh: jax.sharding.Mesh, rules=RULES) -> Any:
    """Shardings for a tree that contains copies of parameters (an optimizer state).

    A leaf whose path ends in a parameter's path, and that has its shape, has the layout of the
    parameter; anything else is replicated.
    """
    flat = paths.flatten(params)
    placed = paths.flatten(shardings(params, mesh, rules))

    def place(path, leaf):
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        for start in range(len(keys)):
            name = "/".join(keys[start:])
            if name in flat and flat[name].shape == leaf.shape:
                return placed[name]
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, tree)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps activations split by example; the identity when no mesh is set (`jax.set_mesh`)."""
    return _constrain(x, BATCH)


def constrain_heads(x: jax.Array) -> jax.Array:
    """Keeps (B, N, …) arrays of attention split by example and head, where these divide."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else _constrain(x, fitted(x.shape, P(*BATCH, "tensor"), mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(x: jax.Array, spec: P) -> jax.Array:
    """A parameter laid as `spec` says, whole along `fsdp`; the identity when no mesh is set.

    Asked for, since the partitioner left alone may move activations, or pass a weight around in
    pieces, for more bytes. The gradient is not moved: it comes from `sum_rows`, laid out already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    whole = P(*(None if axis == "fsdp" else axis for axis in spec))
    return x if mesh.empty else _constrain(x, fitted(x.shape, whole, mesh))


gather.defvjp(lambda x, spec: (gather(x, spec), None), lambda spec, _, g: (g,))


def sum_rows(function: Callable[..., jax.Array], spec: P, *rows: jax.Array) -> jax.Array:
    """`function(*rows)`, a sum over rows, laid as `spec` says: the gradient of a parameter.

    Each device sums over its own rows, a reduce-scatter along `fsdp` adds the devices up, and an
    all-reduce along the others only what a device keeps. The partitioner left alone all-reduces the
    whole along both and then cuts it, which moves twice as much, and along `data` alone reduces the
    two gradients of a tied embedding each by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if batch_ways(mesh) == 1:
        return function(*rows)
    shape = jax.eval_shape(function, *rows).shape
    out = _over_fsdp(fitted(shape, spec, mesh))
    local = lambda *rows: _added_up(function(*rows), out)
    return by_device(local, in_specs=BATCH, out_specs=out)(*rows)


def each_and_sums(
    function: Callable[..., tuple[Any, Any, Any]], spec: P, whole: jax.Array, *rows: jax.Array
) -> tuple[Any, Any, Any]:
    """`function(whole, *rows)`: (sums over rows, arrays of rows, a sum of the shape of `whole`).

    As `sum_rows`: each device has its own rows, and all of them the parameter `whole`, whose
    gradient the last may be; it comes out laid as `spec` says. What is () stays that.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if batch_ways(mesh) == 1:
        return function(whole, *rows)
    out = _over_fsdp(fitted(whole.shape, spec, mesh))

    def local(whole, *rows):
        sums, each, total = function(whole, *rows)
        sums = jax.tree.map(lambda x: jax.lax.psum(x, BATCH[0]), sums)
        return sums, each, jax.tree.map(lambda x: _added_up(x, out), total)

    specs = dict(in_specs=(P(), *[BATCH] * len(rows)), out_specs=(P(), BATCH, out))
    return by_device(local, **specs)(whole, *rows)


def _over_fsdp(spec: P) -> P:
    return P(*(axis if axis == "fsdp" else None for axis in spec))


def _added_up(total: jax.Array, out: P) -> jax.Array:
    """The sum over devices of what each has, of which it keeps the part that `out` says."""
    if "fsdp" not in out:
        return jax.lax.psum(total, BATCH[0])
    cut = out.index("fsdp")
    part = jax.lax.psum_scatter(total, "fsdp", scatter_dimension=cut, tiled=True)
    return jax.lax.psum(part, tuple(axis for axis in BATCH[0] if axis != "fsdp"))


def by_device(function: Callable, **specs: Any) -> Callable:
    """`function` on each device's rows; `tensor` stays with the partitioner."""
    return jax.shard_map(function, axis_names=set(BATCH[0]), check_vma=False, **specs)


def _constrain(x: jax.Array, spec: P) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec)


def to_device(
    batches: Iterator[Mapping[str, np.ndarray]], mesh: jax.sharding.Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Global arrays from each process's rows."""
    place = NamedSharding(mesh, BATCH)
    for batch in batches:
        yield put(batch, place)


def put(batch: Mapping[str, np.ndarray], place: NamedSharding) -> dict[str, jax.Array]:
    return {
        key: jax.make_array_from_process_local_data(place, value) for key, value in batch.items()
    }


def fitted(
    shape: tuple[int, ...], spec: P, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> P:
    """The spec without axes that do not divide their dimension (a vocabulary of 30,522 over 4)."""
    fitting = []
    for size, axis in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
        ways = math.prod(mesh.shape[name] for name in names)
        fitting.append(axis if size % ways == 0 else None)
    return P(*fitting)
