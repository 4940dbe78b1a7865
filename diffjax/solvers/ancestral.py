"""Samplers through the posterior q(x_s | x_t, x0): ancestral (DDPM) and DDIM.

Symbols: r, a of `diffjax.processes.calculus.between`, c = sigma_s sqrt(1 - r^2) the posterior's and
b = sigma_t sqrt(1 - r^2) the transition's standard deviation, z standard normal.

    ancestral   x_s = r (sigma_s/sigma_t) x_t + alpha_s (1 - r^2) x0 + c z   (or b z)           (1)
                the deviation c, b, or what the network has learned (`prediction.learned`)
    DDIM        x_s = alpha_s x0 + sigma_s sqrt(1 - eta^2 (1 - r^2)) eps + eta c z              (2)

At eta = 1 (2) is (1) with the small variance; at eta = 0 it is the exact linear step of the
probability flow. Neither needs f or g, so both may start where alpha = 0.

References:
[1] Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020,
    https://arxiv.org/abs/2006.11239, eq. 7 and section 3.2 (the two variances).
[2] Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2020,
    https://arxiv.org/abs/2010.02502, eqs. 12 and 16.
[3] Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    https://arxiv.org/abs/2102.09672, section 3.1 (the learned variance).
"""

from typing import Literal

import jax
import jax.numpy as jnp

from diffjax.core import checks, random
from diffjax.core.numerics import combine, safe_sqrt
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.prediction.learned import step_variance
from diffjax.processes.base import Process
from diffjax.processes.calculus import between, posterior
from diffjax.solvers.base import XState
from diffjax.solvers.euler import linear_step


@pytree
class Ancestral:
    """DDPM's ancestral sampling, eq. (1): weak order 1.

    variance: "small" is the posterior's c^2, right for data of one point; "large" is the
      transition's b^2, right for data of unit variance (the reference code's choice for VP). The
      reference code uses "small" for VE. "learned" is the network's own [3]: the denoiser must be
      one of `make_denoiser(..., learned_variance=...)`, else the first step raises ValueError.
    """

    variance: Literal["small", "large", "learned"] = static(default="small")

    def __post_init__(self):
        checks.one_of("variance", self.variance, ("small", "large", "learned"))

    stages = 1
    final_stages = 1
    stochastic = True

    def init(self, process: Process, x: PyTree, t: Array) -> XState:
        return XState(x)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (1)."""
        prediction = denoise(state.x, t)
        mean = posterior(process, state.x, prediction.x0, t, s)[0]
        z = random.normal_like(keys, "ancestral", state.x)
        if self.variance == "learned":
            std = step_variance(prediction, "Ancestral('learned')").std(process, t, s)
            return XState(jax.tree.map(lambda m, d, n: m + d * n, mean, std, z))
        move = between(process, t, s)
        level = (move.at_s if self.variance == "small" else move.at_t).sigma
        return XState(combine((jnp.ones_like(t), mean), (level * safe_sqrt(move.gain), z)))

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """The mean of eq. (1); x0 where sigma_s = 0."""
        return XState(posterior(process, state.x, denoise(state.x, t).x0, t, s)[0])


@pytree
class DDIM:
    """DDIM, eq. (2): order 1 at eta = 0.

    eta: None (static) draws nothing. A number in [0, 1] is a leaf: it always draws, also at 0, and
      one compilation serves every value.
    """

    eta: Number | None = None

    def __post_init__(self):
        if self.eta is not None:
            checks.in_range("eta", self.eta, 0.0, 1.0)

    stages = 1
    final_stages = 1

    @property
    def stochastic(self) -> bool:
        return self.eta is not None

    def init(self, process: Process, x: PyTree, t: Array) -> XState:
        return XState(x)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (2)."""
        if self.eta is None:
            return self.finish(keys, denoise, process, state, t, s)
        prediction = denoise(state.x, t)
        move = between(process, t, s)
        sigma = move.at_s.sigma
        # Linear in eta outside the root: its derivative at eta = 0 is finite.
        kept = sigma * safe_sqrt(1 - self.eta**2 * move.gain)
        added = self.eta * sigma * safe_sqrt(move.gain)
        z = random.normal_like(keys, "ddim", state.x)
        return XState(combine((move.at_s.alpha, prediction.x0), (kept, prediction.eps), (added, z)))

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (2) at eta = 0; x0 where sigma_s = 0."""
        return XState(linear_step(process, denoise(state.x, t), s))
