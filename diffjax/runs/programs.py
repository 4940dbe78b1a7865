"""What a compiled program says of itself: its collectives, and its memory.

The text of an optimised HLO module, `compiled.as_text()`, is that of one device. A line of it is

    %name = f32[16,8]{1,0} all-reduce(f32[16,8]{1,0} %x), replica_groups={{0,1},{2,3}}, ...

The payload of a collective is counted as the larger of what it reads and what it writes on one
device: of an all-gather that is the whole gathered array, of a reduce-scatter the array before it
is scattered, of an all-reduce the array. A collective in a loop counts as often as the loop runs
where the compiler knows that, else once.

The compiler for TPUs writes two of them in its own way. A reduce-scatter is an all-reduce within a
computation %all-reduce-scatter, which cuts the sum. And one that runs beside products stands in
several fusions, a part of it in each, with one channel and one `chain_id`: it counts once.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
    "collective-permute",
)

_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHAIN = re.compile(r"channel_id=(\d+).*chain_id=\"(\d+)\"")
_SCATTERED = "all-reduce-scatter"  # how the names of such computations begin
_BITS = {"pred": 8}


class Collective(NamedTuple):
    """A kind of collective among `devices`. runs: how often it runs; bytes: all its payloads.

    stride: how far apart its devices are in the order of the program's.
    """

    kind: str
    devices: int
    runs: int
    bytes: int
    stride: int = 1


class Memory(NamedTuple):
    """Bytes on one device, as XLA allots them. aliased: of results that reuse arguments."""

    arguments: int
    results: int
    aliased: int
    temporaries: int

    @property
    def held(self) -> int:
        """Bytes in all."""
        return self.arguments + self.results - self.aliased + self.temporaries


def memory(compiled: Any) -> Memory:
    """The memory of a compiled program."""
    found = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
    )


def flops(compiled: Any) -> float:
    """The FLOPs of XLA's own count, of one device; loops count once, library calls may not count.

    NaN where the backend has no count.
    """
    cost = compiled.cost_analysis() or {}
    return float(cost.get("flops", math.nan))


def shape_bytes(text: str) -> list[int]:
    """The bytes of each array shape in a piece of HLO, such as `(f32[2,3]{1,0}, s32[])`."""
    return [_bits(kind) * _elements(shape) // 8 for kind, shape in _SHAPE.findall(text)]


def collectives(text: str, devices: int) -> tuple[Collective, ...]:
    """The collectives of an optimised HLO module, by kind, number of devices and stride.

    text: `compiled.as_text()`. devices: all of the program's, for groups that are not written out.
    """
    bodies = _computations(text)
    runs = _runs(bodies, text)
    found: dict[tuple[str, int, int], list[int]] = {}
    chains: set[tuple[str, ...]] = set()
    for name, lines in bodies.items():
        for line in lines:
            match = _OPERATION.search(line)
            chain = _CHAIN.search(line)
            if match is None or (chain and chain.groups() in chains):
                continue
            chains |= {chain.groups()} if chain else set()
            result, kind, start, rest = match.groups()
            count, stride = _group(rest, devices)
            payload = _payload(kind, result, bool(start), count)
            kind = "reduce-scatter" if name.startswith(_SCATTERED) else kind
            entry = found.setdefault((kind, count, stride), [0, 0])
            entry[0] += runs.get(name, 0)
            entry[1] += runs.get(name, 0) * payload
    return tuple(
        Collective(kind, count, often, size, stride)
        for (kind, count, stride), (often, size) in sorted(found.items())
        if often
    )


def instructions(text: str) -> int:
    """The number of instructions of an HLO module."""
    return sum(" = " in line for lines in _computations(text).values() for line in lines)


def _payload(kind: str, result: str, start: bool, devices: int) -> int:
    """The larger of what one device reads and writes."""
    written = shape_bytes(result)
    if start and kind in ("all-gather", "collective-permute"):
        # The result of a start is (operands, results, ...): of the same collective twice.
        return max(written, default=0) if len(written) <= 2 else _halves(written)
    total = sum(written)
    return total * devices if kind == "reduce-scatter" else total


def _halves(written: list[int]) -> int:
    half = len(written) // 2
    return max(sum(written[:half]), sum(written[half : 2 * half]))


def _group(rest: str, devices: int) -> tuple[int, int]:
    """How many devices take part in one group, and how far apart the first two are."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return _spacing([int(n) for n in listed[1].split(",")])
    # XLA's short forms: [groups, size]<=[shape]T(order), the devices in that shape transposed; and
    # mesh['a'=4,'b'=2], device_ids=([shape]T(order)) {'a'}, the axes that a group goes along.
    short = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if short:
        return _spacing(_places(short[2]).reshape(_numbers(short[1]))[0].tolist())
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{('[^}]*)\}", rest)
    if named:
        sides = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        order = re.search(r"\[[\d,]+\](?:T\([\d,]+\))?", named[2])
        places = _places(order[0] if order else f"[{math.prod(sides.values())}]")
        axes = re.findall(r"'([^']+)'", named[3])
        grid = np.moveaxis(
            places.reshape(list(sides.values())),
            [list(sides).index(axis) for axis in axes],
            range(len(axes)),
        )
        return _spacing(grid.reshape(math.prod(sides[a] for a in axes), -1)[:, 0].tolist())
    return devices, 1


def _places(text: str) -> Any:
    """The devices in the order of "[2,4]T(1,0)": in that shape, transposed."""
    shape, _, order = text.partition("T")
    sides = _numbers(shape)
    return np.arange(math.prod(sides)).reshape(sides).transpose(_numbers(order) or None).ravel()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _spacing(group: Sequence[int]) -> tuple[int, int]:
    return len(group), abs(group[1] - group[0]) if len(group) > 1 else 1


def _bits(kind: str) -> int:
    """The bits of an element: of f32, bf16, c64, u4, f8e4m3fn; 0 of a token."""
    found = re.match(r"(?:bf|[a-z])(\d+)", kind)
    return _BITS.get(kind, int(found[1]) if found else 0)


def _elements(shape: str) -> int:
    return math.prod(int(n.replace("<=", "")) for n in shape.split(",") if n)


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name."""
    bodies: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head and "=" not in line.split("(")[0]:
            current = bodies.setdefault(head[1], [])
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return bodies


def _runs(bodies: Mapping[str, Iterable[str]], text: str) -> dict[str, int]:
    """How often each computation runs, from the entry down."""
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for line in bodies.get(name, ()):
            trips = _TRIPS.search(line)
            often = times * int(trips[1]) if trips else times
            called = _CALLED.findall(line)
            for names in _BRANCHES.findall(line):
                called += [n.strip().lstrip("%") for n in names.split(",")]
            for other in called:
                visit(other, often)

    if entry:
        visit(entry[1], 1)
    return runs
