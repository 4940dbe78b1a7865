"""What an adaptive method is, and the embedded Runge-Kutta methods of the probability flow.

Symbols: u the clock, a variable that runs from u0 to u1 as t runs from t0 to t1; v = alpha' x0 +
sigma' eps the velocity of the probability flow; lam = ln(alpha/sigma), half the log-SNR.

    dx/dt = v(x, t)                                clock "t"                                     (1)
    dx/dlam = v(x, t(lam)) dt/dlam                 clock "log_snr"                               (2)

An adaptive method is a frozen value, equal and hashed by what it holds, so that it may be static
under `jit` or part of a tree (it has no leaves). Its numbers that may be traced are the
controller's. It has

    order           p of `PIController`: the error of a step is of order h^p
    stages          calls of the denoiser in an attempt;  start_stages: those before the first one
    stochastic      whether it draws, and so runs towards the data only
    controller()    the tolerances and the rule that its paper uses
    check(process, t0, t1)      raises ValueError where it cannot start or end there
    clock(process, t) -> u
    start(problem, x) -> (memory, h)                            h the signed first step (B,) in u
    limit(memory) -> (B,) or None               the largest step that it can make from here
    attempt(keys, problem, at, u_next, h) -> Trial              see `diffjax.solvers.adaptive`

keys (B,) are one a sample and new at every attempt. A method asks at u_next = u1 for the time t1
itself, whatever the rounding of its clock.
"""

import dataclasses
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import batch_size, scale
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import inverse_log_snr, log_snr, velocity
from diffjax.solvers.adaptive import PIController, Progress, Trial, embedded, first_step
from diffjax.solvers.tableaus import DORMAND_PRINCE, Tableau


class Problem(NamedTuple):
    """What a method works on. t0, t1, u0, u1: (), the ends in t and on the method's clock."""

    denoise: DenoiseFn
    process: Process
    controller: PIController
    t0: Array
    t1: Array
    u0: Array
    u1: Array


class AdaptiveMethod(Protocol):
    """See the module's docstring."""

    @property
    def order(self) -> int: ...

    @property
    def stages(self) -> int: ...

    @property
    def start_stages(self) -> int: ...

    @property
    def stochastic(self) -> bool: ...

    def controller(self) -> PIController: ...

    def check(self, process: Process, t0: Number, t1: Number) -> None: ...

    def clock(self, process: Process, t: Array) -> Array: ...

    def start(self, problem: Problem, x: PyTree) -> tuple[PyTree, Array]: ...

    def limit(self, memory: PyTree) -> Array | None: ...

    def attempt(
        self, keys: Key, problem: Problem, at: Progress, u_next: Array, h: Array
    ) -> Trial: ...


def half_log_snr(process: Process, t: Array) -> Array:
    """lam = ln(alpha/sigma), shaped like t."""
    return log_snr(process, t) / 2


def time_at(problem: Problem, lam: Array) -> Array:
    """The t of lam, shaped like it: within [t0, t1] either way, and t1 itself at the end."""
    low, high = jnp.minimum(problem.t0, problem.t1), jnp.maximum(problem.t0, problem.t1)
    t = jnp.clip(inverse_log_snr(problem.process, 2 * lam).astype(lam.dtype), low, high)
    return jnp.where(lam == problem.u1, problem.t1, t)


def check_log_snr(name: str, process: Process, *times: Number) -> None:
    """Raises ValueError where the log-SNR is known and infinite, or is none of t's shape."""
    for t in times:
        if checks.concrete(t) is None:
            continue
        lam = checks.evaluated(lambda t: half_log_snr(process, jnp.asarray(t, float)), t)
        if lam is not None and lam.ndim > 0:
            raise ValueError(
                f"{name} steps in the log-SNR, and a schedule per pixel has no single one. Use "
                "EmbeddedRungeKutta(), which steps in t."
            )
        if lam is not None and not abs(lam) < float("inf"):
            raise ValueError(
                f"{name} steps in the log-SNR, which is infinite at t = {t}: start or end a little "
                "inside, or use EmbeddedRungeKutta(), which steps in t."
            )


def small_step(problem: Problem, x: PyTree, size: Array | float) -> Array:
    """A signed first step of that size on the clock, at most the whole way, (B,)."""
    span = problem.u1 - problem.u0
    h = jnp.sign(span) * jnp.minimum(jnp.asarray(size, span.dtype), jnp.abs(span))
    return jnp.broadcast_to(h, (batch_size(x),))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class EmbeddedRungeKutta:
    """A tableau on the probability flow, eq. (1) or (2).

    The first step costs two calls, each attempt `tableau.stages`. variable: of the steps;
    the solution is the same.
    """

    tableau: Tableau = DORMAND_PRINCE
    variable: Literal["t", "log_snr"] = "t"

    def __post_init__(self):
        checks.one_of("variable", self.variable, ("t", "log_snr"))
        if not self.tableau.e:
            raise ValueError(
                "This tableau has no embedded method, so its error is unknown: use "
                "DORMAND_PRINCE, BOGACKI_SHAMPINE or HEUN."
            )

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def stages(self) -> int:
        return self.tableau.stages

    @property
    def start_stages(self) -> int:
        return 2

    stochastic = False

    def controller(self) -> PIController:
        """rtol = atol = 1e-5, as the reference code of score SDEs has it."""
        return PIController()

    def check(self, process: Process, t0: Number, t1: Number) -> None:
        """Raises ValueError for ends of infinite log-SNR where that is the clock."""
        if self.variable == "log_snr":
            check_log_snr("EmbeddedRungeKutta(variable='log_snr')", process, t0, t1)

    def clock(self, process: Process, t: Array) -> Array:
        """t, or half the log-SNR."""
        return t if self.variable == "t" else half_log_snr(process, t)

    def start(self, problem: Problem, x: PyTree) -> tuple[PyTree, Array]:
        """The first slope and step: two calls."""
        u0 = jnp.broadcast_to(problem.u0, (batch_size(x),))
        field = self._field(problem)
        return first_step(field, x, u0, problem.u1, self.tableau, problem.controller)

    def limit(self, memory: PyTree) -> None:
        """None."""

    def attempt(self, keys: Key, problem: Problem, at: Progress, u_next: Array, h: Array) -> Trial:
        """The step and the difference to the embedded one."""
        return embedded(self._field(problem), self.tableau, problem.controller, at, u_next, h)

    def _field(self, problem: Problem):
        process, denoise = problem.process, problem.denoise

        def in_time(t: Array, x: PyTree) -> PyTree:
            return velocity(process, denoise(x, t), t)

        def in_log_snr(lam: Array, x: PyTree) -> PyTree:
            t = time_at(problem, lam)
            slope = jax.jvp(lambda t: half_log_snr(process, t), (t,), (jnp.ones_like(t),))[1]
            return scale(1 / slope, in_time(t, x))

        return in_time if self.variable == "t" else in_log_snr
