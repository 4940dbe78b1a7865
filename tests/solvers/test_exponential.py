"""Coefficients of the exponential integrators, against scipy's quadrature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from diffjax.core.types import Prediction
from diffjax.processes import VP, RectifiedFlow
from diffjax.solvers import Keep, Multistep, ToEnd, UniPC, exponential, sample
from diffjax.solvers.multistep import History
from diffjax.testing.case import PLAIN
from tests.oracles import gaussian

ZS = (-30.0, -3.0, -1.0, -0.999, -1e-2, -1e-5, 0.0, 1e-7, 1e-3, 0.5, 0.9999, 1.0, 2.5, 40.0, 1e4)


def moment(z, i):
    """M_i by adaptive quadrature, of the exponential's own variable where it is steep."""
    if abs(z) > 50:
        return quad(lambda u: np.exp(-u) * (1 - u / z) ** i, 0, 60, epsabs=1e-14)[0]
    return quad(lambda tau: z * np.exp(-z * (1 - tau)) * tau**i, 0, 1, epsrel=1e-13, epsabs=0)[0]


def check_moments(dtype, rtol):
    found = jax.jit(lambda z: exponential.moments(z, 4))(jnp.asarray(ZS, dtype))
    exact = np.array([[moment(float(dtype(z)), i) for z in ZS] for i in range(1, 5)])
    np.testing.assert_allclose(found, exact, rtol=rtol, atol=0)


def test_moments(x64):
    check_moments(np.float64, 1e-12)


def test_moments_in_single_precision():
    check_moments(np.float32, 5e-6)


SPANS = {"vp": (VP(), 0.9, 0.15), "flow": (RectifiedFlow(), 0.9, 0.15)}
CASES = [(kind, variable) for kind in ("x0", "eps") for variable in ("lambda", "rho", "t", "step")]


def of_time(process, kind, variable, t):
    """The variable at a time, with NumPy alone but for alpha and sigma."""
    c = process.coeffs(jnp.asarray(t))
    rho = np.asarray(c.sigma / c.alpha)
    return {"lambda": -np.log(rho), "rho": rho if kind == "eps" else 1 / rho, "t": t}[variable]


def measure(process, kind, t):
    """What x0 and eps are integrated against: alpha/sigma, or sigma/alpha."""
    c = process.coeffs(t)
    return c.alpha / c.sigma if kind == "x0" else c.sigma / c.alpha


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("kind, variable", [case for case in CASES if case[1] != "step"])
def test_exact_for_polynomials(kind, variable, name, x64):
    """A prediction that is a cubic of the variable, whatever x, is integrated exactly at order 4.

    Truth: x_s/sigma_s - x_t/sigma_t = int x0 d(alpha/sigma), and its like for eps, by scipy.
    """
    process, high, low = SPANS[name]
    at = functools.partial(of_time, process, kind, variable)
    middle, width = (at(high) + at(low)) / 2, at(high) - at(low)

    def cubic(u):
        v = (u - middle) / width
        return 0.3 - 1.1 * v + 2.0 * v**2 + 1.7 * v**3

    def m(t):
        return jnp.asarray([[cubic(at(t))]])

    times = np.array([0.9, 0.7, 0.62, 0.41, 0.15])  # uneven; the last interval is the test's
    t, s = times[3], times[4]
    x = jnp.asarray([[0.4]])
    c = process.coeffs(jnp.asarray(t))
    other = (x - (c.alpha if kind == "x0" else c.sigma) * m(t)) / (
        c.sigma if kind == "x0" else c.alpha
    )
    made = Prediction(m(t), other) if kind == "x0" else Prediction(other, m(t))
    past = tuple(m(u) for u in times[2::-1])
    state = History(x, past, jnp.asarray(times[2::-1]), jnp.zeros((3,)), jnp.asarray(3))
    solver = Multistep(4, kind, variable)
    found = solver.step(None, lambda *_: made, process, state, jnp.asarray(t), jnp.asarray(s)).x

    slope = jax.jit(jax.grad(lambda u: measure(process, kind, u)))
    gained = quad(lambda u: cubic(at(u)) * float(slope(u)), t, s, epsabs=1e-12)[0]
    end = process.coeffs(jnp.asarray(s))
    base = (c.sigma, end.sigma) if kind == "x0" else (c.alpha, end.alpha)
    exact = base[1] * (x / base[0] + gained)
    np.testing.assert_allclose(found, exact, rtol=1e-9)
    # One order less is not exact.
    fewer = Multistep(3, kind, variable)
    state = state._replace(past=past[:2], times=state.times[:2], applied=state.applied[:2])
    found = fewer.step(None, lambda *_: made, process, state, jnp.asarray(t), jnp.asarray(s)).x
    assert np.abs(found - exact).max() > 1e-5


def test_fixed_weights_are_adams_and_bashforth(x64):
    """The variable "step" gives 55, -59, 37, -9 over 24 and the lower orders before."""
    process, t, s = VP(), jnp.asarray(0.6), jnp.asarray(0.5)
    moved = exponential.move(process, "eps", t, s)
    totals = exponential.integrals(process, "eps", "step", moved, t, s, 3)
    for order, row in {2: (-1 / 2, 0, 0), 3: (-16 / 12, 5 / 12, 0), 4: (-59, 37, -9)}.items():
        valid = jnp.arange(1, 4) < order
        places = exponential.places(
            process, "eps", "step", moved, t, s, jnp.asarray([0.7, 0.8, 0.9]), valid
        )
        found = exponential.weights(places, valid, moved, totals) / moved.pull
        exact = np.array(row) / (24 if order == 4 else 1)
        np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["x0", "eps"])
def test_noise_is_the_exact_law_for_one_point(kind, eta, x64):
    """For data at one point x_t ~ N(alpha m, sigma^2) stays so under the x0 form for every eta.

    The eps form keeps it to first order in h only: there its formula is compared as h -> 0.
    """
    process, t = VP(), jnp.asarray(0.5)
    for s, rtol in ((0.3, 1e-12), (0.4999, 1e-12)):
        moved = exponential.move(process, kind, t, jnp.asarray(s), eta)
        # x = alpha m + sigma e: kept * e + noise * z must have variance sigma_s^2.
        variance = moved.kept**2 + moved.noise**2
        if kind == "x0":
            np.testing.assert_allclose(variance, moved.reached.sigma**2, rtol=rtol)
        elif s > 0.49:
            np.testing.assert_allclose(variance, moved.reached.sigma**2, rtol=1e-5)


def test_from_and_to_where_alpha_is_zero(x64):
    """A flow from t = 1, and up to it (an inversion), against the closed form for Gaussian data.

    DDIM is off by 0.006 and 0.08.
    """
    process, oracle = RectifiedFlow(), gaussian(2, jnp.float64)
    x, solve = jnp.asarray([[0.4, -0.3], [1.0, 0.2]]), jax.jit(sample)
    for solver in (UniPC(2), UniPC(2, "B1"), Multistep(2, "eps", "t")):
        for t, s in ((1.0, 0.2), (0.2, 1.0)):
            given = {"solver": solver, "process": process, "final": Keep()}
            times = jnp.linspace(t, s, 33)
            found = solve(jax.random.key(0), oracle.denoiser(process), x, times, **given).x
            exact = oracle.flow(process, x, times[0], times[-1])
            np.testing.assert_allclose(found, exact, atol=3e-3)


@pytest.mark.parametrize("variable", ["rho", pytest.param("lambda", marks=pytest.mark.slow)])
def test_a_step_onto_the_data_is_the_last_one(variable, x64):
    """Alpha/sigma has no value at sigma = 0, so that the step there is linear: `finish`."""
    process, x = VP(), jnp.asarray([[0.4, -0.3], [1.0, 0.2]])
    denoise, times = gaussian(2, jnp.float64).denoiser(process), jnp.linspace(0.9, 0.0, 6)
    given = {"solver": Multistep(2, "x0", variable), "process": process}
    ends = [
        jax.jit(sample)(jax.random.key(0), denoise, x, times, final=final, **given).x
        for final in (Keep(), ToEnd())
    ]
    np.testing.assert_allclose(*ends, rtol=1e-12)


def test_from_where_nothing_is_left_of_the_data():
    """Alpha = 0 at t = 1 of a flow: the first step is exact for one point, and gradients finite."""
    process, mean = RectifiedFlow(), 0.7

    def denoise(x, t):
        return Prediction(jnp.full_like(x, mean), (x - (1 - t) * mean) / t)

    x = jnp.asarray([[1.3], [-0.4]])
    times = jnp.asarray([1.0, 0.6, 0.3, 0.1, 0.0])
    for solver in (Multistep(3, "eps"), Multistep(2, "x0", slope="b2", corrector=2)):

        def solve(x, times, solver=solver):
            """What is left one step before the end, which has the noise, and at the end."""
            key = jax.random.key(0)
            result = sample(
                key,
                denoise,
                x,
                times,
                solver=solver,
                process=process,
                save=lambda state: state.x,
            )
            return jnp.sum(result.saved**2), result.saved

        if not solver.corrector:  # its gradient is longer to compile, and says nothing new
            _, saved = jax.jit(solve)(x, times)
            grads = ()
        else:
            both = jax.value_and_grad(solve, (0, 1), has_aux=True)
            run = jax.jit(both, compiler_options=PLAIN)
            (_, saved), grads = run(x, times)
        np.testing.assert_allclose(saved[-2], 0.9 * mean + 0.1 * x, rtol=1e-5)
        np.testing.assert_allclose(saved[-1], jnp.full_like(x, mean), rtol=1e-6)
        assert all(np.isfinite(g).all() for g in grads)
