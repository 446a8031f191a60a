"""Programs whose traffic is known on paper: 8 devices, float32, the ring's bytes."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from fmjax.distributed import collective_bytes
from fmjax.params import sharding

N, M = 8, 1024  # devices, numbers that each of them holds
KIB = 1024


def sent(function, data=1, fsdp=N):
    """Of a program written for one device of a mesh, which holds M numbers."""
    mesh, rows = sharding.make_mesh(data, fsdp), sharding.BATCH
    mapped = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    numbers = jax.ShapeDtypeStruct((N * M,), jnp.float32)
    return collective_bytes.sent(jax.jit(mapped).lower(numbers).compile().as_text())


@pytest.mark.parametrize(
    "kind, function, expected",
    [
        ("all-reduce", lambda x: lax.psum(x, "fsdp"), 2 * 4 * KIB * 7 / 8),
        ("all-gather", lambda x: lax.all_gather(x, "fsdp").sum(0), 8 * 4 * KIB * 7 / 8),
        (
            "reduce-scatter",
            lambda x: jnp.tile(lax.psum_scatter(x, "fsdp", tiled=True), N),
            4 * KIB * 7 / 8,
        ),
        (
            "all-to-all",
            lambda x: lax.all_to_all(x.reshape(N, -1), "fsdp", 0, 0).reshape(-1),
            4 * KIB * 7 / 8,
        ),
        (
            "collective-permute",
            lambda x: lax.ppermute(x, "fsdp", [(i, (i + 1) % N) for i in range(N)]),
            4 * KIB,
        ),
    ],
)
def test_every_collective_by_hand(kind, function, expected):
    assert sent(function) == {kind: expected}


def test_groups_are_the_axes_that_take_part():
    """Four devices along `fsdp`, two along `data`."""
    both = lambda x: lax.psum(lax.all_gather(x, "fsdp").sum(0), "data")
    assert sent(both, data=2, fsdp=4) == {
        "all-gather": 4 * 4 * KIB * 3 / 4,
        "all-reduce": 2 * 4 * KIB * 1 / 2,
    }


def test_loops_count_their_trips():
    def five_times_three(x):
        once = lambda x, _: (lax.psum(x * 1.5, "fsdp"), None)
        return lax.scan(lambda x, _: lax.scan(once, x, None, length=3), x, None, length=5)[0]

    assert sent(five_times_three) == {"all-reduce": 15 * 2 * 4 * KIB * 7 / 8}


def test_of_two_branches_the_one_that_sends_more():
    def choose(x):
        one = lambda x: lax.psum(x, "fsdp")
        return lax.cond(x[0] > 0, one, lambda x: one(one(x) * 1.5), x)

    assert sent(choose) == {"all-reduce": 2 * 2 * 4 * KIB * 7 / 8}


def test_a_loop_of_unknown_length_around_a_collective_is_refused():
    def until_large(x):
        return lax.while_loop(lambda x: x[0] < 1e3, lambda x: lax.psum(x, "fsdp"), x)

    with pytest.raises(ValueError, match="unknown length"):
        sent(until_large)
    no_collective = lambda x: lax.while_loop(lambda x: x[0] < 1e3, lambda x: 2 * x, x)
    assert sent(no_collective) == {}


def test_what_the_partitioner_inserts_is_counted():
    """A product over the axis that both operands are cut along is a sum over the devices."""
    mesh = sharding.make_mesh()
    rows = jax.ShapeDtypeStruct(
        (64, 16), jnp.float32, sharding=jax.NamedSharding(mesh, sharding.BATCH)
    )
    compiled = jax.jit(lambda a, b: a.T @ b).lower(rows, rows).compile()
    assert collective_bytes.sent(compiled.as_text()) == {"all-reduce": 2 * 16 * 16 * 4 * 7 / 8}


FUSIONS = "\n".join(
    f"%{name} (a: f32[2,128]) -> f32[8,128] {{\n"
    "  %g = f32[8,128]{1,0} all-gather(%a), channel_id=3, replica_groups=[4,4]<=[16]\n}\n"
    for name in ("start", "async_collective_fusion.1", "end")
)
PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

{fusions}
%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %p = (s32[], f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  {collective}
}}

%condition (p: (s32[], f32[8,128])) -> pred[] {{
  %bound = s32[]{{:T(128)}} constant(12)
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %bound), direction=LT
}}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %while = (s32[], f32[8,128]{{1,0:T(8,128)}}) while(%start), condition=%condition, body=%body
}}
"""


@pytest.mark.parametrize(
    "collective, expected",
    [
        # Groups as libtpu writes them: some axes of a mesh, or a part of one; several results.
        (
            "%r = (bf16[8,128]{1,0:T(8,128)(2,1)}, /*index=1*/f32[]{:T(128)}) all-reduce(%a, %b), "
            "replica_groups=mesh['axis_0'=4,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}",
            {"all-reduce": 12 * 2 * (8 * 128 * 2 + 4) * 7 / 8},
        ),
        (
            "%r = f32[8,128]{1,0} all-gather(%a), replica_groups=mesh['axis_0'=2,'axis_1'=8], "
            "device_ids=([4,4]T(1,0)) {'axis_1':(2)4}, dimensions={0}",
            {"all-gather": 12 * 8 * 128 * 4 * 3 / 4},
        ),
        ("%r = u8[64] all-to-all(%a), replica_groups={}", {"all-to-all": 12 * 64 * 15 / 16}),
        # Asynchronous: operand, result and handles in one tuple; the end counts nothing.
        (
            "%s = (f32[8,128]{1,0}, f32[8,128]{1,0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) "
            "collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}\n"
            "  %r = f32[8,128]{1,0} collective-permute-done(%s)",
            {"collective-permute": 12 * 8 * 128 * 4},
        ),
        (
            "%s = (f32[2,128]{1,0}, f32[8,128]{1,0}) all-gather-start(%a), "
            "replica_groups=[4,4]<=[16], dimensions={0}",
            {"all-gather": 12 * 8 * 128 * 4 * 3 / 4},
        ),
        # One that libtpu overlaps with a fusion: written at its start, there, and at its end.
        (
            "%s = (f32[2,128]{1,0}, f32[8,128]{1,0}) fusion(%a), kind=kCustom, calls=%start\n"
            "  %o = f32[4]{0} fusion(%b, %s), kind=kOutput, calls=%async_collective_fusion.1\n"
            "  %r = f32[8,128]{1,0} fusion(%o), kind=kCustom, calls=%end",
            {"all-gather": 12 * 8 * 128 * 4 * 3 / 4},
        ),
    ],
)
def test_the_ways_of_writing_a_collective(collective, expected):
    """Text as compilers for other devices write it, in a loop of 12."""
    found = collective_bytes.sent(PROGRAM.format(collective=collective, fusions=FUSIONS))
    assert found == pytest.approx(expected)


def test_a_known_trip_count_is_taken_first():
    collective = "%r = f32[256]{0} all-reduce(%a), replica_groups={{0,1},{2,3}}"
    text = PROGRAM.format(collective=collective, fusions=FUSIONS).replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    )
    assert collective_bytes.sent(text) == {"all-reduce": 5 * 1024}
