"""What follows from x_t = alpha x0 + sigma eps, for every process alike.

Symbols: s < t two times, a = alpha_t/alpha_s, r = (alpha_t sigma_s)/(alpha_s sigma_t) in [0, 1],
lam = ln(alpha^2/sigma^2) the log signal-to-noise ratio, s(x, t) the score, w a Wiener process.

    dx = f x dt + g dw,   f = d ln(alpha)/dt,   g^2 = d(sigma^2)/dt - 2 f sigma^2               (1)
    x_t | x_s      ~ N(a x_s, b^2),           b^2 = sigma_t^2 (1 - r^2)                         (2)
    x_s | x_t, x0  ~ N(mu, c^2),              c^2 = sigma_s^2 (1 - r^2)                         (3)
                     mu = r (sigma_s/sigma_t) x_t + alpha_s (1 - r^2) x0
    s(x, t) = -eps/sigma                                                                       (4)
    dx = (f x - g^2 s) dt + g dw            the reverse SDE, t running down                    (5)
    dx/dt = f x - g^2 s/2 = alpha' x0 + sigma' eps       the probability-flow ODE              (6)
    x_T ~ N(0, sigma(t_max)^2)                           the prior                             (7)

(6) is used in its second form: alpha' and sigma' stay finite where f and g^2 do not (a flow at
t = 1), and nothing cancels. (2) and (3) use r, which keeps its digits when s is close to t, where a
difference of two log-SNRs loses them. 1 - r^2 is computed as (1 - r)(1 + r).

The prior (7) is the process's own at t_max. The reference code draws N(0, 1) for VP and sub-VP,
whose sigma(1) is 0.99998; and neither keeps the mean alpha(t_max) E[x0], which moves a log-density
by up to 0.4 nats at single points (VE) and by about 1e-5 on average.

Functions take x as a tree with leading batch axis B and t of shape () or (B,).

References:
[1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, eqs. 6, 13, 29.
[2] Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021,
    https://arxiv.org/abs/2107.00630, for the forms in the log-SNR.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core import random
from diffjax.core.numerics import combine, scale, size_per_sample, sum_per_sample
from diffjax.core.types import Array, Coeffs, Key, Number, Prediction, PyTree, Rates
from diffjax.processes.base import Process


def derivatives(process: Process, t: Array) -> Coeffs:
    """(alpha', beta', sigma') at t, each shaped like its coefficient."""
    t = jnp.asarray(t)
    return jax.jvp(process.coeffs, (t,), (jnp.ones_like(t),))[1]


def rates(process: Process, t: Array) -> Rates:
    """f and g^2 of eq. (1): the process's own closed form, else by differentiating its coeffs."""
    if hasattr(process, "rates"):
        return process.rates(t)
    return rates_from_coeffs(process, t)


def rates_from_coeffs(process: Process, t: Array) -> Rates:
    """f and g^2 of eq. (1) by automatic differentiation, finite strictly inside (0, t_max)."""
    alpha, _, sigma = process.coeffs(t)
    d_alpha, _, d_sigma = derivatives(process, t)
    f = d_alpha / alpha
    return Rates(f, 2 * sigma * (d_sigma - f * sigma))


def drift(process: Process, x_t: PyTree, t: Array) -> PyTree:
    """f(t) x_t, eq. (1), like x_t."""
    return scale(rates(process, t).f, x_t)


def diffusion(process: Process, t: Array) -> Array:
    """g(t) >= 0, eq. (1), shaped like t."""
    return jnp.sqrt(rates(process, t).g2)


def log_snr(process: Process, t: Array) -> Array:
    """lam = ln(alpha^2/sigma^2), shaped like t; +inf where sigma = 0, -inf where alpha = 0."""
    alpha, _, sigma = process.coeffs(t)
    return 2 * (jnp.log(alpha) - jnp.log(sigma))


def inverse_log_snr(process: Process, lam: Array) -> Array:
    """The t with log_snr(t) = lam: the process's closed form, else by bisection; like lam."""
    if hasattr(process, "inverse_log_snr"):
        return process.inverse_log_snr(jnp.asarray(lam))
    return inverse_log_snr_by_bisection(process, lam)


def inverse_log_snr_by_bisection(process: Process, lam: Array) -> Array:
    """The t in [t_min, t_max] with log_snr(t) = lam, by bisection; clipped to the range.

    The last step is one Newton step from a point held constant: it squares the error and carries
    the exact derivatives with respect to lam and to the process's constants.

    Raises ValueError for a schedule per pixel, which has no single log-SNR.
    """
    lam = jnp.asarray(lam)
    low = jnp.full_like(lam, process.t_min)
    if (shape := jax.eval_shape(process.coeffs, low).sigma.shape) != low.shape:
        raise ValueError(
            f"A schedule per pixel has no single log-SNR to invert: {type(process).__name__} gives "
            f"coefficients of shape {shape} for times of shape {low.shape}. Use grids.uniform or "
            "grids.quadratic, and a solver without churn."
        )
    high = jnp.full_like(lam, process.t_max)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        above = log_snr(process, middle) > lam  # lam falls as t grows
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    iterations = jnp.finfo(lam.dtype).nmant + 8
    low, high = jax.lax.fori_loop(0, iterations, halve, (low, high))
    t = jax.lax.stop_gradient((low + high) / 2)
    value, slope = jax.jvp(lambda u: log_snr(process, u), (t,), (jnp.ones_like(t),))
    return jnp.clip(t - (value - lam) / jax.lax.stop_gradient(slope), process.t_min, process.t_max)


def perturb(
    process: Process, x0: PyTree, t: Array, eps: PyTree, anchor: PyTree | None = None
) -> PyTree:
    """x_t = alpha x0 + beta y + sigma eps, like x0.

    x0, eps: (B, *data). t: () or (B,). anchor: y, like x0, or None for zero.
    """
    alpha, beta, sigma = process.coeffs(t)
    if anchor is None:
        return combine((alpha, x0), (sigma, eps))
    return combine((alpha, x0), (beta, anchor), (sigma, eps))


class Step(NamedTuple):
    """The numbers between two times s < t that eqs. (2) and (3) share, each shaped like t."""

    a: Array  # alpha_t/alpha_s
    r: Array  # (alpha_t sigma_s)/(alpha_s sigma_t)
    gain: Array  # 1 - r^2
    at_t: Coeffs
    at_s: Coeffs


def between(process: Process, t: Array, s: Array) -> Step:
    """`Step` from t (noisier, sigma_t > 0) to s."""
    at_t, at_s = process.coeffs(t), process.coeffs(s)
    a = at_t.alpha / at_s.alpha
    r = a * at_s.sigma / at_t.sigma
    return Step(a, r, (1 - r) * (1 + r), at_t, at_s)


def transition(process: Process, t: Array, s: Array) -> tuple[Array, Array]:
    """(a, b^2) of x_t | x_s, eq. (2), for s < t; shaped like t."""
    step = between(process, t, s)
    return step.a, step.at_t.sigma**2 * step.gain


def posterior(
    process: Process, x_t: PyTree, x0: PyTree, t: Array, s: Array
) -> tuple[PyTree, Array]:
    """(mean like x_t, variance like t) of x_s | x_t, x0, eq. (3), for s < t."""
    step = between(process, t, s)
    mean = combine(
        (step.r * step.at_s.sigma / step.at_t.sigma, x_t), (step.at_s.alpha * step.gain, x0)
    )
    return mean, step.at_s.sigma**2 * step.gain


def prior(key: Key, process: Process, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Draws x_T, eq. (7), of `shape` = (B, *data). key: one, or (B,), one a sample."""
    keys = random.sample_keys(key, shape[0])
    eps = random.normal_like(keys, "prior", jnp.empty(shape, dtype))
    return scale(process.coeffs(jnp.asarray(process.t_max)).sigma, eps)


def prior_log_prob(process: Process, x_T: PyTree) -> Array:
    """ln N(x_T; 0, sigma(t_max)^2), eq. (7), (B,) in nats."""
    sigma = process.coeffs(jnp.asarray(process.t_max)).sigma
    squares = sum_per_sample(jax.tree.map(jnp.square, scale(1 / sigma, x_T)))
    # The log-determinant is summed over elements, so a standard deviation per pixel works too.
    log_det = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.log(sigma), leaf.shape), x_T)
    return -(squares + size_per_sample(x_T) * math.log(2 * math.pi)) / 2 - sum_per_sample(log_det)


def score(process: Process, prediction: Prediction, t: Array) -> PyTree:
    """grad_x ln p_t(x) = -eps/sigma, eq. (4), like x."""
    return scale(-1 / process.coeffs(t).sigma, prediction.eps)


def reverse_drift(
    process: Process, x_t: PyTree, prediction: Prediction, t: Array, *, share: Number = 1.0
) -> PyTree:
    """f x - share g^2 s, eq. (5), like x_t; its diffusion is g. share: 1/2 for eq. (6)."""
    f, g2 = rates(process, t)
    return combine((f, x_t), (share * g2 / process.coeffs(t).sigma, prediction.eps))


def velocity(process: Process, prediction: Prediction, t: Array) -> PyTree:
    """dx/dt of the probability flow, alpha' x0 + sigma' eps, eq. (6), like x."""
    d_alpha, _, d_sigma = derivatives(process, t)
    return combine((d_alpha, prediction.x0), (d_sigma, prediction.eps))
