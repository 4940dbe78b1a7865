"""The calculus against independent derivations: composed and numerical Gaussians, an ODE by scipy.

Each truth is reached on another road than the code's: transitions by composing, posteriors by Bayes
on numeric covariance matrices, marginals by integrating the moment equations of the SDE.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from diffjax.core.types import Coeffs, Prediction
from diffjax.processes import EDM, VE, VP, Cosine, RectifiedFlow, SubVP, calculus
from tests import members, oracles

TRIPLES = (0.2, 0.5, 0.9)  # where s, u, t stand between low and high


def triple(member):
    """s < u < t inside the member's range."""
    return [jnp.asarray(member.low + f * (member.high - member.low)) for f in TRIPLES]


def numbers(process, t):
    """(alpha, sigma) in float64 NumPy."""
    alpha, _, sigma = process.coeffs(jnp.asarray(t))
    return np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)


@pytest.mark.parametrize("member", members.PROCESSES, ids=members.ids)
def test_transitions_compose(member, x64):
    process, (s, u, t) = member.process, triple(member)
    a1, v1 = calculus.transition(process, u, s)
    a2, v2 = calculus.transition(process, t, u)
    a, v = calculus.transition(process, t, s)
    np.testing.assert_allclose(a, a2 * a1, rtol=1e-10)
    np.testing.assert_allclose(v, a2**2 * v1 + v2, rtol=1e-9)
    # From the data itself: the marginal at s, then the transition, is the marginal at t.
    (alpha_s, sigma_s), (alpha_t, sigma_t) = numbers(process, s), numbers(process, t)
    np.testing.assert_allclose(a * alpha_s, alpha_t, rtol=1e-10)
    np.testing.assert_allclose(a**2 * sigma_s**2 + v, sigma_t**2, rtol=1e-9)


@pytest.mark.parametrize("member", members.PROCESSES, ids=members.ids)
def test_posterior_is_bayes(member, x64):
    # Condition the joint Gaussian of (x_s, x_t) given x0 on x_t, with matrices.
    process, (s, _, t) = member.process, triple(member)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = numbers(process, s), numbers(process, t)
    shape = np.broadcast_shapes(alpha_s.shape, (members.D,))
    rng = np.random.default_rng(0)
    x0, x_t = rng.standard_normal((2, *shape))
    a = np.broadcast_to(alpha_t / alpha_s, shape)
    b2 = sigma_t**2 - a**2 * sigma_s**2
    mean, variance = np.empty(shape), np.empty(shape)
    for i in range(shape[0]):
        p = np.broadcast_to(sigma_s**2, shape)[i]
        joint = np.asarray(
            [[p, a[i] * p], [a[i] * p, a[i] ** 2 * p + np.broadcast_to(b2, shape)[i]]]
        )
        gain = joint[0, 1] / joint[1, 1]
        at_s, at_t = np.broadcast_to(alpha_s, shape)[i], np.broadcast_to(alpha_t, shape)[i]
        mean[i] = at_s * x0[i] + gain * (x_t[i] - at_t * x0[i])
        variance[i] = np.linalg.det(joint) / joint[1, 1]
    found, spread = calculus.posterior(process, jnp.asarray(x_t[None]), jnp.asarray(x0[None]), t, s)
    np.testing.assert_allclose(found[0], mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.broadcast_to(spread, shape), variance, rtol=1e-8)


@pytest.mark.parametrize("member", members.PROCESSES, ids=members.ids)
def test_posterior_keeps_the_total_variance(member, x64):
    # x_t ~ p(x_t | x0), then x_s ~ p(x_s | x_t, x0): x_s has the marginal's mean and variance.
    process, (s, _, t) = member.process, triple(member)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = numbers(process, s), numbers(process, t)
    one, zero = jnp.ones((1, members.D)), jnp.zeros((1, members.D))
    of_x_t, spread = calculus.posterior(process, one, zero, t, s)
    of_x0, _ = calculus.posterior(process, zero, one, t, s)
    of_x_t, of_x0 = np.asarray(of_x_t[0]), np.asarray(of_x0[0])
    mean, variance = of_x0 + of_x_t * alpha_t, of_x_t**2 * sigma_t**2 + np.asarray(spread)
    np.testing.assert_allclose(mean, np.broadcast_to(alpha_s, mean.shape), rtol=1e-9)
    np.testing.assert_allclose(variance, np.broadcast_to(sigma_s**2, mean.shape), rtol=1e-9)


def test_close_times_keep_their_digits_in_float32():
    # Steps of a thousandth of t near the data, where the log-SNR is large: 1 - r^2 inherits the
    # rounding of r, a difference of two log-SNRs that of numbers ten times as large.
    t = jnp.asarray(1e-3 * (1 + 0.01 * np.arange(20)), jnp.float32)
    s = t * (1 - 1e-3)
    for process in (VP(), SubVP(), EDM(), Cosine()):
        with jax.enable_x64(True):
            wide = jnp.asarray(np.asarray(t, np.float64)), jnp.asarray(np.asarray(s, np.float64))
            exact = np.asarray(calculus.transition(process, *wide)[1])
        found = np.asarray(calculus.transition(process, t, s)[1], np.float64)
        assert np.abs(found / exact - 1).max() < 3.5e-4
        gain = -np.expm1(calculus.log_snr(process, t) - calculus.log_snr(process, s))
        by_log_snr = np.asarray(process.coeffs(t).sigma) ** 2 * gain
        assert np.abs(by_log_snr / exact - 1).max() > 3.5e-4


SDES = [m for m in members.PROCESSES if m.scalar and m.name != "tabulated"]


def propagate(slope, start, t0, t1):
    """scipy's integration of a moment equation, to 1e-10."""
    solved = scipy.integrate.solve_ivp(
        slope, (t0, t1), start, method="DOP853", rtol=1e-10, atol=1e-14
    )
    return solved.y[:, -1]


@pytest.mark.parametrize("member", SDES, ids=members.ids)
def test_forward_sde_has_the_marginals(member, x64):
    # d mean = f mean dt, d variance = (2 f variance + g^2) dt from low to high.
    process = member.process
    rates = jax.jit(lambda t: calculus.rates(process, t))
    (alpha, sigma), (alpha_end, sigma_end) = (
        numbers(process, v) for v in (member.low, member.high)
    )

    def slope(t, y):
        f, g2 = (float(v) for v in rates(t))
        return [f * y[0], 2 * f * y[1] + g2]

    mean, variance = propagate(slope, [alpha, sigma**2], member.low, member.high)
    np.testing.assert_allclose([mean, variance], [alpha_end, sigma_end**2], rtol=1e-6)


@pytest.mark.parametrize("member", SDES, ids=members.ids)
def test_reverse_sde_and_flow_have_the_marginals(member, x64):
    # Gaussian data: the drift is affine, so mean and variance obey two equations downwards in time.
    process, oracle = member.process, oracles.gaussian(1, jnp.float64)
    denoise = oracle.denoiser(process)
    m, d = float(oracle.mean[0]), float(oracle.std[0])

    @jax.jit
    def line(t):
        """(slope, intercept) of the reverse drift and of the flow's velocity, and g^2."""
        x = jnp.asarray([[0.0], [1.0]])
        prediction = denoise(x, t)
        drifts = jnp.stack(
            [
                calculus.reverse_drift(process, x, prediction, t),
                calculus.velocity(process, prediction, t),
            ]
        )[..., 0]
        return drifts[:, 1] - drifts[:, 0], drifts[:, 0], calculus.rates(process, t).g2

    def slope(t, y):
        (a, b), (c, e), g2 = (np.asarray(v) for v in line(t))
        # Reverse SDE: time runs down, so its noise adds variance downwards.
        return [a * y[0] + c, 2 * a * y[1] - g2, b * y[2] + e, 2 * b * y[3]]

    middle = member.low + 0.3 * (member.high - member.low)
    start, end = (
        np.asarray([alpha * m, alpha**2 * d**2 + sigma**2])
        for alpha, sigma in (numbers(process, t) for t in (member.high, middle))
    )
    found = propagate(slope, np.tile(start, 2), member.high, middle)
    np.testing.assert_allclose(found, np.tile(end, 2), rtol=1e-6)


@pytest.mark.parametrize("member", [m for m in members.PROCESSES if m.scalar], ids=members.ids)
def test_score_is_the_gradient_of_the_log_density(member, x64):
    process, oracle = member.process, oracles.mixture(2, jnp.float64)
    t = triple(member)[1]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2)))
    found = calculus.score(process, oracle.denoiser(process)(x, t), t)
    truth = jax.grad(lambda x: jnp.sum(oracle.log_prob(process, x, t)))(x)
    np.testing.assert_allclose(found, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("member", members.PROCESSES, ids=members.ids)
def test_velocity_is_tangent_to_the_exact_flow(member, x64):
    process, oracle = member.process, oracles.gaussian(members.D, jnp.float64)
    t = triple(member)[1]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, members.D)))
    tangent = jax.jvp(lambda s: oracle.flow(process, x, t, s), (t,), (jnp.ones_like(t),))[1]
    found = calculus.velocity(process, oracle.denoiser(process)(x, t), t)
    np.testing.assert_allclose(found, tangent, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("member", SDES, ids=members.ids)
def test_the_two_forms_of_the_flow_agree(member, x64):
    # f x - g^2 s/2 of the paper against alpha' x0 + sigma' eps of the code, for a consistent pair.
    process, t = member.process, triple(member)[1]
    x0, eps = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3)))
    prediction = Prediction(x0, eps)
    x = calculus.perturb(process, x0, t, eps)
    f, g2 = calculus.rates(process, t)
    paper = f * x - g2 / 2 * calculus.score(process, prediction, t)
    np.testing.assert_allclose(
        calculus.velocity(process, prediction, t), paper, rtol=1e-8, atol=1e-8
    )


def test_drift_is_f_x(x64):
    x, t = jnp.asarray([[1.0, -2.0]]), jnp.asarray(0.5)
    np.testing.assert_allclose(calculus.drift(VP(), x, t), -(0.1 + 0.5 * 19.9) / 2 * x, rtol=1e-12)
    assert (calculus.drift(VE(), x, t) == 0).all()


def test_flow_starts_where_its_rates_are_infinite():
    # At t = 1 of a straight flow g^2 is infinite and the velocity eps - x0 is not.
    one, x = jnp.asarray(1.0), jnp.ones((2, 3))
    assert np.isinf(calculus.rates(RectifiedFlow(), one).g2)
    velocity = calculus.velocity(RectifiedFlow(), Prediction(2 * x, 5 * x), one)
    np.testing.assert_array_equal(velocity, 3 * x)


class Anchored:
    """A process with an anchor: x_t = (1 - t) x0 + t y + t (1 - t) eps."""

    t_min, t_max = 0.0, 1.0

    def coeffs(self, t):
        return Coeffs(1 - t, t, t * (1 - t))


def test_perturb_uses_the_anchor():
    x0, y, eps = (jnp.full((2, 3), v) for v in (1.0, 10.0, 100.0))
    t = jnp.asarray([0.25, 0.5])
    expected = np.asarray([[0.75 + 2.5 + 18.75] * 3, [0.5 + 5.0 + 25.0] * 3])
    np.testing.assert_allclose(calculus.perturb(Anchored(), x0, t, eps, anchor=y), expected)
    without = calculus.perturb(Anchored(), x0, t, eps)
    np.testing.assert_allclose(without, expected - [[2.5] * 3, [5.0] * 3])


# n = 200,000 draws: the standard error of the mean is 2.2e-3 deviations and of the deviation
# 1.6e-3, so a prior 1% too wide (6 standard errors) or off by 1% of a deviation is rejected.
@pytest.mark.parametrize(
    ("process", "deviation"),
    [
        (VP(), 0.99997841),
        (SubVP(), 0.99995681),
        (VE(), 50.0),
        (EDM(), 80.0),
        (RectifiedFlow(), 1.0),
    ],
)
def test_prior_draws(process, deviation):
    n = 200_000
    x = np.asarray(calculus.prior(jax.random.key(0), process, (n // 4, 4)), np.float64)
    assert abs(x.mean()) < 4 * deviation / np.sqrt(n)
    assert abs(x.std() / deviation - 1) < 4 / np.sqrt(2 * n)
    assert scipy.stats.kstest(x.ravel()[:20_000] / deviation, "norm").pvalue > 1e-3


def test_prior_is_one_draw_a_sample():
    first = calculus.prior(jax.random.key(3), VP(), (7, 2))
    np.testing.assert_array_equal(calculus.prior(jax.random.key(3), VP(), (4, 2)), first[:4])
    assert calculus.prior(jax.random.key(3), VP(), (4, 2), dtype=jnp.float16).dtype == jnp.float16


@pytest.mark.parametrize("member", members.PROCESSES, ids=members.ids)
def test_prior_log_prob_is_scipys(member, x64):
    process = member.process
    sigma = np.broadcast_to(numbers(process, process.t_max)[1], (members.D,))
    x = np.random.default_rng(0).standard_normal((5, members.D)) * sigma * 1.3
    truth = scipy.stats.norm.logpdf(x, scale=sigma).sum(axis=1)
    np.testing.assert_allclose(calculus.prior_log_prob(process, jnp.asarray(x)), truth, rtol=1e-10)


def test_prior_log_prob_of_a_tree():
    x = {"a": jnp.ones((2, 3)), "b": jnp.full((2, 2, 2), 0.5)}
    flat = jnp.concatenate([x["a"], x["b"].reshape(2, -1)], axis=1)
    both = calculus.prior_log_prob(VE(), x), calculus.prior_log_prob(VE(), flat)
    np.testing.assert_allclose(*both, rtol=1e-6)
