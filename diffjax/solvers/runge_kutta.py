"""Runge-Kutta methods on the probability flow over a grid, and EDM's churn.

Symbols: h a step, v(x, t) = alpha' x0 + sigma' eps, sigma~ = sigma/alpha, lam = -2 ln sigma~, z
standard normal, (a, b, c) a tableau of `diffjax.solvers.tableaus`.

    Heun    d = v(x_t, t),   x' = x_t + h d,   x_s = x_t + h/2 (d + v(x', s)),   h = s - t       (1)
    churn   sigma~(t^) = (1 + gamma) sigma~(t),   gamma = min(s_churn/n, sqrt(2) - 1)
            x_t^ = (alpha_t^/alpha_t) x_t + s_noise b z,   b^2 of the transition t -> t^         (2)
            applied where s_min <= sigma~(t) <= s_max and sigma~(t) is finite (a flow at t = 1 has
            no level above), then a step of any solver from t^ to s

On the EDM process (sigma = t) these are algorithms 1 and 2 of [1]. The last interval is one exact
linear step, which for EDM is Euler's: 2n - 1 calls in all, and global order 2 is kept.

The probability flow is one equation in three independent variables:

    u = t         y = x          dy/du = v                                                      (3)
    u = sigma~    y = x/alpha    dy/du = eps                                                    (4)
    u = lam       y = x/alpha    dy/du = -sigma~ eps/2                                          (5)

`RungeKutta` takes a tableau and one of them; its stages are at u_t + c_i (u_s - u_t). In (4) one
step of Euler's method is DDIM. (4) and (5) need sigma~ to be finite: a flow must start below t = 1.

The last interval is again the exact linear step. Its own error is of second order in the last
sigma~, so a method of order 3 and more shows its order where the last interval is short, as on
`grids.karras` and `grids.log_snr` with a small t_min, or with a `final` that steps.

References:
[1] Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364, algorithms 1 and 2.
[2] Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2020,
    https://arxiv.org/abs/2010.02502, section 4.3, for (4).
"""

import math
from typing import Any, Protocol

import jax.numpy as jnp

from diffjax.core import checks, random
from diffjax.core.numerics import combine, safe_sqrt, scale
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, Prediction, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import between, inverse_log_snr, log_snr, velocity
from diffjax.solvers import tableaus
from diffjax.solvers.base import Around, Solver, XState, check_one_step
from diffjax.solvers.euler import linear_step
from diffjax.solvers.stages import linear, run_stages, time_at
from diffjax.solvers.tableaus import Tableau


class Variable(Protocol):
    """An independent variable u(t) of the flow, with the scale c(t) of its y = x/c.

    of_time and to_time are inverse to each other; slope is dy/du, like x, from a prediction at t.
    bounded: whether u and c^-1 are finite where alpha = 0.
    """

    @property
    def bounded(self) -> bool: ...

    def of_time(self, process: Process, t: Array) -> Array: ...

    def to_time(self, process: Process, u: Array, t: Array, s: Array) -> Array:
        """The time of u, between t and s."""
        ...

    def scale(self, process: Process, t: Array) -> Array: ...

    def slope(self, process: Process, prediction: Prediction, t: Array) -> PyTree: ...


@pytree
class InTime:
    """Eq. (3): the process's own time; for every process and start."""

    @property
    def bounded(self) -> bool:
        return True

    def of_time(self, process: Process, t: Array) -> Array:
        return t

    def to_time(self, process: Process, u: Array, t: Array, s: Array) -> Array:
        return u

    def scale(self, process: Process, t: Array) -> Array:
        return jnp.ones_like(t)

    def slope(self, process: Process, prediction: Prediction, t: Array) -> PyTree:
        return velocity(process, prediction, t)


@pytree
class InNoiseLevel:
    """Eq. (4): the noise level sigma/alpha; the slope is eps itself."""

    @property
    def bounded(self) -> bool:
        return False

    def of_time(self, process: Process, t: Array) -> Array:
        at_t = process.coeffs(t)
        return at_t.sigma / at_t.alpha

    def to_time(self, process: Process, u: Array, t: Array, s: Array) -> Array:
        return time_at(process, -2 * jnp.log(u), t, s)

    def scale(self, process: Process, t: Array) -> Array:
        return process.coeffs(t).alpha

    def slope(self, process: Process, prediction: Prediction, t: Array) -> PyTree:
        return prediction.eps


@pytree
class InLogSNR:
    """Eq. (5): the log signal-to-noise ratio."""

    @property
    def bounded(self) -> bool:
        return False

    def of_time(self, process: Process, t: Array) -> Array:
        return log_snr(process, t)

    def to_time(self, process: Process, u: Array, t: Array, s: Array) -> Array:
        return time_at(process, u, t, s)

    def scale(self, process: Process, t: Array) -> Array:
        return process.coeffs(t).alpha

    def slope(self, process: Process, prediction: Prediction, t: Array) -> PyTree:
        at_t = process.coeffs(t)
        return scale(-at_t.sigma / (2 * at_t.alpha), prediction.eps)


def require_signal(process: Process, t: Array, what: str) -> None:
    """Raises ValueError where alpha = 0 at the grid's noisy end, if that is known."""
    known = checks.evaluated(lambda: process.coeffs(t).alpha)
    if known is not None and (known == 0).any():
        raise ValueError(
            f"{what} divides by alpha, which is 0 at the grid's noisy end {t}. Start below "
            "(t_max= of the grid), or use a solver in t: Heun(), RungeKutta(tableau, InTime())."
        )


@pytree
class RungeKutta:
    """An explicit Runge-Kutta method in a variable of one's choice, eqs. (3) to (5).

    tableau: any of `diffjax.solvers.tableaus` or your own; its order is the method's. Its last
    slope, at the end of the step, is not used: Dormand-Prince costs six calls a step.
    """

    tableau: Tableau = static()
    variable: Variable = InTime()

    @property
    def stages(self) -> int:
        return self.tableau.stages

    final_stages = 1
    stochastic = False

    def init(self, process: Process, x: PyTree, t: Array) -> XState:
        """Raises ValueError where the variable is infinite at the start."""
        if not self.variable.bounded:
            require_signal(process, t, f"{type(self.variable).__name__}()")
        return XState(x)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """x_s by the tableau; all stages between t and s."""
        variable, rows = self.variable, self.tableau.matrix()[:, :-1]
        start = variable.of_time(process, t)
        h = variable.of_time(process, s) - start
        times = [t]
        for node in self.tableau.c:
            inside = node != 1  # the end is s itself, without rounding
            times.append(variable.to_time(process, start + node * h, t, s) if inside else s)
        scales = [variable.scale(process, time) for time in times]
        kept = jnp.stack([at / scales[0] for at in scales[1:]])
        weights = jnp.stack(
            [
                jnp.stack([row[j] * h * at for j in range(self.stages)])
                for row, at in zip(rows, scales[1:], strict=True)
            ]
        )

        def slope(x, time):
            return variable.slope(process, denoise(x, time), time)

        point = linear(state.x, kept, weights)
        return XState(run_stages(slope, state.x, jnp.stack(times[:-1]), point))

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """The exact linear step: no evaluation at s."""
        return XState(linear_step(process, denoise(state.x, t), s))


def Heun(variable: Variable = InTime()) -> RungeKutta:
    """Heun's method, order 2 with 2 calls a step: eq. (1) in t, EDM's deterministic sampler."""
    return RungeKutta(tableaus.HEUN, variable)


def Midpoint(variable: Variable = InTime()) -> RungeKutta:
    """The midpoint method, order 2 with 2 calls a step."""
    return RungeKutta(tableaus.MIDPOINT, variable)


def BogackiShampine(variable: Variable = InTime()) -> RungeKutta:
    """The method of Bogacki and Shampine, order 3 with 3 calls a step."""
    return RungeKutta(tableaus.BOGACKI_SHAMPINE, variable)


def RK4(variable: Variable = InTime()) -> RungeKutta:
    """The classical Runge-Kutta method, order 4 with 4 calls a step."""
    return RungeKutta(tableaus.RK4, variable)


def DormandPrince(variable: Variable = InTime()) -> RungeKutta:
    """The method of Dormand and Prince, order 5 with 6 calls a step."""
    return RungeKutta(tableaus.DORMAND_PRINCE, variable)


@pytree
class EDMChurn(Around):
    """EDM's stochasticity around any one-step solver, eq. (2).

    n_steps: the grid's number of intervals, over which s_churn is spread. s_min, s_max: bounds on
    sigma~. It always draws, also at s_churn = 0, and one compilation serves every value.
    """

    solver: Solver
    s_churn: Number
    n_steps: Number
    s_min: Number = 0.0
    s_max: Number = math.inf
    s_noise: Number = 1.0

    def __post_init__(self):
        checks.non_negative("s_churn", self.s_churn)
        checks.positive("n_steps", self.n_steps)
        checks.positive("s_noise", self.s_noise)
        checks.less("s_min", self.s_min, "s_max", self.s_max)

    stochastic = True

    def init(self, process: Process, x: PyTree, t: Array) -> Any:
        state = self.solver.init(process, x, t)
        check_one_step(self.solver, state, "churn")
        return state

    def _churn(self, keys: Key, process: Process, state: Any, t: Array) -> tuple[Any, Array]:
        """(state, t^) with noise added, eq. (2)."""
        lam = log_snr(process, t)
        level = jnp.exp(-lam / 2)
        gamma = jnp.minimum(self.s_churn / self.n_steps, math.sqrt(2) - 1)
        within = (level >= self.s_min) & (level <= self.s_max) & jnp.isfinite(level)
        gamma = jnp.where(within, gamma, 0.0)
        raised = inverse_log_snr(process, lam - 2 * jnp.log1p(gamma))
        raised = jnp.where(gamma > 0, jnp.maximum(raised, t), t)
        move = between(process, raised, t)
        z = random.normal_like(keys, "churn", state.x)
        # Where nothing is raised, 1 - r^2 is rounding error, and its root would be visible; and
        # where alpha_t = 0 it is no number, nor is a.
        up = raised > t
        kept, gain = jnp.where(up, move.a, 1), jnp.where(up, move.gain, 0)
        spread = self.s_noise * move.at_t.sigma * safe_sqrt(gain)
        return state._replace(x=combine((kept, state.x), (spread, z))), raised

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array
    ) -> Any:
        """Churn, then the inner step from t^ to s."""
        state, raised = self._churn(keys, process, state, t)
        return self.solver.step(keys, denoise, process, state, raised, s)

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array
    ) -> Any:
        """Churn, then the inner solver's last interval from t^ to s."""
        state, raised = self._churn(keys, process, state, t)
        return self.solver.finish(keys, denoise, process, state, raised, s)
