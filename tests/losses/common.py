"""The VP process once more, in NumPy and from the paper's integrals, and what the tests share."""

import jax.numpy as jnp
import numpy as np

from diffjax.core.pytree import pytree
from diffjax.core.types import Coeffs, Prediction


def vp(t, b0=0.1, b1=20.0):
    """alpha, sigma^2 and beta of the VP process."""
    integral = b0 * t + 0.5 * (b1 - b0) * t**2
    return np.exp(-integral / 2), -np.expm1(-integral), b0 + t * (b1 - b0)


@pytree
class NoisierBy:
    """A mutant: the noise of `process` scaled by `factor`, which the oracle does not know."""

    process: object
    factor: float = 1.03

    @property
    def t_min(self):
        return self.process.t_min

    @property
    def t_max(self):
        return self.process.t_max

    def coeffs(self, t):
        alpha, beta, sigma = self.process.coeffs(t)
        return Coeffs(alpha, beta, self.factor * sigma)

    def rates(self, t):
        return self.process.rates(t)


def silent(x_t, t):
    """A network whose last layer is zero: eps^ = 0 (x0^ is not used)."""
    zero = jnp.zeros_like(x_t)
    return Prediction(zero, zero)


def mean_and_error(values):
    """The mean and its standard error, in float64."""
    values = np.asarray(values, np.float64)
    return values.mean(), values.std(ddof=1) / np.sqrt(values.size)
