"""Variance-preserving processes given by the shape of their signal level: cosine and tabulated.

Symbols: abar(t) = alpha(t)^2, sigma^2 = 1 - abar, so f = d ln(abar)/dt / 2 and g^2 = -2 f.

    cosine      alpha(t) = cos(u(t)) / cos(u(0)),  u(t) = (t + s)/(1 + s) pi/2                   (1)
                sigma^2  = sin(u(t) - u(0)) sin(u(t) + u(0)) / cos(u(0))^2                       (2)
    tabulated   ln abar is linear in t between the levels: at t = (k+1)/N it is ln abar_k,
                at t = 0 it is 0                                                                 (3)

(2) is 1 - alpha^2 without cancellation. (3) is the VP process whose beta is constant within a
level, so a network trained on N discrete levels can be used by every solver.

References:
[1] Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    https://arxiv.org/abs/2102.09672, section 3.2.
[2] Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020,
    https://arxiv.org/abs/2006.11239.
"""

import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks
from diffjax.core.numerics import safe_sqrt
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Coeffs, Number, Rates
from diffjax.processes.base import check_range, unanchored


@pytree
class Cosine:
    """The cosine schedule, eq. (1), in continuous time.

    offset: s. t_max < 1: at t = 1 there is no signal left and the drift is infinite; the discrete
    schedule clips its betas there instead.
    """

    offset: Number = 0.008
    t_min: Number = 1e-4
    t_max: Number = 0.999

    def __post_init__(self):
        checks.positive("offset", self.offset)
        checks.in_range("t_max", self.t_max, 0.0, 1.0)
        check_range(self)

    def _angle(self, t: Array) -> Array:
        return (t + self.offset) / (1 + self.offset) * (math.pi / 2)

    def coeffs(self, t: Array) -> Coeffs:
        """Eqs. (1) and (2)."""
        u, u0 = self._angle(jnp.asarray(t)), self._angle(jnp.asarray(0.0))
        # u - u(0) as one product: the difference of two angles would cancel at small t.
        rise = jnp.asarray(t) / (1 + self.offset) * (math.pi / 2)
        sigma = safe_sqrt(jnp.sin(rise) * jnp.sin(u + u0)) / jnp.cos(u0)
        return unanchored(jnp.cos(u) / jnp.cos(u0), sigma)

    def rates(self, t: Array) -> Rates:
        """f = -tan(u) du/dt, g^2 = -2 f."""
        f = -jnp.tan(self._angle(jnp.asarray(t))) * (math.pi / 2) / (1 + self.offset)
        return Rates(f, -2 * f)

    def inverse_log_snr(self, lam: Array) -> Array:
        """cos(u)^2 = cos(u(0))^2 sigmoid(lam), solved by the tangent, exact at both ends."""
        u0 = self._angle(jnp.asarray(0.0))
        sine2 = jnp.sin(u0) ** 2 + jnp.cos(u0) ** 2 * jax.nn.sigmoid(-lam)
        u = jnp.arctan2(jnp.sqrt(sine2), jnp.cos(u0) * jnp.sqrt(jax.nn.sigmoid(lam)))
        return u / (math.pi / 2) * (1 + self.offset) - self.offset


@pytree
class Tabulated:
    """A process through given signal levels abar_0 > abar_1 > ... > abar_{N-1}, eq. (3).

    log_alphas_cumprod: (N,), the logarithms. Build it with `from_betas` or `from_alphas_cumprod`,
    which take the logarithm in float64: in float32 the product of 1 - beta_k loses digits where the
    noise is small. Level k stands at t = (k + 1)/N.
    """

    log_alphas_cumprod: Array
    t_min: Number
    t_max: Number = 1.0

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod) -> Self:
        """From abar_k, (N,), strictly decreasing within (0, 1)."""
        levels = np.asarray(alphas_cumprod, np.float64)
        if levels.ndim != 1 or levels.size == 0:
            raise ValueError(f"alphas_cumprod must have shape (N,); got {levels.shape}.")
        if not (np.all(np.diff(levels) < 0) and np.all((levels > 0) & (levels < 1))):
            raise ValueError("alphas_cumprod must decrease strictly within (0, 1).")
        return cls._from_log(np.log(levels))

    @classmethod
    def from_betas(cls, betas) -> Self:
        """From DDPM's beta_k in (0, 1), (N,): abar_k is the product of 1 - beta_j for j <= k."""
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or betas.size == 0:
            raise ValueError(f"betas must have shape (N,); got {betas.shape}.")
        if not np.all((betas > 0) & (betas < 1)):
            raise ValueError("betas must lie within (0, 1).")
        return cls._from_log(np.cumsum(np.log1p(-betas)))

    @classmethod
    def ddpm(cls, n: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0) -> Self:
        """DDPM's linear betas, from beta_min/n to beta_max/n; n = 1000 gives 1e-4 to 0.02 [2]."""
        checks.at_least("n", n, 2)
        return cls.from_betas(np.linspace(beta_min / n, beta_max / n, n))

    @classmethod
    def _from_log(cls, log_levels: np.ndarray) -> Self:
        return cls(jnp.asarray(log_levels), 1.0 / log_levels.size)

    def __post_init__(self):
        check_range(self)

    def _knots(self) -> tuple[Array, Array]:
        """Times (N+1,) and ln abar (N+1,), the clean end first."""
        log_abar = jnp.concatenate(
            [jnp.zeros_like(self.log_alphas_cumprod[:1]), self.log_alphas_cumprod]
        )
        n = self.log_alphas_cumprod.shape[0]
        return jnp.arange(n + 1, dtype=log_abar.dtype) / n, log_abar

    def coeffs(self, t: Array) -> Coeffs:
        """Eq. (3)."""
        times, log_abar = self._knots()
        level = jnp.interp(jnp.asarray(t).astype(times.dtype), times, log_abar)
        return unanchored(jnp.exp(level / 2), safe_sqrt(-jnp.expm1(level)))

    def rates(self, t: Array) -> Rates:
        """f is half the slope of ln abar within the level that holds t, its noisier side at a knot.

        The first level's slope is used at t = 0.
        """
        _, log_abar = self._knots()
        n = self.log_alphas_cumprod.shape[0]
        # (k, k + 1]: the discrete step that led to t, as in `transition(t, t - 1/N)`. A thousandth
        # of a level above a knot is still the knot, which float32 times miss by that or less.
        place = jnp.ceil(jnp.asarray(t) * n - 1e-3).astype(jnp.int32)
        k = jnp.clip(place - 1, 0, n - 1)
        f = jnp.diff(log_abar)[k] * (n / 2)
        return Rates(f, -2 * f)

    def inverse_log_snr(self, lam: Array) -> Array:
        """ln abar = -softplus(-lam), found among the levels."""
        times, log_abar = self._knots()
        return jnp.interp(jax.nn.softplus(-lam), -log_abar, times)
