"""MRS: the published steps in x with the anchor are the multistep family in centred coordinates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffjax.core.types import Prediction
from diffjax.prediction import centre, to_centred, uncentre
from diffjax.processes import MeanReverting, prior
from diffjax.solvers import EulerMaruyama, Keep, grids, mrs, sample
from diffjax.testing import given_noise
from tests.oracles import Mixture
from tests.solvers.helpers import standard_normal

KEY = jax.random.key(0)
PROCESS = MeanReverting()
TIMES = np.asarray([1.0, 0.8, 0.55, 0.4, 0.3])
Y, Z = standard_normal(1, (5, 3)), standard_normal(2, (5, 3))


def eps_of(x, t):
    """Any smooth noise prediction at (x, t)."""
    return np.sin(x) + x / 3 + t / 5


def numbers(t):
    c = PROCESS.coeffs(jnp.asarray(t))
    return float(c.alpha), float(c.sigma)


def published(x, order, prediction, sde):
    """Algorithms 1 to 4 of the paper: steps in x, with mu in every one of them."""
    before = None
    for t, s in zip(TIMES, TIMES[1:], strict=False):
        (a, b), (a_s, b_s) = numbers(t), numbers(s)
        h = np.log(a_s / b_s) - np.log(a / b)
        eps = eps_of(x, t)
        now = eps if prediction == "eps" else (x - (1 - a) * Y - b * eps) / a
        # The derivative with respect to the log-SNR, by a difference over the step before.
        slope = 0.0 if before is None or order == 1 else (now - before[0]) / before[1]
        x = _published_step(x, now, slope, h, (a, b), (a_s, b_s), prediction, sde)
        before = now, h
    return x


def _published_step(x, now, slope, h, at, to, prediction, sde):
    (a, b), (a_s, b_s) = at, to
    if prediction == "eps":
        twice = 2 if sde else 1
        mean = a_s / a * x + (1 - a_s / a) * Y
        mean = mean - twice * b_s * ((np.exp(h) - 1) * now + (np.exp(h) - 1 - h) * slope)
        return mean + (b_s * np.sqrt(np.exp(2 * h) - 1) * Z if sde else 0)
    if sde:
        fade = 1 - np.exp(-2 * h)
        mean = b_s / b * np.exp(-h) * x
        mean = mean + Y * (1 - a_s / a * np.exp(-2 * h) - a_s * fade)
        mean = mean + a_s * (fade * now + (h - fade / 2) * slope)
        return mean + b_s * np.sqrt(fade) * Z
    mean = b_s / b * x + Y * (1 - b_s / b + b_s / b * a - a_s)
    return mean + a_s * ((1 - np.exp(-h)) * now + (h - 1 + np.exp(-h)) * slope)


@pytest.mark.parametrize("sde", [False, True], ids=["ode", "sde"])
@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("order", [1, 2])
def test_it_is_the_published_sampler(order, prediction, sde, x64):
    x, y = standard_normal(0, (5, 3)), jnp.asarray(Y)

    def denoise(x, t):
        c = PROCESS.coeffs(t)
        eps = jnp.sin(x) + x / 3 + t / 5
        return Prediction((x - c.beta * y - c.sigma * eps) / c.alpha, eps)

    times = jnp.asarray(TIMES)
    with given_noise(lambda name, like: jnp.asarray(Z)):
        u = sample(
            KEY,
            centre(denoise, PROCESS, y),
            to_centred(jnp.asarray(x), PROCESS, y, times[0]),
            times,
            solver=mrs(order, prediction, sde),
            process=PROCESS,
            final=Keep(),
        ).x
    found = uncentre(u, PROCESS, y, times[-1])
    np.testing.assert_allclose(found, published(x, order, prediction, sde), rtol=1e-9, atol=1e-11)


SEEDS, COUNT = 20, 1000
MEANS, STD, WEIGHTS = (0.25, 0.55, 0.8), 0.04, (0.5, 0.3, 0.2)


@functools.cache
def exact_quantiles():
    """Those of the posterior, a mixture in one dimension, at COUNT levels."""
    grid = np.linspace(-0.5, 1.5, 200_001)
    parts = zip(WEIGHTS, MEANS, strict=True)
    rise = sum(w * scipy.stats.norm.cdf(grid, m, STD) for w, m in parts)
    return np.interp((np.arange(COUNT) + 0.5) / COUNT, rise, grid)


def distance(solver, n, grid=grids.uniform):
    """Wasserstein's between COUNT restorations and the exact posterior, the mean over SEEDS."""
    posterior = Mixture(jnp.asarray(MEANS)[:, None], jnp.asarray(STD), jnp.asarray(WEIGHTS))
    y = jnp.full((SEEDS * COUNT, 1), 0.45)

    def denoise(x, t):
        c = PROCESS.coeffs(t)
        return posterior.predict(c.alpha, c.sigma, x - c.beta * y)

    @jax.jit
    def restore(key):
        start = prior(key, PROCESS, y.shape)
        times = grid(PROCESS, n, end=0.0)
        key = jax.random.fold_in(key, 1)
        denoiser = centre(denoise, PROCESS, y)
        u = sample(key, denoiser, start, times, solver=solver, process=PROCESS).x
        return uncentre(u, PROCESS, y, times[-1])

    ends = np.sort(np.asarray(restore(jax.random.key(7))).reshape(SEEDS, COUNT), axis=1)
    return np.abs(ends - exact_quantiles()[None]).mean()


@pytest.mark.slow
def test_twenty_calls_restore_as_well_as_two_hundred():
    """Order 2, 20 calls, against Euler-Maruyama with 200: the distance from the exact posterior.

    The margin: 10 %, for 20 seeds of 1,000 restorations, as many as a test set has. Their sampling
    error is then most of either's distance; without it, Euler-Maruyama's 200 steps stay ahead. The
    case can tell: DDIM's 20 calls fail.
    """
    wanted = distance(EulerMaruyama(), 200)
    assert distance(mrs(2), 20, grids.quadratic) < 1.1 * wanted
    assert distance(mrs(1), 20, grids.quadratic) > 1.3 * wanted


def test_other_orders_raise():
    with pytest.raises(ValueError, match="order must be one of 1, 2; got 3"):
        mrs(3)
