"""The SDEs with a prescribed variance: VP, sub-VP, VE and EDM.

Symbols: beta(t) = b0 + t (b1 - b0) on [0, 1], B(t) = b0 t + (b1 - b0) t^2 / 2 its integral.

    VP       alpha = exp(-B/2)    sigma = sqrt(1 - exp(-B))      f = -beta/2   g^2 = beta        (1)
    sub-VP   alpha = exp(-B/2)    sigma = 1 - exp(-B)            f = -beta/2
                                                          g^2 = beta (1 - exp(-2B))              (2)
    VE       alpha = 1            sigma = smin (smax/smin)^t     f = 0
                                                          g^2 = 2 sigma^2 ln(smax/smin)          (3)
    EDM      alpha = 1            sigma = t                      f = 0         g^2 = 2 t         (4)

Every 1 - exp(.) is an `expm1`: in float32 the plain form is off by up to 3 % for t below 2e-5.

(3) follows the reference code and appendix C of the paper; its appendix B has the variance
sigma^2(t) - sigma^2(0) for the same SDE. VE ends at smin, not at 0.

References:
[1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, section 3.4, appendices B and C.
[2] Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative
    Models", 2022, https://arxiv.org/abs/2206.00364.
"""

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import safe_sqrt
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Coeffs, Number, Rates
from diffjax.processes.base import check_range, unanchored


def _check_linear_beta(process) -> None:
    checks.non_negative("beta_min", process.beta_min)
    checks.less("beta_min", process.beta_min, "beta_max", process.beta_max)
    check_range(process)


def _beta(process, t: Array) -> Array:
    return process.beta_min + t * (process.beta_max - process.beta_min)


def _beta_integral(process, t: Array) -> Array:
    return t * (process.beta_min + t * (process.beta_max - process.beta_min) / 2)


def _time_of_beta_integral(process, integral: Array) -> Array:
    """Solves B(t) = integral for t, in the form of the root that does not cancel."""
    slope = process.beta_max - process.beta_min
    root = safe_sqrt(process.beta_min**2 + 2 * slope * integral)
    return 2 * integral / (process.beta_min + root)


@pytree
class VP:
    """The variance-preserving SDE with linear beta, eq. (1); DDPM in continuous time.

    beta_min, beta_max: b0 and b1. t_min: 1e-5 as in training; samplers of the reference stop at
    1e-3, where the standard deviation is that of DDPM's first step.
    """

    beta_min: Number = 0.1
    beta_max: Number = 20.0
    t_min: Number = 1e-5
    t_max: Number = 1.0

    def __post_init__(self):
        _check_linear_beta(self)

    def coeffs(self, t: Array) -> Coeffs:
        """Eq. (1)."""
        integral = _beta_integral(self, jnp.asarray(t))
        return unanchored(jnp.exp(-integral / 2), safe_sqrt(-jnp.expm1(-integral)))

    def rates(self, t: Array) -> Rates:
        """Eq. (1); finite at t = 0, where the derivative of sigma is not."""
        beta = _beta(self, jnp.asarray(t))
        return Rates(-beta / 2, beta)

    def inverse_log_snr(self, lam: Array) -> Array:
        """exp(-B) = sigmoid(lam), so B = softplus(-lam)."""
        return _time_of_beta_integral(self, jax.nn.softplus(-lam))


@pytree
class SubVP:
    """The sub-VP SDE, eq. (2): the drift of VP with a variance below it."""

    beta_min: Number = 0.1
    beta_max: Number = 20.0
    t_min: Number = 1e-5
    t_max: Number = 1.0

    def __post_init__(self):
        _check_linear_beta(self)

    def coeffs(self, t: Array) -> Coeffs:
        """Eq. (2)."""
        integral = _beta_integral(self, jnp.asarray(t))
        return unanchored(jnp.exp(-integral / 2), -jnp.expm1(-integral))

    def rates(self, t: Array) -> Rates:
        """Eq. (2)."""
        t = jnp.asarray(t)
        beta = _beta(self, t)
        return Rates(-beta / 2, -beta * jnp.expm1(-2 * _beta_integral(self, t)))

    def inverse_log_snr(self, lam: Array) -> Array:
        """sigma/alpha = 2 sinh(B/2), so B = 2 asinh(exp(-lam/2) / 2)."""
        return _time_of_beta_integral(self, 2 * jnp.arcsinh(jnp.exp(-lam / 2) / 2))


@pytree
class VE:
    """The variance-exploding SDE with geometric sigma, eq. (3).

    sigma_max: about the largest distance between two training examples (50 for CIFAR-10 in [0, 1]).
    """

    sigma_min: Number = 0.01
    sigma_max: Number = 50.0
    t_min: Number = 1e-5
    t_max: Number = 1.0

    def __post_init__(self):
        checks.positive("sigma_min", self.sigma_min)
        checks.less("sigma_min", self.sigma_min, "sigma_max", self.sigma_max)
        check_range(self)

    def _log_ratio(self) -> Array:
        return jnp.log(jnp.asarray(self.sigma_max) / self.sigma_min)

    def coeffs(self, t: Array) -> Coeffs:
        """Eq. (3)."""
        t = jnp.asarray(t)
        return unanchored(jnp.ones_like(t), self.sigma_min * jnp.exp(t * self._log_ratio()))

    def rates(self, t: Array) -> Rates:
        """Eq. (3)."""
        sigma = self.coeffs(t).sigma
        return Rates(jnp.zeros_like(sigma), 2 * sigma**2 * self._log_ratio())

    def inverse_log_snr(self, lam: Array) -> Array:
        """sigma = exp(-lam/2)."""
        return (-lam / 2 - jnp.log(jnp.asarray(self.sigma_min))) / self._log_ratio()


@pytree
class EDM:
    """sigma(t) = t, eq. (4): time is the noise level. Karras et al. [2] sample on [0.002, 80]."""

    t_min: Number = 0.002
    t_max: Number = 80.0

    def __post_init__(self):
        check_range(self)

    def coeffs(self, t: Array) -> Coeffs:
        """Eq. (4)."""
        t = jnp.asarray(t)
        return unanchored(jnp.ones_like(t), t)

    def rates(self, t: Array) -> Rates:
        """Eq. (4)."""
        t = jnp.asarray(t)
        return Rates(jnp.zeros_like(t), 2 * t)

    def inverse_log_snr(self, lam: Array) -> Array:
        """t = exp(-lam/2)."""
        return jnp.exp(-lam / 2)
