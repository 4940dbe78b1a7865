"""gDDIM for isotropic processes: DDIM with noise that does not depend on the number of steps.

Symbols: r = (alpha_t sigma_s)/(alpha_s sigma_t) in [0, 1], L >= 0 the noise that is exchanged,
z standard normal, f, g, s(x, t) of `diffjax.processes.calculus`, Psi^ the transition of (3).

    dx = (f x - (1 + L^2)/2 g^2 s) dt + L g dw                          t running down           (1)
    x_s = alpha_s x0 + sigma_s (r^(L^2) eps + sqrt(1 - r^(2 L^2)) z)                             (2)
    Psi^(s, t) = exp int_t^s (f + (1 + L^2)/2 g^2/sigma^2) du = (sigma_s/sigma_t) r^(L^2)        (3)

All SDEs (1) have the same marginals; L = 0 is the probability flow, L = 1 the reverse SDE. (2) is
their exact solution where x0 is constant along the step, so that eps = (x - alpha x0)/sigma is
what shrinks by (3): the proposition of [1] on its stochastic sampler, with K_t = R_t = sigma_t.

What differs from DDIM with eta [2]: where the process is isotropic the deterministic gDDIM is DDIM,
and the multistep one is DEIS. With noise, DDIM keeps sqrt(1 - eta^2 (1 - r^2)) of eps where (2)
keeps r^(L^2). They agree at eta = L = 0 and 1, and to first order in the step between. But r
multiplies over steps, so that for data at one point (2) over two half steps is (2) over the whole:
how much noise is renewed along a path depends on L alone, and not, as at a constant eta < 1, on the
number of steps too. L > 1 is allowed.

It is written in alpha and sigma, with no alpha^2 + sigma^2 = 1: it holds for sub-VP, VE and flows
alike, also from alpha = 0.

References:
[1] Zhang, Tao, Chen, "gDDIM: Generalized denoising diffusion implicit models", 2022,
    https://arxiv.org/abs/2206.05564, section 4 and the appendix on stochastic sampling.
[2] Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2020,
    https://arxiv.org/abs/2010.02502, eqs. 12 and 16.
"""

import jax.numpy as jnp

from diffjax.core import checks, random
from diffjax.core.numerics import combine, safe_sqrt
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import between
from diffjax.solvers.base import XState
from diffjax.solvers.euler import linear_step


@pytree
class GDDIM:
    """Stochastic gDDIM, eq. (2): weak order 1.

    noise: L >= 0, a leaf. It always draws, also at 0, where it is DDIM.
    """

    noise: Number = 1.0

    def __post_init__(self):
        checks.non_negative("noise", self.noise)

    stages = 1
    final_stages = 1
    stochastic = True

    def init(self, process: Process, x: PyTree, t: Array) -> XState:
        return XState(x)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (2)."""
        prediction = denoise(state.x, t)
        move = between(process, t, s)
        kept, added = self._shares(move.r)
        sigma = move.at_s.sigma
        z = random.normal_like(keys, "gddim", state.x)
        return XState(
            combine(
                (move.at_s.alpha, prediction.x0),
                (sigma * kept, prediction.eps),
                (sigma * added, z),
            )
        )

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (2) at L = 0; x0 where sigma_s = 0."""
        return XState(linear_step(process, denoise(state.x, t), s))

    def _shares(self, r: Array) -> tuple[Array, Array]:
        """r^(L^2) and sqrt(1 - r^(2 L^2)), linear in L at 0 so that its derivative is finite."""
        shrink = -jnp.log(jnp.maximum(r, jnp.finfo(r.dtype).tiny))
        u = 2 * self.noise**2 * shrink
        ratio = jnp.where(u > 0, -jnp.expm1(-u) / jnp.where(u > 0, u, 1), 1)
        return jnp.exp(-u / 2), self.noise * safe_sqrt(2 * shrink * ratio)
