"""The work of a program from its jaxpr: products, the bytes they move, the temporaries they need.

Nothing is run or allocated: `jax.make_jaxpr` of shapes is enough. Symbols: a product is a
`dot_general` or a convolution; it has output elements o, K multiply-adds for each of them, and
reads and writes b bytes.

    FLOPs of a product     2 o K                                                            (1)

K is the length of the contraction; for a convolution the taps of the kernel times the input
channels that an output sees. Taps that fall on padding count, as the hardware and the common
counters have it; those that fall on the zeros between the elements of a dilated input do not: they
are left out by dividing by the dilation.

A scan counts as often as it runs, a `while` once (`endless` says that there was one), of the
branches of a `cond` the dearest.

Traffic is that of ideal fusion: a product reads its operands and writes its result once, a
reduction reads its operand; whatever is done element by element rides along.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CONVOLUTION = "conv_general_dilated"
DOT = "dot_general"
PRODUCTS = (DOT, CONVOLUTION)
# Calls that a compiler inlines.
CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_lin",
)
REDUCTIONS = (
    "argmax",
    "argmin",
    "reduce_and",
    "reduce_max",
    "reduce_min",
    "reduce_or",
    "reduce_prod",
    "reduce_sum",
)


class Operation(NamedTuple):
    """A product or a reduction: how often it runs, its FLOPs, its bytes, its operands' dtype."""

    times: float
    flops: float
    traffic: float
    dtype: str


class Work(NamedTuple):
    """What a program does. endless: it holds a `while`, whose body is counted once."""

    operations: tuple[Operation, ...]
    endless: bool = False

    @property
    def flops(self) -> float:
        """FLOPs of all products."""
        return sum(op.times * op.flops for op in self.operations)

    @property
    def traffic(self) -> float:
        """Bytes that products and reductions read and write."""
        return sum(op.times * op.traffic for op in self.operations)

    def __add__(self, other: Any) -> "Work":
        return Work(self.operations + other.operations, self.endless or other.endless)


def work_of(function: Callable[..., Any], *arguments: Any) -> Work:
    """The work of function(*arguments); the arguments may be `ShapeDtypeStruct`s."""
    return work(jax.make_jaxpr(function)(*arguments).jaxpr)


def work(jaxpr: Any, times: float = 1) -> Work:
    """The work of a jaxpr that runs `times` times."""
    total = Work(())
    for eqn in jaxpr.eqns:
        total += _COUNTERS.get(eqn.primitive.name, _inner)(eqn, times)
    return total


def size_of(aval: Any) -> int:
    """Bytes of an array's abstract value. Keys count with their words."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        aval = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return math.prod(aval.shape) * aval.dtype.itemsize


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves of a tree of shapes."""
    return sum(size_of(leaf) for leaf in jax.tree.leaves(tree))


def inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _traffic(variables: Sequence[Any]) -> int:
    return sum(size_of(v.aval) for v in variables)


def _operation(eqn: Any, times: float, multiply_adds: float) -> Work:
    traffic = _traffic(eqn.invars) + _traffic(eqn.outvars)
    dtype = str(eqn.invars[0].aval.dtype)
    return Work((Operation(times, 2 * multiply_adds, traffic, dtype),))


def _dot(eqn: Any, times: float) -> Work:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    length = math.prod(shape[axis] for axis in contracted)
    return _operation(eqn, times, math.prod(eqn.outvars[0].aval.shape) * length)


def _convolution(eqn: Any, times: float) -> Work:
    # rhs_spec: (output channels, input channels of a group, spatial axes...).
    _, channels, *spatial = eqn.params["dimension_numbers"].rhs_spec
    kernel = eqn.invars[1].aval.shape
    taps = math.prod(kernel[axis] for axis in spatial) / math.prod(eqn.params["lhs_dilation"])
    return _operation(eqn, times, math.prod(eqn.outvars[0].aval.shape) * taps * kernel[channels])


def _reduction(eqn: Any, times: float) -> Work:
    return Work((Operation(times, 0, _traffic(eqn.invars), str(eqn.invars[0].aval.dtype)),))


def _scan(eqn: Any, times: float) -> Work:
    return work(eqn.params["jaxpr"].jaxpr, times * eqn.params["length"])


def _while(eqn: Any, times: float) -> Work:
    return _inner(eqn, times)._replace(endless=True)


def _cond(eqn: Any, times: float) -> Work:
    return max((work(b.jaxpr, times) for b in eqn.params["branches"]), key=lambda w: w.flops)


def _inner(eqn: Any, times: float) -> Work:
    total = Work(())
    for jaxpr in inner_jaxprs(eqn.params):
        total += work(jaxpr, times)
    return total


_COUNTERS: dict[str, Callable[[Any, float], Work]] = {
    DOT: _dot,
    CONVOLUTION: _convolution,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(REDUCTIONS, _reduction),
}
