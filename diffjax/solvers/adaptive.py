"""A step size for each sample: the controller, the loop, and embedded Runge-Kutta methods.

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

The controller and the loop (`begin`, `advance`, `run`) know nothing of the method: it gives a start
and, for each attempt, a `Trial`. `integrate` drives (1) with them; the methods for which the clock
is another variable than t, or which draw, are in `diffjax.solvers.dpm_adaptive` and
`diffjax.solvers.adaptive_sde`, and use a norm of their own:

    err = max over leaves of rms(e / max(atol, rtol max(|y|, |y'|)))                            (4)

With pc = 0, (3) is the rule of SciPy's `solve_ivp`, as is the first step [2]. After a rejection a
step may not grow, but by `after_rejection`.

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

import functools
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
    scale,
    select,
    size_per_sample,
    sum_per_sample,
)
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, Number, PyTree
from diffjax.solvers.tableaus import DORMAND_PRINCE, Tableau

NO_REVERSE = (
    "An adaptive solve runs as long as it must, so reverse mode cannot go through it. Use forward "
    "mode (jax.jvp, jax.jacfwd), or PIController(bounded=True, max_steps=...), which takes at most "
    "that many steps and stores the state of each, or a solver over a grid under diffjax.sample."
)

VectorField = Callable[[Array, PyTree], PyTree]  # (t (B,), y) -> dy/dt like y


@pytree
class PIController:
    """The step rule (3), per sample.

    rtol, atol: relative and absolute tolerance of a step. pcoeff, icoeff: pc and ic; (0, 1) is the
    elementary rule, (0.4, 0.3) a smooth one for stiff problems. after_rejection: the largest factor
    of a step that follows a rejected one. max_steps: attempts, accepted or not, before a sample is
    given up. bounded: the form that reverse mode can go through; choose max_steps as small as the
    problem allows.
    """

    rtol: Number = 1e-5
    atol: Number = 1e-5
    pcoeff: Number = 0.0
    icoeff: Number = 1.0
    safety: Number = 0.9
    min_factor: Number = 0.2
    max_factor: Number = 10.0
    after_rejection: Number = 1.0
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
        checks.positive("after_rejection", self.after_rejection)
        checks.at_least("max_steps", self.max_steps, 1)

    def error(self, e: PyTree, y: PyTree, y_next: PyTree) -> Array:
        """Eq. (2), (B,)."""

        def ratio(e, y, y_next):
            return e / (self.atol + self.rtol * jnp.maximum(jnp.abs(y), jnp.abs(y_next)))

        return _largest_rms(jax.tree.map(ratio, e, y, y_next))

    def error_by_larger(self, e: PyTree, y: PyTree, other: PyTree) -> Array:
        """Eq. (4), (B,): the larger of the two tolerances, in place of their sum."""

        def ratio(e, y, other):
            return e / jnp.maximum(self.atol, self.rtol * jnp.maximum(jnp.abs(y), jnp.abs(other)))

        return _largest_rms(jax.tree.map(ratio, e, y, other))

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


class Progress(NamedTuple):
    """How far each sample is, all (B, ...). t: the clock. memory: what the method keeps."""

    t: Array
    y: PyTree
    memory: PyTree
    h: Array
    error: Array  # of the last accepted step
    after_rejection: Array
    accepted: Array
    rejected: Array
    running: Array


class Trial(NamedTuple):
    """What an attempt would lead to: y and memory at its end, and its error (B,).

    It is accepted where the error is at most 1. memory_if_rejected: what stays known otherwise.
    """

    y: PyTree
    memory: PyTree
    error: Array
    memory_if_rejected: PyTree


Attempt = Callable[[Progress, Array, Array], Trial]  # (where it starts, its end t, its step h)


def begin(y: PyTree, memory: PyTree, t0: Array, t1: Array, h: Array) -> Progress:
    """At t0 with a first step h. t0: (B,). t1: (B,) or ()."""
    zero = jnp.zeros(t0.shape, jnp.int32)
    return Progress(
        t=t0,
        y=y,
        memory=memory,
        h=h,
        error=jnp.ones_like(t0),
        after_rejection=zero.astype(bool),
        accepted=zero,
        rejected=zero,
        running=t0 != t1,
    )


def advance(
    attempt: Attempt,
    at: Progress,
    t1: Array,
    controller: PIController,
    order: int,
    limit: Array | None = None,
) -> Progress:
    """One step of every sample that is still running, kept where its error allows, eq. (3).

    limit: (B,), a size that the step may not exceed, or None. A step within 1% of it takes it.
    """
    t, running = at.t, at.running
    remaining, h = t1 - t, at.h
    last = jnp.abs(h) >= jnp.abs(remaining)
    if limit is not None:
        h = jnp.sign(h) * jnp.where(jnp.abs(h) > 0.99 * limit, limit, jnp.abs(h))
        # Landing on a limit that is the end but for rounding would leave a step of nothing.
        slack = 8 * jnp.finfo(t.dtype).eps * jnp.maximum(jnp.abs(t), jnp.abs(t1))
        last = jnp.abs(h) >= jnp.abs(remaining) - slack
    h = jnp.where(last, remaining, h)
    t_next = jnp.where(last, t1, t + h)  # exact landing
    trial = attempt(at, t_next, h)
    error = trial.error.astype(h.dtype)

    accept = running & (error <= 1)
    reject = running & ~(error <= 1)  # also where the error is not a number
    factor = controller.factor(error, at.error, order).astype(h.dtype)
    held = jnp.minimum(factor, controller.after_rejection)
    factor = jnp.where(at.after_rejection | reject, held, factor)
    h_next = jnp.where(running, h * factor, at.h)

    memory = select(accept, trial.memory, at.memory)
    if trial.memory_if_rejected is not at.memory:
        memory = select(reject, trial.memory_if_rejected, memory)

    t = jnp.where(accept, t_next, t)
    attempts = at.accepted + at.rejected + 1
    stuck = t + h_next == t
    return Progress(
        t=t,
        y=select(accept, trial.y, at.y),
        memory=memory,
        h=h_next,
        error=jnp.where(accept, error, at.error),
        after_rejection=jnp.where(running, reject, at.after_rejection),
        accepted=at.accepted + accept,
        rejected=at.rejected + reject,
        running=running & (t != t1) & ~stuck & (attempts < controller.max_steps),
    )


def run(
    step: Callable[[Progress], Progress], start: Progress, controller: PIController
) -> Progress:
    """`step` until no sample is running; `bounded` as a scan that recomputes backwards."""
    going = lambda at: jnp.any(at.running)  # noqa: E731
    if not controller.bounded:
        return jax.lax.while_loop(going, step, start)

    def body(at, _):
        return jax.lax.cond(going(at), step, lambda at: at, at), None

    return jax.lax.scan(jax.checkpoint(body), start, length=controller.max_steps)[0]


def landed(end: Progress, t1: Array, controller: PIController) -> tuple[PyTree, Array]:
    """(y, NaN for samples that were given up; whether each arrived (B,))."""
    arrived = end.t == t1
    y = select(arrived, end.y, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), end.y))
    return (y if controller.bounded else forward_only(y, NO_REVERSE)), arrived


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
    if not tableau.e:
        raise ValueError(
            "This tableau has no embedded method, so its error is unknown: use DORMAND_PRINCE, "
            "BOGACKI_SHAMPINE or HEUN, or RungeKutta(tableau) over a grid."
        )
    batch = batch_size(y)
    dtype = jnp.result_type(*jax.tree.leaves(y))
    t, t1 = (jnp.broadcast_to(jnp.asarray(a, dtype), (batch,)) for a in (t0, t1))
    slope, h = first_step(field, y, t, t1, tableau, controller)

    def step(at):
        trial = functools.partial(embedded, field, tableau, controller)
        return advance(trial, at, t1, controller, tableau.order)

    end = run(step, begin(y, slope, t, t1, h), controller)
    y, arrived = landed(end, t1, controller)
    nfe = 2 + tableau.stages * (end.accepted + end.rejected)
    return Solution(y, nfe, end.accepted, end.rejected, arrived)


def embedded(
    field: VectorField,
    tableau: Tableau,
    controller: PIController,
    at: Progress,
    t_next: Array,
    h: Array,
) -> Trial:
    """An attempt of eq. (1); its memory is the slope f(t, y)."""
    rows, nodes = jnp.asarray(tableau.matrix(), h.dtype), jnp.asarray(tableau.c, h.dtype)[:, None]
    times = jnp.where(nodes == 1, t_next[None], at.t[None] + nodes * h[None])
    weights = rows[..., None] * h[None, None]
    y_next, slopes = staged(field, at.y, [at.memory], times, jnp.ones_like(times), weights)
    e = combine(*((w * h, k) for w, k in zip(np.asarray(tableau.e), slopes, strict=True)))
    # Steps are held constant: what they are chosen by has no derivative where the error is 0.
    error = controller.error(*jax.lax.stop_gradient((e, at.y, y_next)))
    return Trial(y_next, slopes[-1], error, at.memory)


def staged(
    call: VectorField,
    y: PyTree,
    given: list[PyTree],
    times: Array,
    bases: Array,
    weights: Array,
) -> tuple[PyTree, list[PyTree]]:
    """The stages of a step: (the last point that was asked, [*given, the S answers]).

    Stage i asks at times[i], the point bases[i] y + sum_j weights[i, j] k_j over all that is known
    by then. given: G trees like y. times, bases: (S, B). weights: (S, G + S, B), 0
    for what is not known yet.

    A scan, so that a program holds one copy of f and not one a stage: compiling a network and its
    derivative is what a solve waits for first. The stages are apart in the carry, as sums over
    them then run as one pass over memory.
    """
    later = [jax.tree.map(jnp.zeros_like, y)] * times.shape[0]

    def stage(carry, i):
        later, _ = carry
        terms = zip(weights[i], [*given, *later], strict=True)
        ahead = jax.tree.map(jnp.add, scale(bases[i], y), combine(*terms))
        k = call(times[i], ahead)
        later = [
            jax.tree.map(lambda new, old, j=j: jnp.where(i == j, new, old), k, old)
            for j, old in enumerate(later)
        ]
        return (later, ahead), None

    (later, last), _ = jax.lax.scan(stage, (later, y), jnp.arange(times.shape[0]))
    return last, [*given, *later]


def first_step(
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

    _, slopes = jax.lax.scan(call, (t0, y), length=2)  # one copy of f, as in `staged`
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
