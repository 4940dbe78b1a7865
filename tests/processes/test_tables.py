"""Published numbers: the Score-SDE processes, DDPM's table, EDM's coordinates.

The figures are facts of the papers and of the reference code, computed independently in float64
with beta from 0.1 to 20 and sigma from 0.01 to 50.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.processes import EDM, VE, VP, Cosine, RectifiedFlow, SubVP, Tabulated, calculus

# t: alpha, sigma of VP, sigma of sub-VP, g of VP, g of sub-VP, sigma of VE, g of VE.
SCORE_SDE = {
    1e-5: (
        0.9999995, 1.0004971e-3, 1.0009945e-6,
        0.31654226, 4.4788078e-4, 0.010000852, 0.04127625,
    ),
    1e-3: (
        0.99994503, 0.010485416, 1.0994396e-4,
        0.34626579, 5.134502e-3, 0.010085536, 0.041625764,
    ),
    0.1: (0.9467218, 0.32205254, 0.10371784, 1.4456832, 0.64113775, 0.023436729, 0.096729791),
    0.5: (0.28118288, 0.9596542, 0.92093619, 3.1701735, 3.1602494, 0.70710678, 2.9184231),
    1.0: (0.0065715865, 0.99997841, 0.99995681, 4.472136, 4.472136, 50.0, 206.36367),
}  # fmt: skip


def computed(t):
    """The row of `SCORE_SDE` from the code."""
    t = jnp.asarray(t)
    vp, subvp, ve = VP(), SubVP(), VE()
    g = lambda process: calculus.diffusion(process, t)  # noqa: E731
    assert vp.coeffs(t).alpha == subvp.coeffs(t).alpha and ve.coeffs(t).alpha == 1
    sigmas = vp.coeffs(t).sigma, subvp.coeffs(t).sigma
    return (vp.coeffs(t).alpha, *sigmas, g(vp), g(subvp), ve.coeffs(t).sigma, g(ve))


@pytest.mark.parametrize("t", SCORE_SDE)
def test_score_sde_in_float64(t, x64):
    np.testing.assert_allclose(computed(t), SCORE_SDE[t], rtol=1e-6)


@pytest.mark.parametrize("t", SCORE_SDE)
def test_score_sde_in_float32(t):
    # 1 - exp(-B) as it stands is off by 1e-2 at t = 1e-5; expm1 keeps every digit.
    np.testing.assert_allclose(computed(t), SCORE_SDE[t], rtol=1e-5)


def test_small_times_keep_their_digits_in_float32():
    # The truth in float64 NumPy; the plain form is wrong by up to 3% here.
    t = np.geomspace(1e-5, 1e-3, 200)
    integral = 0.1 * t + 19.9 * t**2 / 2
    plain = 1 - np.exp(-integral.astype(np.float32))
    exact = -np.expm1(-integral)
    assert np.abs(plain / exact - 1).max() > 1e-2
    t = jnp.asarray(t, jnp.float32)
    np.testing.assert_allclose(VP().coeffs(t).sigma, np.sqrt(exact), rtol=1e-6)
    np.testing.assert_allclose(SubVP().coeffs(t).sigma, exact, rtol=1e-6)
    g2 = (0.1 + 19.9 * np.asarray(t, np.float64)) * -np.expm1(-2 * integral)
    np.testing.assert_allclose(SubVP().rates(t).g2, g2, rtol=1e-6)


def test_subvp_stays_below_vp():
    # The bound that names sub-VP (Song et al., 2021, section 3.4), tight at the noisy end only.
    t = jnp.linspace(1e-3, 1.0, 50)
    below, above = SubVP().coeffs(t).sigma, VP().coeffs(t).sigma
    assert (below < above).all()
    np.testing.assert_allclose(below, above**2, rtol=1e-5)


def test_ddpm_table(x64):
    process = Tabulated.ddpm(1000)
    k = np.asarray([0, 499, 999])
    abar = np.asarray(process.coeffs(jnp.asarray((k + 1) / 1000)).alpha) ** 2
    np.testing.assert_allclose(abar, [0.9999, 0.0785872, 4.0358e-5], rtol=1e-5)
    assert 1 - abar[0] == pytest.approx(1e-4, rel=1e-9)


def test_table_is_the_product_at_its_knots():
    # Float64 products in NumPy; float32 cumulative products lose digits at level 0 (8e-5).
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    t = jnp.asarray(np.arange(1, 1001) / 1000, jnp.float32)
    alpha, beta, sigma = Tabulated.from_betas(betas).coeffs(t)
    np.testing.assert_allclose(alpha, np.sqrt(abar), rtol=2e-5)
    np.testing.assert_allclose(sigma, np.sqrt(1 - abar), rtol=2e-5)
    assert (beta == 0).all()
    assert sigma[0] == pytest.approx(0.01, rel=1e-6)
    again = Tabulated.from_alphas_cumprod(abar)
    np.testing.assert_allclose(again.log_alphas_cumprod, np.log(abar), rtol=1e-6)
    assert again.t_min == pytest.approx(1e-3) and again.t_max == 1.0


def test_table_between_knots_and_at_zero(x64):
    process = Tabulated.from_alphas_cumprod([0.9, 0.5, 0.1])
    middle = process.coeffs(jnp.asarray(0.5)).alpha ** 2  # halfway between levels 0 and 1
    assert middle == pytest.approx(np.sqrt(0.9 * 0.5), rel=1e-12)
    assert process.coeffs(jnp.asarray(0.0)).sigma == 0


def test_table_steps_are_the_discrete_betas(x64):
    # The transition of one level is DDPM's: variance beta_k, factor sqrt(1 - beta_k).
    betas = np.linspace(1e-4, 0.02, 1000)
    process = Tabulated.from_betas(betas)
    k = np.asarray([0, 1, 500, 999])
    t, s = jnp.asarray((k + 1) / 1000), jnp.asarray(k / 1000)
    a, b2 = calculus.transition(process, t, s)
    np.testing.assert_allclose(a, np.sqrt(1 - betas[k]), rtol=1e-12)
    np.testing.assert_allclose(b2, betas[k], rtol=1e-9)


def noise_level(process, t):
    alpha, _, sigma = process.coeffs(jnp.asarray(t))
    return sigma / alpha


def test_edm_coordinates(x64):
    # sigma/alpha at the ends, and its closed forms in between.
    assert noise_level(VP(), 1.0) == pytest.approx(152.17, rel=1e-4)
    assert noise_level(SubVP(), 1.0) == pytest.approx(152.16, rel=1e-4)
    assert noise_level(VE(), 1.0) == pytest.approx(50, rel=1e-12)
    assert noise_level(VP(), 1e-3) == pytest.approx(0.010486, rel=1e-4)
    assert noise_level(SubVP(), 1e-3) == pytest.approx(1.0995e-4, rel=1e-4)
    t = np.linspace(0.01, 1, 20)
    integral = 0.1 * t + 19.9 * t**2 / 2
    np.testing.assert_allclose(noise_level(VP(), t), np.sqrt(np.exp(integral) - 1), rtol=1e-10)
    np.testing.assert_allclose(noise_level(SubVP(), t), 2 * np.sinh(integral / 2), rtol=1e-10)
    np.testing.assert_allclose(noise_level(EDM(), t), t, rtol=1e-15)
    np.testing.assert_allclose(
        noise_level(RectifiedFlow(), t[:-1]), 1 / (1 / t[:-1] - 1), rtol=1e-9
    )


def test_edm_coordinates_back(x64):
    sigma = np.geomspace(1e-3, 100, 30)
    lam = jnp.asarray(-2 * np.log(sigma))
    vp = (np.sqrt(0.1**2 + 2 * 19.9 * np.log(1 + sigma**2)) - 0.1) / 19.9
    np.testing.assert_allclose(VP().inverse_log_snr(lam), vp, rtol=1e-9)
    integral = 2 * np.arcsinh(sigma / 2)
    subvp = (np.sqrt(0.1**2 + 2 * 19.9 * integral) - 0.1) / 19.9
    np.testing.assert_allclose(SubVP().inverse_log_snr(lam), subvp, rtol=1e-9)
    np.testing.assert_allclose(EDM().inverse_log_snr(lam), sigma, rtol=1e-12)
    ve = np.log(sigma / 0.01) / np.log(50 / 0.01)
    np.testing.assert_allclose(VE().inverse_log_snr(lam), ve, rtol=1e-9, atol=1e-12)


def test_cosine_is_the_published_schedule(x64):
    # abar(t) = f(t)/f(0), f(t) = cos^2(pi/2 (t + s)/(1 + s)), s = 0.008; figures from the formula.
    t = np.asarray([0.0, 1e-4, 0.25, 0.5, 0.75, 0.999])
    f = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    alpha, _, sigma = Cosine().coeffs(jnp.asarray(t))
    np.testing.assert_allclose(alpha**2, f(t) / f(0.0), rtol=1e-10)
    np.testing.assert_allclose(sigma**2, 1 - f(t) / f(0.0), rtol=1e-7, atol=1e-15)


def test_cosine_keeps_its_digits_in_float32():
    # 1 - abar near t = 0 by a sum that does not cancel, in NumPy: sin^2 of both angles.
    t = np.geomspace(1e-5, 1e-2, 50)
    u, u0 = ((v + 0.008) / 1.008 * np.pi / 2 for v in (t, 0.0))
    exact = np.sqrt((np.sin(u) ** 2 - np.sin(u0) ** 2) / np.cos(u0) ** 2)
    sigma = Cosine().coeffs(jnp.asarray(t, jnp.float32)).sigma
    np.testing.assert_allclose(sigma, exact, rtol=1e-5)
