"""MRS, the sampler of mean-reverting diffusion, as members of the exponential multistep family.

Symbols: y the anchor, u = x - y and u0 = x0 - y (the centred coordinates of
`diffjax.prediction.centre`; alpha + beta = 1), t the current time, s the target, h the step of
ln(alpha/sigma), m what is extrapolated (u0 or eps), D its divided difference over the last two
times, z standard normal.

    data,  ODE   u_s = sigma_s/sigma_t u_t + alpha_s (1 - e^-h) u0 + alpha_s (h - 1 + e^-h) D   (1)
    noise, ODE   u_s = alpha_s/alpha_t u_t - sigma_s (e^h - 1) eps - sigma_s (e^h - 1 - h) D    (2)
    data,  SDE   u_s = sigma_s/sigma_t e^-h u_t + alpha_s (1 - e^-2h) u0
                       + alpha_s (h - (1 - e^-2h)/2) D + sigma_s sqrt(1 - e^-2h) z              (3)
    noise, SDE   u_s = alpha_s/alpha_t u_t - 2 sigma_s (e^h - 1) eps
                       - 2 sigma_s (e^h - 1 - h) D + sigma_s sqrt(e^2h - 1) z                   (4)

[1] states them in x, with terms of y: it solves an equation that is affine in x, whose constant
term is y's. In u there is none left, and (1) to (4) are `Multistep` in the log-SNR with its exact
weights; order 1 leaves D out, which is DDIM for the ODE and the ancestral step for (3). So there is
no new method here, and every other solver samples such a process too.

Orders as of `Multistep`: 1 and 2 for the ODE, weak order 1 for the SDE. Its last interval is of
order 1, where the paper's code keeps its order at 10 steps and more. That code has an order 3 for
the ODE beside the paper's two.

References:
[1] Li et al., "MRS: A Fast Sampler for Mean Reverting Diffusion Based on ODE and SDE Solvers",
    2025, https://arxiv.org/abs/2502.07856.
[2] Its code, https://github.com/grrrute/mr-sampler.
"""

from diffjax.core import checks
from diffjax.solvers.exponential import Kind
from diffjax.solvers.multistep import Multistep


def mrs(order: int = 2, prediction: Kind = "x0", sde: bool = False) -> Multistep:
    """MRS of order 1 or 2, eqs. (1) to (4), for a denoiser of `diffjax.prediction.centre`.

    prediction: "x0" (the paper's advice) or "eps". sde: the reverse SDE in place of the flow.
    """
    checks.one_of("order", order, (1, 2))
    return Multistep(order, prediction, eta=1.0 if sde else None)
