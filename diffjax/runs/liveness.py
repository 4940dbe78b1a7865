"""The memory that a program's temporaries need, from its jaxpr.

A compiler fuses what is done element by element, so most values of a jaxpr never lie in memory.
Here a value is *kept* where

    (a) it is the result of an operation that is not element by element,
    (b) it is an operand of a product, other than a reshaped kept value, or
    (c) it is used more than once and making it again would hold more bytes than it has itself: such
        as the sum of a residual block, of two kept values and read by the next block and the skip,
        or a dropout mask and the random bits behind it, or
    (d) it is used more than once and dear to compute: exp, tanh, a division.

Any other value is made again, where it is needed, from the kept values that it came from: its
*roots*. A kept value lives from where it is made to the last operation that needs it or needs it as
a root. The estimate is the largest number of bytes alive at one time, in the order of the jaxpr,
plus what is alive inside the loop that runs then.

A compiler orders and fuses otherwise, and pads: XLA most often needs up to a third more. Arguments
are the caller's and count as nothing, unless they are `gathered`: put together from shards for
each operation that needs them, in a loop each time, and freed after it.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from diffjax.runs.counting import CALLS, PRODUCTS, REDUCTIONS, inner_jaxprs, size_of

# Results that are other names of the same bytes.
_ALIASES = ("reshape", "squeeze", "expand_dims", "optimization_barrier")
_LOOPS = ("scan", "while", "cond", "shard_map")
# Not element by element, so that a result lies in memory; and all products and loops.
_BARRIERS = (
    *PRODUCTS,
    *REDUCTIONS,
    *_LOOPS,
    "concatenate",
    "cumsum",
    "gather",
    "random_bits",
    "scatter",
    "scatter-add",
    "sort",
    "threefry2x32",
)
# What XLA does not compute twice to save memory.
_DEAR = (
    "atan2",
    "cos",
    "div",
    "erf",
    "exp",
    "expm1",
    "log",
    "log1p",
    "logistic",
    "pow",
    "rsqrt",
    "sin",
    "sqrt",
    "tanh",
)


class _Step(NamedTuple):
    """One operation of the flattened program. inside: bytes that live within it alone."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    inside: float


class _Program:
    """A jaxpr without calls: numbered values with their bytes, and steps in order.

    gathered: bytes of those that are put together for their uses.
    """

    def __init__(self) -> None:
        self.gathered: dict[int, float] = {}
        self.bytes: list[float] = []
        self.steps: list[_Step] = []
        self.alias: dict[int, int] = {}

    def value(self, aval: Any) -> int:
        self.bytes.append(size_of(aval) if hasattr(aval, "dtype") else 0)
        return len(self.bytes) - 1

    def source(self, value: int) -> int:
        """The value whose bytes these are."""
        return self.alias.get(value, value)

    def run(self, jaxpr: Any, arguments: Iterable[int | None]) -> list[int | None]:
        """Appends the steps of a jaxpr; None stands for a literal. Returns its results."""
        known: dict[Any, int | None] = dict(zip(jaxpr.invars, arguments, strict=True))

        def look_up(atom: Any) -> int | None:
            if hasattr(atom, "val"):
                return None
            if atom not in known:  # a constant
                known[atom] = self.value(atom.aval)
            return known[atom]

        for eqn in jaxpr.eqns:
            inputs = [look_up(atom) for atom in eqn.invars]
            name = eqn.primitive.name
            if name in CALLS:
                (called, *_) = inner_jaxprs(eqn.params)
                known |= dict(zip(eqn.outvars, self.run(called, inputs), strict=True))
                continue
            outputs = tuple(self.value(v.aval) for v in eqn.outvars)
            known |= dict(zip(eqn.outvars, outputs, strict=True))
            given = tuple(i for i in inputs if i is not None)
            bodies = inner_jaxprs(eqn.params)
            inside = max((self.inside(eqn, body, inputs) for body in bodies), default=0.0)
            self.steps.append(_Step(name, given, outputs, inside))
            if name in _ALIASES and len(given) == len(outputs):
                self.alias |= dict(zip(outputs, map(self.source, given), strict=True))
        return [look_up(atom) for atom in jaxpr.outvars]

    def inside(self, eqn: Any, body: Any, inputs: Sequence[int | None]) -> float:
        """The peak of a loop's body; its results are the loop's, which counts them."""
        own = inputs[len(inputs) - len(body.invars) :]  # a branch's index, say, comes first
        rows = len(own)
        if eqn.primitive.name == "scan":
            rows = eqn.params["num_consts"] + eqn.params["num_carry"]
        gathered = {
            i: self.gathered[self.source(value)] / (eqn.params["length"] if i >= rows else 1)
            for i, value in enumerate(own)
            if value is not None and self.source(value) in self.gathered
        }
        return peak(body, gathered=gathered, results=dict.fromkeys(range(len(body.outvars)), 0.0))


def peak(
    jaxpr: Any,
    *,
    gathered: Mapping[int, float] | None = None,
    results: Mapping[int, float] | None = None,
) -> float:
    """The most bytes of temporaries alive at one time.

    gathered: bytes of the arguments, by position, that are put together for their uses. results:
    the bytes of results, by position, that a device keeps of what it makes; the others are kept
    whole, to the end.
    """
    program = _Program()
    arguments = [program.value(v.aval) for v in jaxpr.invars]
    program.gathered = {arguments[i]: size for i, size in (gathered or {}).items()}
    outputs = [program.source(o) for o in program.run(jaxpr, arguments) if o is not None]
    lives = _lives(program, arguments, outputs)
    sizes = dict(enumerate(program.bytes)) | dict.fromkeys(arguments, 0.0)
    held = {o: sizes[o] for o in outputs}
    held |= {outputs[i]: size for i, size in (results or {}).items() if i < len(outputs)}
    last = len(program.steps)
    change = [0.0] * (last + 2)
    for value, (start, end) in lives.items():
        change[start] += sizes[value]
        if value in held:
            change[start + 1] += held[value] - sizes[value]
        else:
            change[end + 1] -= sizes[value]
    alive = most = 0.0
    for delta, step in zip(change, program.steps, strict=False):
        alive += delta
        fetched = 0.0
        if step.name not in _LOOPS:  # these put them together within
            fetched = sum(program.gathered.get(program.source(i), 0.0) for i in set(step.inputs))
        most = max(most, alive + step.inside + fetched)
    return most


def _lives(
    program: _Program, arguments: Sequence[int], outputs: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Of the kept values: the step that makes them, and the last that needs them."""
    uses = collections.Counter(i for step in program.steps for i in step.inputs)
    asked = {program.source(i) for s in program.steps if s.name in PRODUCTS for i in s.inputs}
    asked |= set(outputs)
    born: dict[int, int] = {}
    dies: dict[int, int] = {}
    roots: dict[int, tuple[int, ...]] = {value: (value,) for value in arguments}
    for index, step in enumerate(program.steps):
        sources = (program.source(i) for i in step.inputs)
        needed = tuple(dict.fromkeys(r for i in sources for r in roots.get(i, ())))
        cost = sum(program.bytes[r] for r in needed)
        for output in step.outputs:
            if output in program.alias:
                continue
            dear = step.name in _DEAR or cost > program.bytes[output]
            kept = step.name in _BARRIERS or output in asked or (uses[output] > 1 and dear)
            if not kept:
                roots[output] = needed
                continue
            roots[output] = (output,)
            born[output] = dies[output] = index
            dies |= dict.fromkeys(needed, index)
    return {value: (start, dies[value]) for value, start in born.items()}
