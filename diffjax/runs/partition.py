"""What one device does of a program whose parameters are split over "tensor": its local shapes.

Symbols: T devices. An array is *split* along an axis where each of them holds 1/T of it; else it is
whole, and all hold the same.

Parameters lie as their shardings say and the batch is whole. From there each operation hands its
split axis on, as XLA's partitioner does:

    a product       split along an axis of its result: the result is split there. Along what it  (1)
                    sums over: each device has a part of the sum, and an all-reduce of the
                    result makes it whole; an operand that is whole there is cut first.
    a reduction     over the split axis: as the sum of (1); else the axis stays                  (2)
    a reshape       of the split axis: the first of its parts that T divides                     (3)
    any other       that keeps the number of axes: the axis stays; else the result is whole      (4)

(3) is where the partitioner may have to move data between the devices (a packed projection to
queries, keys and values is one such place), and (4) where it may gather. Neither is counted.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from diffjax.runs.counting import CALLS, CONVOLUTION, DOT, REDUCTIONS, inner_jaxprs, size_of

Axis = int | None


class Value:
    """A variable of a local program. aval: its local shape; axis: the one that is split, if any."""

    def __init__(self, aval: Any, axis: Axis, devices: int) -> None:
        self.axis = axis
        self.aval = aval if axis is None else _cut(aval, axis, devices)


class Equation(NamedTuple):
    """An operation on local values; the fields are those of a jaxpr's equations."""

    primitive: Any
    invars: tuple[Any, ...]
    outvars: tuple[Value, ...]
    params: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Local:
    """A program of local values, which `counting` and `liveness` read as they do a jaxpr."""

    invars: tuple[Value, ...]
    outvars: tuple[Any, ...]
    eqns: tuple[Equation, ...]

    @property
    def jaxpr(self) -> "Local":
        """Itself: it needs no constants."""
        return self


class Sum(NamedTuple):
    """All-reduces over "tensor" of (1) and (2): how often one runs, and its bytes."""

    times: int
    bytes: int


def on_one_device(
    jaxpr: Any, axes: Mapping[int, int], devices: int
) -> tuple[Local, tuple[Sum, ...]]:
    """The local program of a jaxpr, and what is summed over the devices.

    axes: the split axis of arguments, by position; the others are whole. devices: T.
    """
    made = _Partitioner(devices)
    local = made.program(jaxpr, [axes.get(i) for i in range(len(jaxpr.invars))], times=1)
    return local, tuple(made.sums)


class _Partitioner:
    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.sums: list[Sum] = []

    def program(self, jaxpr: Any, axes: Iterable[Axis], times: int) -> Local:
        """The local program of a jaxpr that runs `times` times."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known: dict[Any, Value] = {}

        def look_up(atom: Any) -> Any:
            if hasattr(atom, "val"):  # a literal
                return atom
            if atom not in known:  # a constant
                known[atom] = Value(atom.aval, None, self.devices)
            return known[atom]

        for var, axis in zip(jaxpr.invars, axes, strict=True):
            known[var] = Value(var.aval, self._allowed(var.aval, axis), self.devices)
        eqns: list[Equation] = []
        for eqn in jaxpr.eqns:
            inputs = [look_up(atom) for atom in eqn.invars]
            found, params = self._inner(eqn, [_axis(v) for v in inputs], times)
            if params is None:
                found, inputs = self._flat(eqn, inputs, times)
            values = [
                Value(var.aval, self._allowed(var.aval, axis), self.devices)
                for var, axis in zip(eqn.outvars, found, strict=True)
            ]
            known |= dict(zip(eqn.outvars, values, strict=True))
            eqns.append(Equation(eqn.primitive, tuple(inputs), tuple(values), params or eqn.params))
        return Local(
            tuple(known[var] for var in jaxpr.invars),
            tuple(look_up(atom) for atom in jaxpr.outvars),
            tuple(eqns),
        )

    def _allowed(self, aval: Any, axis: Axis) -> Axis:
        """The axis, if there is one that T divides."""
        shape = getattr(aval, "shape", ())
        fits = axis is not None and axis < len(shape) and shape[axis] % self.devices == 0
        return axis if fits else None

    def _inner(
        self, eqn: Any, axes: list[Axis], times: int
    ) -> tuple[list[Axis], Mapping[str, Any] | None]:
        """Axes of the results and local params of a call or loop; None for any other operation."""
        name, params = eqn.primitive.name, eqn.params
        if name in CALLS:
            (called, *_) = inner_jaxprs(params)
            local = self.program(called, axes, times)
            return [_axis(v) for v in local.outvars], {"jaxpr": local}
        if name == "scan":
            held = params["num_consts"] + params["num_carry"]
            carried = axes[params["num_consts"] : held]
            rows = [axis - 1 if axis else None for axis in axes[held:]]
            local = self.program(params["jaxpr"], axes[:held] + rows, times * params["length"])
            stacked = [_axis(v) for v in local.outvars[len(carried) :]]
            found = carried + [None if axis is None else axis + 1 for axis in stacked]
            return found, {**params, "jaxpr": local}
        if name == "while":
            tests, consts = params["cond_nconsts"], params["body_nconsts"]
            local = self.program(params["body_jaxpr"], axes[tests:], times)
            return axes[tests + consts :], {**params, "body_jaxpr": local}
        if name == "cond":
            branches = tuple(self.program(b, axes[1:], times) for b in params["branches"])
            return [_axis(v) for v in branches[0].outvars], {**params, "branches": branches}
        return [], None

    def _flat(self, eqn: Any, inputs: list[Any], times: int) -> tuple[list[Axis], list[Any]]:
        """Axes of the results of one operation, and its operands: cut where it needs a part."""
        name = eqn.primitive.name
        axes = [_axis(v) for v in inputs]
        whole: list[Axis] = [None] * len(eqn.outvars)
        if all(axis is None for axis in axes):
            return whole, inputs
        if name in (DOT, CONVOLUTION):
            kept, summed = (_dot if name == DOT else _convolution)(eqn, axes[0], axes[1])
            if summed is None:
                return [kept], inputs
            self.sums.append(Sum(times, size_of(eqn.outvars[0].aval)))
            cut = [self._cut_to(v, axis) for v, axis in zip(inputs, summed, strict=True)]
            return whole, cut
        first = next(i for i, axis in enumerate(axes) if axis is not None)
        axis, shape = axes[first], eqn.invars[first].aval.shape
        if name in REDUCTIONS and axis in eqn.params["axes"]:
            self.sums += [Sum(times, size_of(v.aval)) for v in eqn.outvars]
            return whole, inputs
        found = [
            _HANDED_ON.get(name, _same)(eqn, axis, shape, v.aval.shape, self.devices)
            for v in eqn.outvars
        ]
        return found, inputs

    def _cut_to(self, value: Any, axis: int) -> Any:
        """The part of an operand that a device multiplies with."""
        return Value(value.aval, axis, self.devices) if _axis(value) is None else value


def _axis(atom: Any) -> Axis:
    return getattr(atom, "axis", None)


def _cut(aval: Any, axis: int, devices: int) -> Any:
    shape = list(aval.shape)
    shape[axis] //= devices
    return jax.ShapeDtypeStruct(tuple(shape), aval.dtype)


def _dot(eqn: Any, left: Axis, right: Axis) -> tuple[Axis, tuple[int, int] | None]:
    """(1): the split axis of the result; or the axes of the operands that are summed over."""
    (summed_left, summed_right), (batch_left, batch_right) = eqn.params["dimension_numbers"]
    if left in summed_left or right in summed_right:
        place = summed_left.index(left) if left in summed_left else summed_right.index(right)
        return None, (summed_left[place], summed_right[place])
    if left in batch_left:
        return batch_left.index(left), None
    if right in batch_right:
        return batch_right.index(right), None
    free = _others(eqn.invars[0].aval.ndim, (*summed_left, *batch_left))
    if left is not None:
        return len(batch_left) + free.index(left), None
    if right is None:
        return None, None
    other = _others(eqn.invars[1].aval.ndim, (*summed_right, *batch_right))
    return len(batch_left) + len(free) + other.index(right), None


def _others(count: int, taken: Sequence[int]) -> list[int]:
    return [i for i in range(count) if i not in taken]


def _convolution(eqn: Any, left: Axis, right: Axis) -> tuple[Axis, tuple[int, int] | None]:
    """(1) of a convolution: its batch and channels. Of one in groups the result is whole."""
    if eqn.params["feature_group_count"] * eqn.params["batch_group_count"] > 1:
        return None, None
    x, kernel, out = eqn.params["dimension_numbers"]
    if left == x[1] or right == kernel[1]:
        return None, (x[1], kernel[1])
    if left == x[0]:
        return out[0], None
    return (out[1] if right == kernel[0] else None), None


def _same(eqn: Any, axis: int, old: Sequence[int], new: Sequence[int], devices: int) -> Axis:
    """(4)."""
    return axis if len(old) == len(new) else None


def _reshaped(eqn: Any, axis: int, old: Sequence[int], new: Sequence[int], devices: int) -> Axis:
    """(3): of the new axes that share elements' places with the old one."""
    start = math.prod(old[:axis])
    end = start * old[axis]
    before = 1
    for i, n in enumerate(new):
        if before < end and before * n > start and n % devices == 0:
            return i
        before *= n
    return None


def _broadcast(eqn: Any, axis: int, *_: Any) -> Axis:
    return eqn.params["broadcast_dimensions"][axis]


def _transposed(eqn: Any, axis: int, *_: Any) -> Axis:
    return tuple(eqn.params["permutation"]).index(axis)


def _reduced(eqn: Any, axis: int, *_: Any) -> Axis:
    return axis - sum(a < axis for a in eqn.params["axes"])


def _nowhere(*_: Any) -> Axis:
    return None


_HANDED_ON: dict[str, Callable[..., Axis]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "transpose": _transposed,
    **dict.fromkeys(REDUCTIONS, _reduced),
    **dict.fromkeys(("gather", "scatter", "scatter-add"), _nowhere),
}
