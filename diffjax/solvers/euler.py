"""First-order methods in t: Euler on the probability flow, Euler-Maruyama, reverse diffusion.

Symbols: h = s - t < 0, z standard normal, a, r of `diffjax.processes.calculus.between`.

    Euler              x_s = x_t + h (alpha' x0 + sigma' eps)                                   (1)
    Euler-Maruyama     x_s = x_t + h (f x_t + g^2 eps/sigma) + g sqrt(-h) z                     (2)
    reverse diffusion  x_s = (2 - a) x_t - sigma_t (1 - r^2) eps + sigma_t sqrt(1 - r^2) z      (3)

probability_flow=True takes half the eps term and no noise in (2) and (3): the flow in place of the
SDE, as the option of that name in the reference code. (2) is then (1), written with f and g.

(3) discretises the reverse SDE as the forward transition (a, b^2) was: on DDPM's and SMLD's own
grids it is the reference code's `reverse_diffusion`, for sub-VP it uses the exact transition where
the reference falls back on (2). Euler ends with one exact linear step (DDIM's), which lands on x0
where sigma = 0. The stochastic methods end without their noise, and on x0 itself where sigma = 0:
(2) and (3) without noise would leave some there (all of it, with the opposite sign, for
Euler-Maruyama from sigma to 0 in one step of EDM's process).

References:
[1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, appendices D and E.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks, random
from diffjax.core.numerics import combine, expand, safe_sqrt
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Prediction, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import Step, between, rates, reverse_drift, velocity
from diffjax.solvers.base import XState


def linear_step(process: Process, prediction: Prediction, s: Array) -> PyTree:
    """alpha_s x0 + sigma_s eps: exact where the prediction is constant along the path (DDIM)."""
    at_s = process.coeffs(s)
    return combine((at_s.alpha, prediction.x0), (at_s.sigma, prediction.eps))


def landed(process: Process, mean: PyTree, x0: PyTree, s: Array) -> PyTree:
    """alpha_s x0 where sigma_s = 0, else `mean`."""
    at_s = process.coeffs(s)

    def choose(mean, x0):
        return jnp.where(expand(at_s.sigma, mean) == 0, expand(at_s.alpha, x0) * x0, mean)

    return jax.tree.map(choose, mean, x0)


@pytree
class Euler:
    """Euler's method on the probability flow in t, eq. (1): order 1."""

    stages = 1
    final_stages = 1
    stochastic = False

    def init(self, process: Process, x: PyTree, t: Array) -> XState:
        return XState(x)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (1)."""
        slope = velocity(process, denoise(state.x, t), t)
        return XState(combine((jnp.ones_like(t), state.x), (s - t, slope)))

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """The exact linear step."""
        return XState(linear_step(process, denoise(state.x, t), s))


@pytree
class EulerMaruyama:
    """Euler-Maruyama on the reverse SDE, eq. (2): weak order 1.

    Needs f and g at the grid's first time: a flow must start below t = 1.
    probability_flow: the deterministic form, of order 1.
    """

    probability_flow: bool = static(default=False)

    stages = 1
    final_stages = 1

    @property
    def stochastic(self) -> bool:
        return not self.probability_flow

    def init(self, process: Process, x: PyTree, t: Array) -> XState:
        """Raises ValueError where g^2 is infinite at the start."""
        known = checks.evaluated(lambda: rates(process, t).g2)
        if known is not None and not np.isfinite(known).all():
            raise ValueError(
                f"g^2 is infinite at the grid's noisy end {t}, so the reverse SDE cannot start "
                "there. Start below (t_max= of the grid), or use Ancestral(), DDIM() or Heun()."
            )
        return XState(x)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (2)."""
        mean = self._mean(process, state.x, denoise(state.x, t), t, s)
        if self.probability_flow:
            return XState(mean)
        z = random.normal_like(keys, "euler_maruyama", state.x)
        return XState(combine((jnp.ones_like(t), mean), (self._spread(process, t, s), z)))

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (2) without its noise; x0 where sigma_s = 0."""
        prediction = denoise(state.x, t)
        mean = self._mean(process, state.x, prediction, t, s)
        return XState(landed(process, mean, prediction.x0, s))

    def _mean(
        self, process: Process, x: PyTree, prediction: Prediction, t: Array, s: Array
    ) -> PyTree:
        slope = reverse_drift(process, x, prediction, t, share=_share(self))
        return combine((jnp.ones_like(t), x), (s - t, slope))

    def _spread(self, process: Process, t: Array, s: Array) -> Array:
        return safe_sqrt(rates(process, t).g2 * (t - s))


@pytree
class ReverseDiffusion:
    """The reverse-diffusion predictor, eq. (3): weak order 1, in the transition's own numbers.

    probability_flow: the deterministic form, of order 1.
    """

    probability_flow: bool = static(default=False)

    stages = 1
    final_stages = 1

    @property
    def stochastic(self) -> bool:
        return not self.probability_flow

    def init(self, process: Process, x: PyTree, t: Array) -> XState:
        return XState(x)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (3)."""
        move = between(process, t, s)
        mean = self._mean(move, state.x, denoise(state.x, t))
        if self.probability_flow:
            return XState(mean)
        z = random.normal_like(keys, "reverse_diffusion", state.x)
        spread = move.at_t.sigma * safe_sqrt(move.gain)
        return XState(combine((jnp.ones_like(t), mean), (spread, z)))

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (3) without its noise; x0 where sigma_s = 0."""
        prediction = denoise(state.x, t)
        mean = self._mean(between(process, t, s), state.x, prediction)
        return XState(landed(process, mean, prediction.x0, s))

    def _mean(self, move: Step, x: PyTree, prediction: Prediction) -> PyTree:
        pull = _share(self) * move.at_t.sigma * move.gain
        return combine((2 - move.a, x), (-pull, prediction.eps))


def _share(solver: EulerMaruyama | ReverseDiffusion) -> float:
    """The share of the score: 1 in the reverse SDE, 1/2 in the probability flow."""
    return 0.5 if solver.probability_flow else 1.0
