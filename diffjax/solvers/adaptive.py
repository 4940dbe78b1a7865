"""Embedded Runge-Kutta methods with a step size for each sample.

Symbols: y' = f(t, y) from t0 to t1; h the signed step; k_i the stages of a tableau (a, b, c) of
order p; e the difference to the embedded method of order p - 1, with weights e_i of its own.

    k_i = f(t + c_i h, y + h sum_j a_ij k_j),   y+ = y + h sum_i b_i k_i,   e = h sum_i e_i k_i
                                                                                               (1)
    err = max over leaves of rms(e / (atol + rtol max(|y|, |y+|)))                             (2)
    accept if err <= 1;   h <- h clip(safety err^(-(pc+ic)/p) err_prev^(pc/p), min, max)       (3)

Each sample has its own t, h, error and count of calls, in one `while_loop`: a sample's path, its
cost and its result do not depend on its neighbours, and one that has arrived is left as it is while
others go on (the loop runs as long as the slowest). In (2) a leaf is one quantity: a log-density
carried beside an image counts as much as the image, not as one element of it.

With pc = 0, (3) is the rule of SciPy's `solve_ivp`, as is the first step [2]. After a rejection a
step may not grow.

Derivatives are those of the steps taken, which are held constant. Forward mode always works; JAX
has no reverse mode through a `while_loop`. `PIController(bounded=True)` scans over `max_steps`
attempts instead, each recomputed backwards: reverse mode works, for max_steps times the memory of
the state and the overhead of attempts that are skipped.

References:
[1] Dormand, Prince, "A family of embedded Runge-Kutta formulae", 1980,
    https://doi.org/10.1016/0771-050X(80)90013-3.
[2] Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", 1993, section II.4,
    https://doi.org/10.1007/978-3-540-78862-1.
[3] Soderlind, "Digital filters in adaptive time-stepping", 2003,
    https://doi.org/10.1145/641876.641877, for the exponents of (3).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks
from diffjax.core.autodiff import forward_only
from diffjax.core.numerics import (
    batch_size,
    combine,
    size_per_sample,
    sum_per_sample,
)
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, Number, PyTree

NO_REVERSE = (
    "An adaptive solve runs as long as it must, so reverse mode cannot go through it. Use forward "
    "mode (jax.jvp, jax.jacfwd), or PIController(bounded=True, max_steps=...), which takes at most "
    "that many steps and stores the state of each, or a solver over a grid under diffjax.sample."
)

VectorField = Callable[[Array, PyTree], PyTree]  # (t (B,), y) -> dy/dt like y


class Tableau(NamedTuple):
    """The numbers of (1) for a method whose last stage is the next step's first.

    a: the rows below the diagonal, from the second stage on; the last row is b. c: from the second
    stage on. e: the weights of the error, one more than b. order: p, of the solution kept.
    """

    a: tuple[tuple[float, ...], ...]
    c: tuple[float, ...]
    e: tuple[float, ...]
    order: int

    @property
    def stages(self) -> int:
        """S, the new calls of f in a step."""
        return len(self.a)

    def matrix(self) -> np.ndarray:
        """The rows of a padded with zeros, (S, S + 1)."""
        width = self.stages + 1
        return np.asarray([(*row, *(0.0,) * (width - len(row))) for row in self.a])


DORMAND_PRINCE = Tableau(  # 5(4) with seven stages, [1]
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    c=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    e=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    order=5,
)


@pytree
class PIController:
    """The step rule (3), per sample.

    rtol, atol: relative and absolute tolerance of a step. pcoeff, icoeff: pc and ic; (0, 1) is the
    elementary rule, (0.4, 0.3) a smooth one for stiff problems. max_steps: attempts, accepted or
    not, before a sample is given up. bounded: the form that reverse mode can go through; choose
    max_steps as small as the problem allows.
    """

    rtol: Number = 1e-5
    atol: Number = 1e-5
    pcoeff: Number = 0.0
    icoeff: Number = 1.0
    safety: Number = 0.9
    min_factor: Number = 0.2
    max_factor: Number = 10.0
    max_steps: int = static(default=4096)
    bounded: bool = static(default=False)

    def __post_init__(self):
        checks.non_negative("rtol", self.rtol)
        checks.positive("atol", self.atol)
        checks.non_negative("pcoeff", self.pcoeff)
        checks.positive("icoeff", self.icoeff)
        checks.in_range("safety", self.safety, 0.0, 1.0)
        checks.in_range("min_factor", self.min_factor, 0.0, 1.0)
        checks.less("1", 1.0, "max_factor", self.max_factor)
        checks.at_least("max_steps", self.max_steps, 1)

    def error(self, e: PyTree, y: PyTree, y_next: PyTree) -> Array:
        """Eq. (2), (B,)."""

        def ratio(e, y, y_next):
            return e / (self.atol + self.rtol * jnp.maximum(jnp.abs(y), jnp.abs(y_next)))

        return _largest_rms(jax.tree.map(ratio, e, y, y_next))

    def factor(self, error: Array, previous: Array, order: int) -> Array:
        """The factor on h of (3), (B,), before the rule for rejections."""
        tiny = jnp.finfo(error.dtype).tiny
        now, before = jnp.maximum(error, tiny), jnp.maximum(previous, tiny)
        factor = self.safety * now ** (-(self.pcoeff + self.icoeff) / order)
        factor = factor * before ** (self.pcoeff / order)
        # An error that is not a number is a rejection like any other, with the largest cut.
        factor = jnp.where(jnp.isfinite(error), factor, self.min_factor)
        return jnp.clip(factor, self.min_factor, self.max_factor)


class Solution(NamedTuple):
    """What `integrate` returns, each (B,) but y.

    y: at t1, like y0; NaN for samples that were given up. nfe: calls of f that the sample needed.
    accepted, rejected: steps. arrived: whether the sample reached t1.
    """

    y: PyTree
    nfe: Array
    accepted: Array
    rejected: Array
    arrived: Array


class _Carry(NamedTuple):
    t: Array
    y: PyTree
    slope: PyTree  # f(t, y)
    h: Array
    error: Array  # of the last accepted step
    after_rejection: Array
    accepted: Array
    rejected: Array
    running: Array


def integrate(
    field: VectorField,
    y: PyTree,
    t0: Number,
    t1: Number,
    *,
    tableau: Tableau = DORMAND_PRINCE,
    controller: PIController = PIController(),
) -> Solution:
    """Solves y' = field(t, y) from t0 to t1, either way in time, eqs. (1) to (3).

    field: (t (B,), y) -> dy/dt like y; row i may depend on row i only. y: a tree of floating arrays
    (B, ...), float32 or float64. t0, t1: () or (B,), the same for all samples or not.

    The first step costs two calls, each attempt `tableau.stages`. A sample whose step falls below
    the spacing of floats, or that needs more than `controller.max_steps`, is given up: its y is NaN
    and `arrived` False.
    """
    batch = batch_size(y)
    dtype = jnp.result_type(*jax.tree.leaves(y))
    t, t1 = (jnp.broadcast_to(jnp.asarray(a, dtype), (batch,)) for a in (t0, t1))
    slope, h = _start(field, y, t, t1, tableau, controller)
    zero = jnp.zeros((batch,), jnp.int32)
    start = _Carry(
        t=t,
        y=y,
        slope=slope,
        h=h,
        error=jnp.ones((batch,), dtype),
        after_rejection=zero.astype(bool),
        accepted=zero,
        rejected=zero,
        running=t != t1,
    )

    def attempt(carry):
        return _attempt(field, carry, t1, tableau, controller)

    going = lambda carry: jnp.any(carry.running)  # noqa: E731
    if controller.bounded:
        end = _scan_while(going, attempt, start, controller.max_steps)
    else:
        end = jax.lax.while_loop(going, attempt, start)
    arrived = end.t == t1
    y = jax.tree.map(lambda leaf: jnp.where(_align(arrived, leaf), leaf, jnp.nan), end.y)
    y = y if controller.bounded else forward_only(y, NO_REVERSE)
    nfe = 2 + tableau.stages * (end.accepted + end.rejected)
    return Solution(y, nfe, end.accepted, end.rejected, arrived)


def _attempt(
    field: VectorField, carry: _Carry, t1: Array, tableau: Tableau, controller: PIController
) -> _Carry:
    """One step of every sample that is still running, kept where its error allows."""
    t, y, running = carry.t, carry.y, carry.running
    remaining = t1 - t
    last = jnp.abs(carry.h) >= jnp.abs(remaining)
    h = jnp.where(last, remaining, carry.h)
    t_next = jnp.where(last, t1, t + h)  # exact landing
    y_next, stages = _stages(field, t, t_next, y, carry.slope, h, tableau)
    e = _weighted(np.asarray(tableau.e), h, stages)
    # Steps are held constant: what they are chosen by has no derivative where the error is 0.
    error = controller.error(*jax.lax.stop_gradient((e, y, y_next))).astype(h.dtype)

    accept = running & (error <= 1)
    reject = running & ~(error <= 1)  # also where the error is not a number
    factor = controller.factor(error, carry.error, tableau.order).astype(h.dtype)
    factor = jnp.where(carry.after_rejection | reject, jnp.minimum(factor, 1.0), factor)
    h_next = jnp.where(running, h * factor, carry.h)

    def select(new, old):
        return jax.tree.map(lambda a, b: jnp.where(_align(accept, a), a, b), new, old)

    t = jnp.where(accept, t_next, t)
    attempts = carry.accepted + carry.rejected + 1
    stuck = t + h_next == t
    return _Carry(
        t=t,
        y=select(y_next, y),
        slope=select(stages[-1], carry.slope),
        h=h_next,
        error=jnp.where(accept, error, carry.error),
        after_rejection=jnp.where(running, reject, carry.after_rejection),
        accepted=carry.accepted + accept,
        rejected=carry.rejected + reject,
        running=running & (t != t1) & ~stuck & (attempts < controller.max_steps),
    )


def _scan_while(
    going: Callable[[_Carry], Array],
    attempt: Callable[[_Carry], _Carry],
    start: _Carry,
    most: int,
) -> _Carry:
    """`while_loop` of at most so many rounds, as a scan that recomputes each round backwards."""

    def body(carry, _):
        return jax.lax.cond(going(carry), attempt, lambda carry: carry, carry), None

    return jax.lax.scan(jax.checkpoint(body), start, length=most)[0]


def _stages(
    field: VectorField,
    t: Array,
    t_next: Array,
    y: PyTree,
    slope: PyTree,
    h: Array,
    tableau: Tableau,
) -> tuple[PyTree, list[PyTree]]:
    """y+, and k_0 ... k_S of eq. (1).

    A scan, so that a program holds one copy of f and not one a stage: compiling a network and its
    derivative is what a solve waits for first. The stages are apart in the carry, as sums over
    them then run as one pass over memory.
    """
    rows, nodes = jnp.asarray(tableau.matrix(), h.dtype), jnp.asarray(tableau.c, h.dtype)
    later = [jax.tree.map(jnp.zeros_like, slope)] * tableau.stages

    def stage(carry, i):
        later, _ = carry
        ahead = jax.tree.map(jnp.add, y, _weighted(rows[i], h, [slope, *later]))
        k = field(jnp.where(nodes[i] == 1, t_next, t + nodes[i] * h), ahead)
        later = [
            jax.tree.map(lambda new, old, j=j: jnp.where(i == j, new, old), k, old)
            for j, old in enumerate(later)
        ]
        return (later, ahead), None

    (later, y_next), _ = jax.lax.scan(stage, (later, y), jnp.arange(tableau.stages))
    return y_next, [slope, *later]


def _weighted(weights: Array | np.ndarray, h: Array, stages: list[PyTree]) -> PyTree:
    """h sum_i w_i k_i, like y. weights: (S + 1,). h: (B,)."""
    return combine(*((w * h, k) for w, k in zip(weights, stages, strict=True)))


def _start(
    field: VectorField,
    y: PyTree,
    t0: Array,
    t1: Array,
    tableau: Tableau,
    controller: PIController,
) -> tuple[PyTree, Array]:
    """f(t0, y), and the signed first step (B,) after Hairer, Norsett and Wanner [2]: two calls."""
    span = jax.lax.stop_gradient(t1 - t0)

    def size(tree):
        held = jax.lax.stop_gradient((tree, y))
        return controller.error(held[0], held[1], held[1]).astype(t0.dtype)

    def trial(slope):
        """A small step by which f should change a little."""
        d0, d1 = size(y), size(slope)
        small = (d0 < 1e-5) | (d1 < 1e-5)
        h0 = jnp.where(small, 1e-6, 0.01 * d0 / jnp.where(small, 1.0, d1))
        return jnp.minimum(h0, jnp.abs(span))

    def call(point, _):
        slope = field(*point)
        h = jnp.sign(span) * trial(slope)
        return (t0 + h, combine((jnp.ones_like(h), y), (h, slope))), slope

    _, slopes = jax.lax.scan(call, (t0, y), length=2)  # one copy of f, as in `_stages`
    first, second = (jax.tree.map(lambda k, i=i: k[i], slopes) for i in (0, 1))
    h0 = trial(first)
    d2 = size(jax.tree.map(jnp.subtract, second, first)) / jnp.where(h0 > 0, h0, 1.0)
    largest = jnp.maximum(size(first), d2)
    flat = largest <= 1e-15
    h1 = (0.01 / jnp.where(flat, 1.0, largest)) ** (1 / tableau.order)
    h1 = jnp.where(flat, jnp.maximum(1e-6, h0 * 1e-3), h1)
    return first, jnp.sign(span) * jnp.minimum(jnp.minimum(100 * h0, h1), jnp.abs(span))


def _largest_rms(tree: PyTree) -> Array:
    """The largest root-mean-square among a sample's leaves, (B,)."""
    squares = [
        sum_per_sample(jnp.square(leaf)) / size_per_sample(leaf) for leaf in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(jnp.max(jnp.stack(squares), axis=0))


def _align(mask: Array, leaf: Array) -> Array:
    """A mask (B,) aligned with a leaf (B, ...)."""
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - 1))
