"""The latent space of the probability flow: encode, decode, interpolate, cool.

Symbols: x data, z = x_T the point of the prior that the flow leads x to, u = a/|a| and v = b/|b|
two latents over their norms, theta the angle between them, w in [0, 1].

    z = flow(x; t_min -> t_max)     x = flow(z; t_max -> t_min)                                 (1)
    slerp(a, b; w) = (sin((1 - w) theta) a + sin(w theta) b) / sin(theta)                       (2)
    z -> temperature z                                                                          (3)

The map (1) is fixed by the process and the data, not by the network that approximates it, so two
well-trained models give one image nearly one latent [1]. A latent has a norm of about
sigma(T) sqrt(D). (2) keeps that norm between two latents of equal norm, where a straight line would
shrink it by up to sqrt(2). (3) shrinks it on purpose: below 1 it trades variety for smoothness [1].
For the noise of a stochastic sampler the like is `EDMChurn(s_noise=...)`.

References:
[1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, section 4.3 and appendix D.5.
[2] Shoemake, "Animating Rotation with Quaternion Curves", 1985,
    https://doi.org/10.1145/325165.325242 (2).
"""

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import combine, norm_per_sample, scale
from diffjax.core.types import DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.solvers.adaptive import PIController
from diffjax.solvers.base import Final, Keep, Tweedie
from diffjax.solvers.driver import Result
from diffjax.solvers.ode import solve_adaptive


def encode(
    key: Key,
    denoise: DenoiseFn,
    process: Process,
    x: PyTree,
    *,
    controller: PIController = PIController(),
    t_min: Number | None = None,
) -> Result:
    """The latents of data, eq. (1): `Result.x` is like x. The rest as `solve_adaptive`.

    t_min: where x is taken to stand; None for the process's own.
    """
    start = process.t_min if t_min is None else t_min
    return solve_adaptive(
        key,
        denoise,
        x,
        start,
        process.t_max,
        process=process,
        controller=controller,
        final=Keep(),
    )


def decode(
    key: Key,
    denoise: DenoiseFn,
    process: Process,
    latent: PyTree,
    *,
    controller: PIController = PIController(),
    t_min: Number | None = None,
    final: Final = Tweedie(),
) -> Result:
    """The data of latents, eq. (1): `Result.x` is like `latent`. The rest as `solve_adaptive`.

    final: `Keep()` for the exact inverse of `encode`, which leaves the noise of sigma(t_min).
    """
    end = process.t_min if t_min is None else t_min
    return solve_adaptive(
        key,
        denoise,
        latent,
        process.t_max,
        end,
        process=process,
        controller=controller,
        final=final,
    )


def slerp(a: PyTree, b: PyTree, weight: Number) -> PyTree:
    """Eq. (2), like a: a at weight 0, b at 1. weight: () or (B,).

    a, b: (B, *data), trees; the angle is that of a whole sample. Latents of one direction are
    interpolated straight; between opposite ones there is no direction to take, and the result is
    not a number or large.
    """
    u, v = (scale(1 / norm_per_sample(tree), tree) for tree in (a, b))
    gap = norm_per_sample(jax.tree.map(jnp.subtract, u, v))
    total = norm_per_sample(jax.tree.map(jnp.add, u, v))
    angle = 2 * jnp.arctan2(gap, total)  # keeps its digits at small angles, unlike an arccosine
    # sin(w theta)/sin(theta) through sin(x)/x, which is finite at 0.
    sinc = lambda share: jnp.sinc(share * angle / jnp.pi)  # noqa: E731
    weight = jnp.asarray(weight)
    first = (1 - weight) * sinc(1 - weight) / sinc(1.0)
    second = weight * sinc(weight) / sinc(1.0)
    return combine((first, a), (second, b))


def temper(latent: PyTree, temperature: Number) -> PyTree:
    """Eq. (3), like `latent`. temperature: () or (B,), positive."""
    checks.positive("temperature", temperature)
    return scale(temperature, latent)
