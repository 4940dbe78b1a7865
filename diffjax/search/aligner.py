"""The timestep aligner: the network is asked at other times than the grid's.

Symbols: t_k the grid, tau_k the time that the network is told in place of t_k.

    eps = denoise(x, tau).eps,   x0 = (x - sigma(t) eps)/alpha(t),   tau = t exp(r(t))           (1)

with r piecewise linear between r(t_k) = ln(tau_k/t_k), for methods that also ask between the grid's
times. A long step along the direction at its start leaves the curve; the direction at another time
of the same x may be nearer to that of the chord. The solver's own numbers stay those of t.

The paper fits tau_k one after the other (or each by itself). Its public code makes the two network
answers at the ends of a step alike; here tau is fitted so that the whole solve ends where a fine
one does, by `optimise_schedule` over `schedule_space(align=True)`.

References:
[1] Xia et al., "Towards More Accurate Diffusion Model Acceleration with A Timestep Aligner", 2023,
    https://arxiv.org/abs/2310.09469, and its code, https://github.com/THU-LYJ-Lab/time-tuner.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import combine
from diffjax.core.pytree import pytree, replace, static, taken
from diffjax.core.types import Array, Prediction, PyTree, evaluations
from diffjax.processes.base import Process

Held = Literal["eps", "x0"]


@pytree
class Aligned:
    """`denoise` asked at other times, eq. (1); itself a denoiser.

    times, asked: (n+1,), t_k decreasing and tau_k. held: which of the network's answers is kept;
    "x0" where alpha may be 0 (a flow at t = 1), eps then follows from it.
    """

    denoise: Any
    process: Process
    times: Array
    asked: Array
    held: Held = static(default="eps")

    def __post_init__(self):
        checks.one_of("held", self.held, ("eps", "x0"))

    def time_asked(self, t: Array) -> Array:
        """tau of eq. (1), like t; t itself outside the grid and where the grid is at 0."""
        inside = self.times > 0
        ratio = jnp.where(inside, self.asked, 1) / jnp.where(inside, self.times, 1)
        offsets = jnp.log(ratio)[::-1]
        t = jnp.asarray(t)
        offset = jnp.interp(t, self.times[::-1], offsets, left=0, right=0)
        return t * jnp.exp(offset).astype(t.dtype)

    def __call__(self, x_t: PyTree, t: Array) -> Prediction:
        """Eq. (1)."""
        found = self.denoise(x_t, self.time_asked(t))
        at = self.process.coeffs(t)
        if self.held == "x0":
            eps = combine((1 / at.sigma, x_t), (-at.alpha / at.sigma, found.x0))
            return Prediction(found.x0, eps, found.extras)
        x0 = combine((1 / at.alpha, x_t), (-at.sigma / at.alpha, found.eps))
        return Prediction(x0, found.eps, found.extras)

    @property
    def evaluations(self) -> int:
        """Of networks in a call."""
        return evaluations(self.denoise)

    def take(self, index: Array) -> "Aligned":
        """The denoiser of the samples `index`, (k,)."""
        return replace(self, denoise=taken(self.denoise, index))

    def check_times(self, times: Array) -> None:
        """The inner denoiser's check, at the times that it is asked."""
        if hasattr(self.denoise, "check_times"):
            with jax.ensure_compile_time_eval():
                self.denoise.check_times(self.time_asked(jnp.asarray(times)))
