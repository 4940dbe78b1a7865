"""What a process is: the forward law of a Gaussian diffusion, as one function of time.

Symbols: x0 data, y an anchor (absent for most), eps standard normal noise, t time (data at small t,
noise at large t), and

    x_t = alpha(t) x0 + beta(t) y + sigma(t) eps                                              (1)

A process is a frozen pytree with `t_min`, `t_max` and `coeffs(t) -> Coeffs(alpha, beta, sigma)`.
Everything else (drift, diffusion, log-SNR, transitions, posterior, prior, reverse SDE,
probability-flow ODE) follows from (1) and stands in `diffjax.processes.calculus`.

Two methods are optional and replace a generic computation by a closed form:

    rates(t) -> Rates(f, g2)         where autodiff of (1) is singular (VP at 0, a flow at 1)
    inverse_log_snr(lam) -> t        else found by bisection on [t_min, t_max]

`t_min` and `t_max` bound the times at which a network is asked; sigma(t_max) is the prior's
standard deviation. A process may be evaluated at 0, where most have sigma(0) = 0.

Reference: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling
through Stochastic Differential Equations", 2021, https://arxiv.org/abs/2011.13456.
"""

from typing import Protocol

import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.types import Array, Coeffs, Number


class Process(Protocol):
    """The forward law (1); see the module's docstring."""

    @property
    def t_min(self) -> Number: ...

    @property
    def t_max(self) -> Number: ...

    def coeffs(self, t: Array) -> Coeffs:
        """(alpha, beta, sigma) at t, (), (B,): arrays of t's shape or a sample's."""
        ...


def unanchored(alpha: Array, sigma: Array) -> Coeffs:
    """`Coeffs` of a process without an anchor: beta = 0."""
    return Coeffs(alpha, jnp.zeros_like(alpha), sigma)


def check_range(process: Process) -> None:
    """Raises ValueError unless 0 <= t_min < t_max."""
    checks.non_negative("t_min", process.t_min)
    checks.less("t_min", process.t_min, "t_max", process.t_max)
