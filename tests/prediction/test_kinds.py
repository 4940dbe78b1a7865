"""Rows: every parameterisation gives back what it was made of, and says where it cannot."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.types import Coeffs
from diffjax.prediction import EDMF, V, as_kind, decode, determinant, target
from diffjax.processes import EDM, VE, VP, Cosine, RectifiedFlow, SubVP, calculus
from tests import members

PROCESSES = [m for m in members.PROCESSES if m.scalar]


def pair(shape=(7, 5), seed=0):
    """x0 and eps, NumPy float64."""
    return np.random.default_rng(seed).standard_normal((2, *shape))


@pytest.mark.parametrize("process", PROCESSES, ids=members.ids)
@pytest.mark.parametrize("kind", members.KINDS, ids=members.ids)
def test_round_trip_in_float64(kind, process, x64):
    # target then decode: 1e-12 wherever the system is not nearly singular.
    t = jnp.linspace(process.low, process.high, 7)
    x0, eps = (jnp.asarray(v) for v in pair())
    p = process.process
    x_t = calculus.perturb(p, x0, t, eps)
    found = decode(kind.kind, p, x_t, target(kind.kind, p, x0, eps, t), t)
    regular = np.abs(determinant(kind.kind, p, t)) > 1e-3
    assert regular.any()
    size = np.abs(x_t).max()
    for a, b in ((found.x0, x0), (found.eps, eps)):
        np.testing.assert_allclose(a[regular], b[regular], rtol=0, atol=1e-12 * size)


def condition(kind, process, t):
    """The condition number of the 2x2 system at each t, after its rows are scaled to one."""
    a, b = (np.broadcast_to(v, t.shape) for v in kind.row(process, t))
    alpha, _, sigma = process.coeffs(t)
    matrix = np.stack([np.stack([a, b], -1), np.stack([alpha, sigma], -1)], -2).astype(np.float64)
    matrix /= np.linalg.norm(matrix, axis=-1, keepdims=True)
    return np.linalg.cond(matrix)


@pytest.mark.parametrize("process", PROCESSES, ids=members.ids)
@pytest.mark.parametrize("kind", members.KINDS, ids=members.ids)
def test_round_trip_in_float32(kind, process):
    # Within 8 units of rounding times the condition number of the system.
    t = jnp.linspace(process.low, process.high, 7, dtype=jnp.float32)
    x0, eps = (jnp.asarray(v, jnp.float32) for v in pair())
    p = process.process
    x_t = calculus.perturb(p, x0, t, eps)
    found = decode(kind.kind, p, x_t, target(kind.kind, p, x0, eps, t), t)
    alpha, _, sigma = (np.asarray(c, np.float64)[:, None] for c in p.coeffs(t))
    size = np.abs(np.asarray(x_t)).max(axis=1, keepdims=True) + np.abs(np.asarray(eps)).max()
    bound = 8 * np.finfo(np.float32).eps * condition(kind.kind, p, t)[:, None] * size
    # x0 and eps in their own units: what is lost of x_t is divided by alpha, by sigma.
    assert (np.abs(found.x0 - x0) <= bound / np.minimum(alpha, 1)).all()
    assert (np.abs(found.eps - eps) <= bound / np.minimum(sigma, 1)).all()


class Fixed:
    """A process at one pair (alpha, sigma), moving along (d_alpha, d_sigma)."""

    def __init__(self, alpha, sigma, d_alpha=-1.0, d_sigma=1.0):
        self.values = alpha, sigma, d_alpha, d_sigma

    def coeffs(self, t):
        alpha, sigma, d_alpha, d_sigma = self.values
        return Coeffs(alpha + d_alpha * t, jnp.zeros_like(t), sigma + d_sigma * t)


@pytest.mark.parametrize("kind", members.KINDS, ids=members.ids)
def test_limits_at_the_ends(kind):
    # The table of limits: without signal x_t = eps, without noise x_t = x0. Where a row has a
    # limit the pair comes back; elsewhere the half that x_t does not hold is not finite.
    x0, eps = (jnp.asarray(v, jnp.float32) for v in pair())
    t = jnp.asarray(0.0)
    ends = {
        "signal": (Fixed(0.0, 1.0, d_alpha=1.0, d_sigma=0.0), kind.without_signal),
        "noise": (Fixed(1.0, 0.0, d_alpha=0.0, d_sigma=1.0), kind.without_noise),
    }
    for missing, (process, defined) in ends.items():
        x_t = calculus.perturb(process, x0, t, eps)
        out = target(kind.kind, process, x0, eps, t)
        found = decode(kind.kind, process, x_t, out, t)
        det = float(determinant(kind.kind, process, t))
        assert (np.isfinite(det) and det != 0) == defined, missing
        if defined:
            np.testing.assert_allclose(found.x0, x0, rtol=1e-6)
            np.testing.assert_allclose(found.eps, eps, rtol=1e-6)
        else:
            lost = found.x0 if missing == "signal" else found.eps
            assert not np.isfinite(lost).all()


def test_what_is_predicted_is_handed_back():
    # eps and x0 networks: their own half comes back bit for bit, also where it is all there is.
    x0, eps = (jnp.asarray(v, jnp.float32) for v in pair())
    process = Fixed(1.0, 0.0, d_alpha=0.0)
    assert (decode(as_kind("eps"), process, x0, eps, jnp.asarray(0.0)).eps == eps).all()
    process = Fixed(0.0, 1.0, d_sigma=0.0)
    assert (decode(as_kind("x0"), process, eps, x0, jnp.asarray(0.0)).x0 == x0).all()


DEFINITIONS = {
    # Each output in the words of its paper, for x0 = 2, eps = -3, VP at t = 0.5.
    "eps": lambda a, s: -3.0,
    "x0": lambda a, s: 2.0,
    "score": lambda a, s: 3.0 / s,
    "sigma_score": lambda a, s: 3.0,
    "v": lambda a, s: -3.0 * a - 2.0 * s,
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_targets_are_the_papers(name, x64):
    t = jnp.asarray(0.5)
    one = jnp.ones((1, 1))
    alpha, sigma = 0.28118288, 0.9596542
    found = target(as_kind(name), VP(), 2.0 * one, -3.0 * one, t)
    assert found == pytest.approx(DEFINITIONS[name](alpha, sigma), rel=1e-6)


def test_velocity_is_the_time_derivative(x64):
    x0, eps = (jnp.asarray(v) for v in pair((3, 2)))
    for process in (VP(), SubVP(), VE(), Cosine(), EDM()):
        t, h = 0.4, 1e-6
        up, down = (calculus.perturb(process, x0, jnp.asarray(t + e), eps) for e in (h, -h))
        found = target(as_kind("velocity"), process, x0, eps, jnp.asarray(t))
        np.testing.assert_allclose(found, (up - down) / (2 * h), rtol=1e-6, atol=1e-6)
    straight = target(as_kind("velocity"), RectifiedFlow(), x0, eps, jnp.asarray(0.3))
    np.testing.assert_allclose(straight, eps - x0, rtol=1e-12)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 3.0, 80.0])
def test_F_is_edms(sigma, x64):
    # D = c_skip x + c_out F with EDM's table, for alpha = 1.
    s_d = 0.5
    c_skip = s_d**2 / (sigma**2 + s_d**2)
    c_out = sigma * s_d / np.sqrt(sigma**2 + s_d**2)
    x, out = (jnp.asarray(v) for v in pair())
    found = decode(EDMF(s_d), EDM(), x, out, jnp.asarray(sigma))
    np.testing.assert_allclose(found.x0, c_skip * x + c_out * out, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.eps, (x - found.x0) / sigma, rtol=1e-7, atol=1e-9)


def test_F_is_edms_in_any_coordinates(x64):
    # On VP the same table holds in x/alpha and sigma/alpha.
    t = jnp.asarray(0.4)
    alpha, _, sigma = (float(c) for c in VP().coeffs(t))
    level, s_d = sigma / alpha, 0.7
    x, out = (jnp.asarray(v) for v in pair())
    expected = (
        s_d**2 / (level**2 + s_d**2) * x / alpha + level * s_d / np.sqrt(level**2 + s_d**2) * out
    )
    np.testing.assert_allclose(decode(EDMF(s_d), VP(), x, out, t).x0, expected, rtol=1e-10)


def test_F_is_minus_v_for_unit_data(x64):
    t = jnp.asarray([0.1, 0.9])
    for a, b in zip(EDMF(1.0).row(VP(), t), V().row(VP(), t), strict=True):
        np.testing.assert_allclose(a, -b, rtol=1e-12)


def test_F_has_unit_variance(x64):
    # For data of deviation s_d the target's variance a^2 s_d^2 + b^2 is one at every time.
    for member in PROCESSES:
        t = jnp.linspace(member.low, member.high, 9)
        a, b = EDMF(0.3).row(member.process, t)
        np.testing.assert_allclose(a**2 * 0.3**2 + b**2, 1, rtol=1e-12)


def test_names():
    assert isinstance(as_kind("v"), V)
    given = EDMF(0.3)
    assert as_kind(given) is given
