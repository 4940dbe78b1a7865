"""Processes that lead to an anchor: mean-reverting (Ornstein-Uhlenbeck) diffusion.

Symbols: y the anchor (a degraded image, say), theta(t) >= 0 the speed of reversion,
Theta(t) its integral from 0, lambda the stationary standard deviation, delta = alpha(1).

    dx = theta (y - x) dt + lambda sqrt(2 theta) dw                                            (1)
    alpha = exp(-Theta)    beta = 1 - exp(-Theta)    sigma = lambda sqrt(1 - exp(-2 Theta))
    f = -theta             g^2 = 2 lambda^2 theta                                              (2)

x_t leads from the data to the law N(y, lambda^2), up to the share delta of the data that is left.
The schedule gives the shape of theta; its height is set so that Theta(1) = -ln delta:

    constant    theta(t) ~ 1                                                                   (3)
    cosine      theta(t) ~ 1 - abar(t),  abar(t) = cos(u)^2/cos(u0)^2,
                u = (t + s)/(1 + s) pi/2,  u0 = u(0)                                           (4)

(4) starts slowly, where the noise is small. [1] tables it on T levels; here it is continuous, and
its integral is in closed form. Data in [0, 1] and lambda = 10/255 to 50/255 are the paper's, with
delta = 0.005 in its code [2].

The functions of `diffjax.processes.calculus` (drift, posterior, score, ...), losses and solvers
know alpha and sigma only. For a process with an anchor they hold in the centred coordinates of
`diffjax.prediction.centre`,

    u_t = x_t - (alpha + beta) y = alpha (x0 - y) + sigma eps                                  (5)

References:
[1] Luo, Gustafsson, Zhao, Sjolund, Schon, "Image Restoration with Mean-Reverting Stochastic
    Differential Equations", 2023, https://arxiv.org/abs/2301.11699.
[2] Its code, https://github.com/Algolzw/image-restoration-sde.
"""

import math
from typing import Protocol

import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import safe_sqrt
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Coeffs, Number, Rates
from diffjax.processes.base import check_range


class Reversion(Protocol):
    """The shape of theta on [0, 1]: its value and its integral from 0, up to a factor."""

    def speed(self, t: Array) -> Array: ...

    def integral(self, t: Array) -> Array: ...


@pytree
class ConstantReversion:
    """Eq. (3)."""

    def speed(self, t: Array) -> Array:
        """1, shaped like t."""
        return jnp.ones_like(t)

    def integral(self, t: Array) -> Array:
        """t."""
        return t


@pytree
class CosineReversion:
    """Eq. (4). offset: s."""

    offset: Number = 0.008

    def __post_init__(self):
        checks.positive("offset", self.offset)

    def _angles(self, t: Array) -> tuple[Array, Array]:
        """u0 and u - u0; the rise as one product, since a difference of angles would cancel."""
        quarter = (math.pi / 2) / (1 + self.offset)
        return self.offset * quarter * jnp.ones_like(t), t * quarter

    def speed(self, t: Array) -> Array:
        """1 - abar = sin(u - u0) sin(u + u0)/cos(u0)^2, without cancellation."""
        start, rise = self._angles(t)
        return jnp.sin(rise) * jnp.sin(rise + 2 * start) / jnp.cos(start) ** 2

    def integral(self, t: Array) -> Array:
        """The integral of `speed` from 0."""
        start, rise = self._angles(t)
        total = jnp.cos(2 * start) * _x_minus_sin_x(2 * rise) / 2
        total = total + jnp.sin(2 * start) * jnp.sin(rise) ** 2
        return total / (jnp.cos(start) ** 2 * math.pi / (1 + self.offset))


def _x_minus_sin_x(x: Array) -> Array:
    """x - sin(x) for x >= 0, by its series below 1, where the difference would cancel."""
    small = jnp.where(x < 1, x, 1)
    square, series = small * small, jnp.zeros_like(x)
    for n in range(19, 1, -2):  # -x^3/3! + x^5/5! - ..., to the rounding of float64
        series = square * ((-1) ** ((n - 1) // 2) / math.factorial(n) + series)
    return jnp.where(x < 1, -small * series, x - jnp.sin(x))


@pytree
class MeanReverting:
    """The mean-reverting SDE of image restoration, eqs. (1) and (2); t in [0, 1].

    sigma_max: lambda. alpha_end: delta, the share of the data left at t = 1. reversion: eq. (3) or
    (4).
    """

    sigma_max: Number = 50 / 255
    alpha_end: Number = 0.005
    reversion: Reversion = CosineReversion()
    t_min: Number = 1e-3
    t_max: Number = 1.0

    def __post_init__(self):
        checks.positive("sigma_max", self.sigma_max)
        checks.positive("alpha_end", self.alpha_end)
        checks.less("alpha_end", self.alpha_end, "1", 1.0)
        check_range(self)

    def _height(self, like: Array) -> Array:
        """What the schedule is multiplied by, (), in the dtype of `like`."""
        one = jnp.ones((), like.dtype)
        return -jnp.log(one * self.alpha_end) / self.reversion.integral(one)

    def coeffs(self, t: Array) -> Coeffs:
        """Eq. (2)."""
        t = jnp.asarray(t)
        total = self._height(t) * self.reversion.integral(t)
        sigma = self.sigma_max * safe_sqrt(-jnp.expm1(-2 * total))
        return Coeffs(jnp.exp(-total), -jnp.expm1(-total), sigma)

    def rates(self, t: Array) -> Rates:
        """Eq. (2), of the centred process."""
        t = jnp.asarray(t)
        theta = self._height(t) * self.reversion.speed(t)
        return Rates(-theta, 2 * self.sigma_max**2 * theta)
