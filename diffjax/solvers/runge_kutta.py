"""Second-order Runge-Kutta on the probability flow, and EDM's churn.

Symbols: h = s - t, v(x, t) = alpha' x0 + sigma' eps, sigma~ = sigma/alpha, z standard normal.

    Heun    d = v(x_t, t),   x' = x_t + h d,   x_s = x_t + h/2 (d + v(x', s))                    (1)
    churn   sigma~(t^) = (1 + gamma) sigma~(t),   gamma = min(s_churn/n, sqrt(2) - 1)
            x_t^ = (alpha_t^/alpha_t) x_t + s_noise b z,   b^2 of the transition t -> t^         (2)
            applied where s_min <= sigma~(t) <= s_max and sigma~(t) is finite (a flow at t = 1 has
            no level above), then a step of any solver from t^ to s

On the EDM process (sigma = t) these are algorithms 1 and 2 of [1]. The last interval is one exact
linear step, which for EDM is Euler's: 2n - 1 calls in all, and global order 2 is kept.

References:
[1] Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364, algorithms 1 and 2.
"""

import math
from typing import Any

import jax.numpy as jnp

from diffjax.core import checks, random
from diffjax.core.numerics import combine, safe_sqrt
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import between, inverse_log_snr, log_snr, velocity
from diffjax.solvers.base import Solver, XState
from diffjax.solvers.euler import linear_step


@pytree
class Heun:
    """Heun's method in t, eq. (1): order 2."""

    @property
    def stages(self) -> int:
        return 2

    @property
    def final_stages(self) -> int:
        return 1

    @property
    def stochastic(self) -> bool:
        return False

    def init(self, process: Process, x: PyTree, t: Array) -> XState:
        return XState(x)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (1)."""
        one, h = jnp.ones_like(t), s - t
        first = velocity(process, denoise(state.x, t), t)
        ahead = combine((one, state.x), (h, first))
        second = velocity(process, denoise(ahead, s), s)
        return XState(combine((one, state.x), (h / 2, first), (h / 2, second)))

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """The exact linear step: no evaluation at s."""
        return XState(linear_step(process, denoise(state.x, t), s))


@pytree
class EDMChurn:
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

    @property
    def stages(self) -> int:
        return self.solver.stages

    @property
    def final_stages(self) -> int:
        return self.solver.final_stages

    @property
    def stochastic(self) -> bool:
        return True

    def init(self, process: Process, x: PyTree, t: Array) -> Any:
        return self.solver.init(process, x, t)

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
