"""How an error of the prediction is measured: one row, in the sense of `prediction.kinds`.

Symbols: D_x = x0^ - x0 and D_e = eps^ - eps the errors of the two halves; lam the log-SNR,
snr = e^lam; s_d the data's standard deviation; sigma~ = sigma/alpha.

    loss = reduce |a(t) D_x + b(t) D_e|^2                                                      (1)

A weighting is the row (a, b): which error, times the square root of its weight. Since
alpha D_x + sigma D_e = 0, all rows measure the same error in different units, and on |D_e|^2 the
weight is (b - a sigma/alpha)^2. So every kind of `prediction.kinds` is a weighting already, the one
under which a network of that kind is trained on its own output:

    Eps()           |D_e|^2                    the simple loss of DDPM, and Score-SDE's default  (2)
    X0()            |D_x|^2                    weight snr^-1 on |D_e|^2
    V()             |alpha D_e - sigma D_x|^2  snr + 1 on |D_x|^2 where alpha^2 + sigma^2 = 1
    Velocity()      flow matching
    EDMF(s_d)       (sigma~^2 + s_d^2)/(sigma~ s_d)^2 |D_x|^2: EDM's weighting [1], which makes
                    the loss of its F unweighted                                               (3)

and three more stand here, all on D_e:

    Likelihood()    g^2/sigma^2 = -d lam/dt                         maximum likelihood [2, 3]   (4)
    MinSNR(gamma)   min(1, gamma/snr)          = min(snr, gamma) on |D_x|^2 [4]                (5)
    Sigmoid(bias)   -d lam/dt / (1 + e^(lam - bias))                [5], [6]                   (6)

Which row to take for a given weight is a matter of rounding: in float32 the half that a network
does not predict carries an error of about 1e-7/sigma (D_e of an x0 network) or 1e-7/alpha (D_x of
an eps network). Networks of kind v, velocity and F are sound under every row.

(4) and (6) are finite and exact to rounding down to t_min, since the ratio is taken of the
process's own g^2 and sigma^2; they grow as 1/t there (`times.ImportanceTimes` levels that).

References:
[1] Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364, table 1.
[2] Song, Durkan, Murray, Ermon, "Maximum Likelihood Training of Score-Based Diffusion Models",
    2021, https://arxiv.org/abs/2101.09258.
[3] Kingma et al., "Variational Diffusion Models", 2021, https://arxiv.org/abs/2107.00630.
[4] Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023,
    https://arxiv.org/abs/2303.09556.
[5] Kingma, Gao, "Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation",
    2023, https://arxiv.org/abs/2303.00848.
[6] Hoogeboom et al., "Simpler Diffusion (SiD2)", 2024, https://arxiv.org/abs/2410.19324.
"""

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Number
from diffjax.prediction.kinds import Kind, Row
from diffjax.processes.base import Process
from diffjax.processes.calculus import log_snr, rates

Weight = Kind  # anything with `row(process, t) -> Row`


@pytree
class Likelihood:
    """Eq. (4): with `half_sum` and uniform times, the variational bound per unit of time."""

    def row(self, process: Process, t: Array) -> Row:
        """(0, g/sigma)."""
        return Row(0.0, jnp.sqrt(_fall(process, t)))


@pytree
class MinSNR:
    """Eq. (5): the x0 error by its SNR, but never by more than gamma."""

    gamma: Number = 5.0

    def __post_init__(self):
        checks.positive("gamma", self.gamma)

    def row(self, process: Process, t: Array) -> Row:
        """(0, min(1, sqrt(gamma/snr)))."""
        alpha, _, sigma = process.coeffs(t)
        # Compared before dividing: alpha may be 0, where the minimum is 1.
        root = jnp.sqrt(jnp.asarray(self.gamma)) * sigma
        return Row(0.0, root / jnp.maximum(alpha, root))


@pytree
class Sigmoid:
    """Eq. (6): the likelihood weighting, switched off where lam exceeds the bias."""

    bias: Number = -3.0

    def row(self, process: Process, t: Array) -> Row:
        """(0, g/sigma sqrt(sigmoid(bias - lam)))."""
        gate = jax.nn.sigmoid(self.bias - log_snr(process, t))
        return Row(0.0, jnp.sqrt(_fall(process, t) * gate))


def _fall(process: Process, t: Array) -> Array:
    """-d lam/dt = g^2/sigma^2, shaped like t."""
    return rates(process, t).g2 / process.coeffs(t).sigma ** 2
