"""Coefficients of exponential integrators, for every pair (alpha, sigma) alike.

Symbols: t the current time, s the target, h = ln(alpha_s sigma_t/(alpha_t sigma_s)) the step of the
half log-SNR ln(alpha/sigma), r = e^-h, eta the strength of the noise (0: the probability flow),
m(tau) what is extrapolated (x0 or eps), tau = 0 at t and 1 at s, z' standard normal.

The flow, or the reverse SDE with eta times its noise, is linear in x but for the network. With its
linear part solved exactly,

    x_s = alpha_s x0 + k eps + sum_(i>=1) W_i p_i + n z',   m(tau) = m_t + sum_(i>=1) p_i tau^i  (1)

where x0, eps are the prediction at t, and

    x0:   k = sigma_s e^(-eta h),  W_i = alpha_s M_i(z),  z = (1 + eta) h
          n^2 = sigma_s^2 (1 - e^(-2 eta h))                                                     (2)
    eps:  k = sigma_s (1 - eta (e^h - 1)),  W_i = (1 + eta) sigma_s M_i(-h)
          n^2 = eta sigma_s^2 (e^(2h) - 1)                                                       (3)
    M_i(z) = z int_0^1 e^(-z (1 - tau)) tau^i dtau = 1 - (i/z) M_(i-1),  M_0 = 1 - e^-z          (4)

so that DDIM is (1) without the sum. (4) holds where tau is linear in the log-SNR (`variable`
"lambda"). The polynomial may be one in another variable:

    rho    sigma/alpha for eps, alpha/sigma for x0: then W_i = W_0/(i + 1)                       (5)
    t      W_i = W_0 (1 - i int_0^1 tau^(i-1) y dtau), y = rho's way from 0 at t to 1 at s       (6)
    step   the number of the step, and rho as if it grew evenly: (5) with tau = -1, -2, ...      (7)

(6) is found with Gauss-Legendre quadrature. The polynomial goes through m at t and through the
nodes tau_j; on differences, with Lagrange's l_j,

    sum_i W_i p_i = sum_j w_j (m_j - m_t),   w_j = sum_i W_i [tau^i] l_j(tau)                    (8)

Two rules of the papers replace W_1 where there is one node besides t, which keeps the order:

    b2  W_1 = W_0/2 ("midpoint" in DPM-Solver's code)       b1  W_1 = (W_i/M_i) z/2              (9)

In float32 at 1,000 steps nothing cancels: (1) corrects DDIM by small terms, h comes from a ratio,
M_i from a quadrature with positive weights where |z| < 2. A node where alpha = 0 is infinitely far
in log-SNR and gets no weight; from there the eps form has no correction, and the x0 form its limit,
also in place of B1, which has none. A step up to alpha = 0 (an inversion) is DDIM's.

References:
[1] Lu et al., "DPM-Solver", 2022, https://arxiv.org/abs/2206.00927 (eps, log-SNR).
[2] Lu et al., "DPM-Solver++", 2022, https://arxiv.org/abs/2211.01095 (x0; the SDE at eta = 1).
[3] Zhang, Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", 2022,
    https://arxiv.org/abs/2204.13902 (DEIS: t and rho).
[4] Zhao et al., "UniPC", 2023, https://arxiv.org/abs/2302.04867 (B1, B2, the corrector).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.numerics import safe_sqrt
from diffjax.core.types import Array, Coeffs, Number
from diffjax.processes.base import Process
from diffjax.processes.calculus import between

Kind = Literal["x0", "eps"]
Variable = Literal["lambda", "rho", "t", "step"]
Slope = Literal["exact", "b1", "b2"]

_NODES = 12  # of Gauss-Legendre: for (4) with |z| < 2 far below float64's rounding


class Move(NamedTuple):
    """The numbers of eq. (1) from t to s but for W_i, i >= 1; each shaped like `coeffs(t)`.

    reached, at_t: the coefficients at s and t. kept: k. carry: how x_s moves with x_t at a fixed
    prediction. pull: W_0, how it moves with m. noise: n. z: of M_i. ratio: r. scale: W_i/M_i.
    """

    at_t: Coeffs
    reached: Coeffs
    kept: Array
    carry: Array
    pull: Array
    noise: Array
    z: Array
    ratio: Array
    scale: Array


def move(process: Process, kind: Kind, t: Array, s: Array, eta: Number | None = None) -> Move:
    """Eqs. (2) and (3) from t to s; sigma_s = 0 and alpha = 0 at either end are limits.

    kind: what is extrapolated. eta: None or a number >= 0.
    """
    step = between(process, t, s)
    at_t, at_s = step.at_t, step.at_s
    # Up to alpha_s = 0 r is infinite. Any other does: all but `kept` is zero there.
    signal_left = at_s.alpha > 0
    r = jnp.where(signal_left, step.r, 2)
    inside = r > 0
    far = 1 / jnp.finfo(r.dtype).eps
    h = jnp.where(inside, -jnp.log(jnp.where(inside, r, 1)), far)
    strength = 0.0 if eta is None else jnp.asarray(eta).astype(r.dtype)
    if kind == "x0":
        fade = jnp.ones_like(r) if eta is None else jnp.exp(-strength * h)
        kept, carry = at_s.sigma * fade, at_s.sigma / at_t.sigma * fade
        pull = at_s.alpha * _one_minus(r * fade, (1 + strength) * h, eta is None)
        noise = at_s.sigma * safe_sqrt(-jnp.expm1(-2 * strength * h))
        return Move(at_t, at_s, kept, carry, pull, noise, (1 + strength) * h, r, at_s.alpha)
    signal = at_t.alpha > 0
    grown = jnp.where(signal, at_s.alpha / jnp.where(signal, at_t.alpha, 1), 0)
    gap = grown * at_t.sigma * (1 - r)  # sigma_s (e^h - 1), also where sigma_s = 0
    kept = at_s.sigma - strength * gap
    noise = safe_sqrt(strength * (grown * at_t.sigma) ** 2 * step.gain)
    scale = jnp.where(signal & signal_left, (1 + strength) * at_s.sigma, 0)
    z = jnp.where(inside, -h, -1)
    return Move(at_t, at_s, kept, grown, -(1 + strength) * gap, noise, z, r, scale)


def _one_minus(ratio: Array, z: Array, plain: bool) -> Array:
    """1 - e^-z, from the ratio itself where there is no noise."""
    return 1 - ratio if plain else -jnp.expm1(-z)


def moments(z: Array, count: int) -> Array:
    """M_1..M_count of eq. (4), (count, *z.shape): by quadrature where |z| < 2, else recursively."""
    small = jnp.abs(z) < 2
    near, away = jnp.where(small, z, 0), jnp.where(small, 2, z)
    taus, weights = _rule()
    rows = np.stack([weights * taus**i for i in range(1, count + 1)])
    values = jnp.exp(-near[None] * _along(jnp.asarray(1 - taus, z.dtype), z))
    integral = near[None] * _weighted(rows, values)
    closed, last = [], -jnp.expm1(-away)
    for i in range(1, count + 1):
        last = 1 - i / away * last
        closed.append(last)
    return jnp.where(small[None], integral, jnp.stack(closed))


def _rule() -> tuple[np.ndarray, np.ndarray]:
    """The points and weights of Gauss and Legendre on [0, 1]."""
    points, weights = np.polynomial.legendre.leggauss(_NODES)
    return (points + 1) / 2, weights / 2


def _weighted(rows: np.ndarray, values: Array) -> Array:
    """Sums over nodes, (R, *shape), for rows (R, Q) of weights and values (Q, *shape)."""
    matrix = jnp.asarray(rows, values.dtype)
    return jnp.tensordot(matrix, values, axes=1, precision=jax.lax.Precision.HIGHEST)


def integrals(
    process: Process, kind: Kind, variable: Variable, moved: Move, t: Array, s: Array, count: int
) -> Array:
    """W_1..W_count of eqs. (2) to (7), (count, *coeffs)."""
    if variable == "lambda":
        return moved.scale[None] * moments(moved.z, count)
    if variable == "t":
        shares = _over_time(process, kind, moved, t, s, count)
    else:
        shares = _along(1 / jnp.arange(2, count + 2, dtype=moved.pull.dtype), moved.pull)
    return moved.pull[None] * shares


def _over_time(process: Process, kind: Kind, moved: Move, t: Array, s: Array, count: int) -> Array:
    """W_i/W_0 of eq. (6), i = 1..count, (count, *coeffs)."""
    taus, weights = _rule()
    times = jnp.stack([t + float(tau) * (s - t) for tau in taus])
    path, end = _ratios(process.coeffs(times), moved.at_t), moved.ratio
    if kind == "x0":
        path, end = 1 / path, 1 / end
    way = (path - 1) / (end - 1)[None]
    return 1 - _weighted(
        np.stack([weights * i * taus ** (i - 1) for i in range(1, count + 1)]), way
    )


def _ratios(at: Coeffs, at_t: Coeffs) -> Array:
    """(alpha_t sigma_j)/(alpha_j sigma_t), (J, *coeffs); very large where alpha_j = 0."""
    signal = at.alpha > 0
    ratio = (at_t.alpha / at_t.sigma)[None] * (at.sigma / jnp.where(signal, at.alpha, 1))
    return jnp.where(signal, ratio, 1 / jnp.finfo(ratio.dtype).eps)


def places(
    process: Process,
    kind: Kind,
    variable: Variable,
    moved: Move,
    t: Array,
    s: Array,
    times: Array,
    valid: Array,
) -> Array:
    """tau_j of past times, newest first, (J, *coeffs).

    times: (J, *t.shape). valid: (J,) bool; the others are given places that harm nothing.
    """
    steps = -jnp.arange(1, times.shape[0] + 1, dtype=moved.pull.dtype)
    steps = _along(steps, moved.pull)
    if variable == "step":
        return steps
    if variable == "t":
        gaps = (times - t[None]) / (s - t)[None]
        taus = gaps.reshape(gaps.shape + (1,) * (moved.pull.ndim - t.ndim))
        taus = jnp.broadcast_to(taus, steps.shape).astype(steps.dtype)
    else:
        at = process.coeffs(times)
        ratios = jnp.where(_along(valid, moved.pull), _ratios(at, moved.at_t), 2)
        ratios = jnp.where(ratios > 0, ratios, 2)  # from alpha_t = 0 on there is no past
        if variable == "lambda":
            far = 1 / jnp.finfo(ratios.dtype).eps
            gaps = jnp.where(at.alpha > 0, jnp.log(ratios), far)
            taus = gaps / jnp.log(jnp.where(moved.ratio > 0, moved.ratio, 0.5))[None]
        elif kind == "eps":
            taus = (ratios - 1) / (moved.ratio - 1)[None]
        else:
            taus = (1 / ratios - 1) / (1 / moved.ratio - 1)[None]
    return jnp.where(_along(valid, moved.pull), taus, steps)


def _along(values: Array, like: Array) -> Array:
    """(J,) values as (J, *like.shape)."""
    shaped = values.reshape((values.shape[0],) + (1,) * like.ndim)
    return jnp.broadcast_to(shaped, (values.shape[0], *like.shape))


def weights(
    taus: Array,
    valid: Array,
    moved: Move,
    totals: Array,
    *,
    slope: Slope = "exact",
    curvature: Number = 1.0,
) -> Array:
    """w_j of eq. (8), (J, *coeffs), 0 where a node is not valid.

    taus: (J, *coeffs), none of them 0. valid: (J,) bool, at least as many as are to count.
    totals: W_1..W_J, (J, *coeffs). slope: the rule of eq. (9) where one node is valid.
    curvature: a factor of W_2 where two are.
    """
    nodes, used = taus.shape[0], jnp.sum(valid)
    v = [totals[i] for i in range(nodes)]
    if slope != "exact":
        ruled = moved.pull / 2
        if slope == "b1":  # infinite from alpha_t = 0 on
            ruled = jnp.where(moved.ratio > 0, moved.scale * moved.z / 2, v[0])
        v[0] = jnp.where(used == 1, ruled, v[0])
    if nodes >= 2:
        v[1] = v[1] * jnp.where(used == 2, curvature, 1.0).astype(v[1].dtype)
    return on_differences(taus, valid, jnp.stack(v))


def on_differences(taus: Array, valid: Array, totals: Array) -> Array:
    """w_j of eq. (8) for any W_i, the integrals of tau^i against some weight; as `weights`."""
    nodes = taus.shape[0]
    v = [totals[i] for i in range(nodes)]
    # The integrals of tau (tau - tau_1)..(tau - tau_i), Newton's basis: without the last ones the
    # last nodes are gone.
    for k in range(nodes - 1):
        for i in range(nodes - 1, k, -1):
            v[i] = v[i] - taus[k] * v[i - 1]
    v = [jnp.where(valid[i], v[i], 0) for i in range(nodes)]
    # From divided differences to values, the dual algorithm of Bjorck and Pereyra.
    for k in range(nodes - 2, -1, -1):
        for i in range(k + 1, nodes):
            v[i] = v[i] / jnp.where(valid[i], taus[i] - taus[i - k - 1], 1)
        for i in range(k, nodes - 1):
            v[i] = v[i] - v[i + 1]
    return jnp.stack(v) / taus
