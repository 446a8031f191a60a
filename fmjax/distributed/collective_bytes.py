"""Bytes that devices send each other in one step, counted in the compiled program.

The compiler decides what to move, so a mistake in a layout shows in no number, only in time: an
activation gathered over all devices, a gradient reduced twice. Here every collective counts with
the bytes that a device sends in a ring, which no algorithm undercuts (Patarasuk and Yuan 2009,
"Bandwidth optimal all-reduce algorithms for clusters of workstations"), times the trip counts of
the loops around it.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

# Bytes sent by each of n devices, given the bytes of the result on one of them.
_SENT: dict[str, Callable[[int, float], float]] = {
    "all-gather": lambda n, size: size * (n - 1) / n,
    "reduce-scatter": lambda n, size: size * (n - 1),
    "all-reduce": lambda n, size: 2 * size * (n - 1) / n,
    "all-to-all": lambda n, size: size * (n - 1) / n,
    "collective-permute": lambda n, size: size,
    "collective-broadcast": lambda n, size: size,
}
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<opcode>[a-z][\w-]*)\("
)
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\]")


def sent(hlo: str) -> dict[str, float]:
    """{kind of collective: bytes that one device sends} in a run of a program.

    Args:
        hlo: `compiled.as_text()`. A loop whose trip count it does not state counts with the bound
            of its counter, which is too many where the counter takes larger steps.

    Raises ValueError for collectives in a loop that states neither.
    """
    computations, entry = _computations(hlo)
    heading = hlo.partition("\n")[0]
    devices = math.prod(map(int, re.findall(r"(?:replica_count|num_partitions)=(\d+)", heading)))

    @functools.cache
    def inside(name: str) -> Counter:
        """{(kind, channel): bytes} of one run of a computation."""
        total: Counter = Counter()
        for line in computations[name]:
            match = _INSTRUCTION.match(line)
            opcode = match["opcode"] if match else ""
            kind, started = opcode.removesuffix("-start"), opcode.endswith("-start")
            if kind in _SENT:
                channel = re.search(r"channel_id=(\d+)", line)
                members = _group_size(line, devices)
                size = _SENT[kind](members, _result(kind, match["type"], members, started))
                total[kind, channel[1] if channel else match["name"]] += size
            elif opcode == "while":
                body = inside(_called(line, "body")[0])
                trips = _trips(line, computations[_called(line, "condition")[0]]) if body else 0
                total += Counter({key: trips * size for key, size in body.items()})
            elif opcode == "conditional":
                branches = _called(line, "branch_computations", r"\w+_computation")
                total += max(map(inside, branches), key=Counter.total)
            elif opcode == "fusion":
                # libtpu writes an asynchronous collective into a fusion that starts it, into all
                # that overlap with it, even in a loop between, and into one that ends it.
                (fused,) = _called(line, "calls")
                total |= Counter() if fused.startswith("async_collective_fusion") else inside(fused)
            elif not opcode.endswith(("-update", "-done")):
                for called in _called(line, "calls", "to_apply"):
                    total += inside(called)
        return total

    kinds: Counter = Counter()
    for (kind, _), size in inside(entry).items():
        kinds[kind] += size
    return dict(kinds)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """{name of a computation: its lines}, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in hlo.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            lines = computations[match["name"]] = []
            entry = match["name"] if match["entry"] else entry
        else:
            lines.append(line)
    return computations, entry


def _called(line: str, *attributes: str) -> list[str]:
    """The computations that an instruction names under any of the attributes (a regex each)."""
    found = re.findall(rf"\b(?:{'|'.join(attributes)})=(?:\{{(.*?)\}}|%?([\w.-]+))", line)
    return [name.strip().lstrip("%") for many, one in found for name in (many or one).split(",")]


def _trips(line: str, condition: Sequence[str]) -> int:
    known = re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', line)
    if known:
        return int(known[1])
    text = "\n".join(condition)
    bounds = re.findall(r"constant\((\d+)\)", text)
    if len(bounds) != 1 or "direction=LT" not in text:
        raise ValueError(f"Collectives in a loop of unknown length: {line.strip()}")
    return int(bounds[0])


def _group_size(line: str, devices: int) -> int:
    """Devices that take part together, in the three ways of writing their groups."""
    if match := re.search(r"replica_groups=mesh.*? \{(.*?)\}", line):  # {'axis_0','axis_1':(2)4}
        axes = dict(re.findall(r"'(\w+)'=(\d+)", line))
        sizes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[1])
        return math.prod(int(part or axes[axis]) for axis, part in sizes)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):  # [groups,members]<=[devices]
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):  # {{0,1},{2,3}}
        return len(match[1].split(","))
    return devices


def _result(kind: str, type_: str, members: int, started: bool) -> float:
    """Bytes of a collective's result on one device."""
    size = sum(
        math.prod(int(n) for n in array["shape"].split(",") if n) * int(array["bits"] or 8) / 8
        for array in _ARRAY.finditer(type_)
        if not (started and array["dtype"] == "u32" and not array["shape"])  # a handle
    )
    if not started or kind == "all-reduce":
        return size
    # The asynchronous forms return their operand beside the result.
    ratio = {"all-gather": members, "reduce-scatter": 1 / members}.get(kind, 1)
    return size * ratio / (1 + ratio)
