"""Straight-line flows.

    rectified flow   alpha = 1 - t    sigma = t    f = -1/(1 - t)    g^2 = 2 t/(1 - t)           (1)

The conditional velocity d x_t/dt = eps - x0 is constant in t; data stands at t = 0 and noise at
t = 1, as everywhere in diffjax (papers on flow matching often count the other way round).

At t = 1 the rates are infinite: the probability flow starts there, since its coefficients are not;
an SDE solver that needs f and g must start below 1.

References:
[1] Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified
    Flow", 2022, https://arxiv.org/abs/2209.03003.
[2] Lipman, Chen, Ben-Hamu, Nickel, Le, "Flow Matching for Generative Modeling", 2022,
    https://arxiv.org/abs/2210.02747.
"""

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Coeffs, Number, Rates
from diffjax.processes.base import check_range, unanchored


@pytree
class RectifiedFlow:
    """x_t = (1 - t) x0 + t eps, eq. (1)."""

    t_min: Number = 1e-3
    t_max: Number = 1.0

    def __post_init__(self):
        checks.in_range("t_max", self.t_max, 0.0, 1.0)
        check_range(self)

    def coeffs(self, t: Array) -> Coeffs:
        """Eq. (1)."""
        t = jnp.asarray(t)
        return unanchored(1 - t, t)

    def rates(self, t: Array) -> Rates:
        """Eq. (1); infinite at t = 1."""
        t = jnp.asarray(t)
        return Rates(-1 / (1 - t), 2 * t / (1 - t))

    def inverse_log_snr(self, lam: Array) -> Array:
        """t/(1 - t) = exp(-lam/2)."""
        return jax.nn.sigmoid(-lam / 2)
