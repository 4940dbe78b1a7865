"""gDDIM: its SDE's own transition, DDIM at both ends, and independence of the number of steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from diffjax.processes import VE, VP, RectifiedFlow, SubVP
from diffjax.solvers import DDIM, GDDIM, grids, sample
from diffjax.testing import given_noise, order_of_convergence, propagate_moments
from tests.oracles import PointMass, gaussian
from tests.solvers.helpers import SPANS, Mutant, noise_scaled_by, padded

pytestmark = pytest.mark.usefixtures("x64")

# f and g^2 as the Score-SDE paper prints them.
BETA = lambda t: 0.1 + 19.9 * t  # noqa: E731
MASS = lambda t: 0.1 * t + 9.95 * t**2  # noqa: E731
RATES = {
    "vp": (VP(), lambda t: (-BETA(t) / 2, BETA(t))),
    "sub_vp": (SubVP(), lambda t: (-BETA(t) / 2, BETA(t) * (1 - np.exp(-2 * MASS(t))))),
    "ve": (VE(), lambda t: (0.0, 2 * (0.01 * 5000**t) ** 2 * np.log(5000))),
}


def response(solver, process, t, s):
    """(gain on x_t, gain on z) of one step where x0 = 0 is known, so that eps = x/sigma."""
    denoise = PointMass(jnp.zeros(1)).denoiser(process)
    with given_noise(lambda name, like: jnp.asarray([[0.0], [1.0]])):
        state = solver.init(process, jnp.asarray([[1.0], [0.0]]), jnp.asarray(t))
        x = solver.step(None, denoise, process, state, jnp.asarray(t), jnp.asarray(s)).x
    return float(x[0, 0]), float(x[1, 0])


@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize("name", RATES)
def test_transition_of_its_sde(name, noise):
    """Psi^ and the variance by SciPy's quadrature of the paper's f and g^2, with x0 known."""
    process, rates = RATES[name]
    t, s = 0.7, 0.4

    def rate(u):
        f, g2 = rates(u)
        return f + (1 + noise**2) / 2 * g2 / float(process.coeffs(jnp.asarray(u)).sigma) ** 2

    def psi(end, start):
        return np.exp(quad(rate, start, end, epsabs=0, epsrel=1e-11)[0])

    variance = quad(lambda u: noise**2 * rates(u)[1] * psi(s, u) ** 2, s, t, epsrel=1e-9)[0]
    kept, added = response(GDDIM(noise), process, t, s)
    np.testing.assert_allclose(kept, psi(s, t), rtol=1e-6)  # VP's floor at t = 0 is not printed
    np.testing.assert_allclose(added**2, variance, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve"])
def test_half_steps_are_the_step(name):
    """For data at one point the law of (x_t, x_s) is the same in one step and two; not DDIM's."""
    process = RATES[name][0]

    def two_against_one(solver):
        first, second = response(solver, process, 0.7, 0.5), response(solver, process, 0.5, 0.4)
        once = response(solver, process, 0.7, 0.4)
        return first[0] * second[0] / once[0] - 1, np.hypot(first[1] * second[0], second[1]) / once[
            1
        ] - 1

    np.testing.assert_allclose(two_against_one(GDDIM(0.6)), 0, atol=1e-12)
    assert np.abs(two_against_one(DDIM(eta=0.6))).max() > 0.01


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_ddim_at_both_ends(noise):
    """L = 0 and 1 are eta = 0 and 1, also from alpha = 0."""
    for process in (SubVP(), RectifiedFlow()):
        denoise, times = gaussian(2, jnp.float64).denoiser(process), grids.uniform(process, 5)
        x = jax.random.normal(jax.random.key(0), (3, 2))
        z = jax.random.normal(jax.random.key(1), (3, 2))
        with given_noise(lambda name, like, z=z: z):
            ends = [
                sample(jax.random.key(0), denoise, x, times, solver=solver, process=process).x
                for solver in (GDDIM(noise), DDIM(eta=noise))
            ]
        np.testing.assert_allclose(*ends, rtol=1e-10, atol=1e-12)


STEPS = (64, 128, 256)


def covariance_order(solver, name):
    span, oracle = SPANS[name], gaussian(2, jnp.float64)
    process = span.process

    def law(t):
        c = process.coeffs(jnp.asarray(t))
        return c.alpha * oracle.mean, jnp.diag(c.alpha**2 * oracle.std**2 + c.sigma**2)

    run = jax.jit(functools.partial(propagate_moments, solver, oracle.denoiser(process), process))
    errors = []
    for n in STEPS:
        times = padded(grids.log_snr(process, n, t_max=span.high, end=span.low), STEPS[-1])
        errors.append(float(jnp.linalg.norm(run(times, *law(span.high))[1] - law(span.low)[1])))
    return order_of_convergence(STEPS, errors)


@pytest.mark.parametrize(
    "noise, name",
    [
        (0.5, "sub_vp"),
        pytest.param(1.6, "vp", marks=pytest.mark.slow),
        pytest.param(0.5, "flow", marks=pytest.mark.slow),
    ],
)
def test_weak_order(noise, name):
    assert abs(covariance_order(GDDIM(noise), name) - 1) < 0.2


def test_weak_order_finds_mutants():
    """Noise 3% off."""
    assert covariance_order(Mutant(GDDIM(0.5), noise_scaled_by(1.03)), "sub_vp") < 0.5


def test_gradient_with_respect_to_the_noise():
    """By differences, also at 0, where a root of the added variance has no derivative."""
    process = VP()
    denoise, times = gaussian(2, jnp.float64).denoiser(process), grids.uniform(process, 3)
    x = jax.random.normal(jax.random.key(0), (3, 2))

    @jax.jit
    def total(noise):
        return sample(
            jax.random.key(0), denoise, x, times, solver=GDDIM(noise), process=process
        ).x.sum()

    for at in (0.0, 0.5):
        step = 1e-6
        slope = (
            (total(at + step) - total(at - step)) / (2 * step)
            if at
            else (total(step) - total(0.0)) / step
        )
        np.testing.assert_allclose(jax.jit(jax.grad(total))(at), slope, rtol=1e-4)


def test_bad_field():
    with pytest.raises(ValueError, match="noise must not be negative; got -1.0"):
        GDDIM(-1.0)
