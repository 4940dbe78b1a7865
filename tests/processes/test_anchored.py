"""The mean-reverting process: its law from its equation, its schedule from its definition."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from diffjax.processes import ConstantReversion, CosineReversion, MeanReverting, perturb

PROCESSES = {
    "cosine": MeanReverting(),
    "constant": MeanReverting(0.3, 0.02, ConstantReversion()),
    "offset": MeanReverting(0.1, 0.01, CosineReversion(0.1)),
}


def theta(name, t):
    """The speed of reversion as published, its integral to t = 1 being -ln delta."""
    process = PROCESSES[name]
    if name == "constant":
        shape = np.ones_like
    else:
        s = process.reversion.offset
        angle = lambda t: (t + s) / (1 + s) * np.pi / 2  # noqa: E731
        shape = lambda t: 1 - np.cos(angle(t)) ** 2 / np.cos(angle(0.0)) ** 2  # noqa: E731
    whole = scipy.integrate.quad(shape, 0, 1, epsabs=1e-14, epsrel=1e-13)[0]
    return -np.log(process.alpha_end) / whole * shape(t)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_law_solves_the_equation(name, x64):
    """dx = theta (y - x) dt + lambda sqrt(2 theta) dw: mean and variance, by scipy."""
    process = PROCESSES[name]

    def slope(t, state):
        of_x0, of_y, variance = state
        speed = theta(name, np.asarray(t))
        noise = 2 * process.sigma_max**2 * speed
        return [-speed * of_x0, speed * (1 - of_y), -2 * speed * variance + noise]

    times = np.asarray([1e-3, 0.03, 0.4, 1.0])
    solved = scipy.integrate.solve_ivp(
        slope, (0, 1), [1.0, 0.0, 0.0], t_eval=times, method="DOP853", rtol=1e-12, atol=1e-15
    )
    c = process.coeffs(jnp.asarray(times))
    np.testing.assert_allclose(c.alpha, solved.y[0], rtol=1e-9)
    np.testing.assert_allclose(c.beta, solved.y[1], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(c.sigma**2, solved.y[2], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(c.alpha[-1], process.alpha_end, rtol=1e-12)


def test_the_reference_table_is_near(x64):
    """The published code sums theta over T levels; at T = 1000 it is the integral to 1 %."""
    levels = 1000
    u = (np.arange(1, levels + 2) / (levels + 2) + 0.008) / 1.008 * np.pi / 2
    speeds = 1 - np.cos(u) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    sums = np.cumsum(speeds) / np.sum(speeds) * -np.log(0.005)
    t = np.arange(1, levels + 2) / (levels + 1)
    sigma = 50 / 255 * np.sqrt(1 - np.exp(-2 * sums))
    found = MeanReverting().coeffs(jnp.asarray(t))
    late = t > 0.05
    np.testing.assert_allclose(found.sigma[late], sigma[late], rtol=0.03)
    np.testing.assert_allclose(found.alpha[late], np.exp(-sums[late]), rtol=0.02)


@pytest.mark.parametrize("name", PROCESSES)
def test_digits_in_float32(name):
    """Near the data, where the angles of the cosine schedule would cancel."""
    t = np.geomspace(1e-4, 1.0, 40)
    found = PROCESSES[name].coeffs(jnp.asarray(t, jnp.float32))
    whole = [scipy.integrate.quad(lambda u: theta(name, u), 0, x, epsabs=0)[0] for x in t]
    exact = PROCESSES[name].sigma_max * np.sqrt(-np.expm1(-2 * np.asarray(whole)))
    np.testing.assert_allclose(found.sigma, exact, rtol=2e-5)
    np.testing.assert_allclose(found.beta, -np.expm1(-np.asarray(whole)), rtol=2e-5)


def test_data_at_the_anchor_stay_there():
    """alpha + beta = 1: of x0 = y only the noise moves."""
    y = jnp.asarray([[0.3, -2.0]])
    moved = perturb(MeanReverting(), y, jnp.asarray(0.4), jnp.zeros_like(y), anchor=y)
    np.testing.assert_allclose(moved, y, rtol=1e-6)


def test_bad_numbers_raise():
    with pytest.raises(ValueError, match="sigma_max must be positive"):
        MeanReverting(sigma_max=0.0)
    with pytest.raises(ValueError, match="alpha_end must be below 1"):
        MeanReverting(alpha_end=1.5)
    with pytest.raises(ValueError, match="offset must be positive"):
        CosineReversion(0.0)
