"""Convergence order of the deterministic solvers, by regression on fine grids in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from diffjax.core.numerics import combine
from diffjax.processes import EDM, VP, Cosine, RectifiedFlow, SubVP, velocity
from diffjax.solvers import DDIM, Euler, Heun, Keep, ToEnd, XState, grids
from diffjax.testing import median_error, order_of_convergence
from tests.oracles import gaussian, mixture
from tests.solvers.helpers import SPANS, Mutant, padded, padded_solver, standard_normal

STEPS = (64, 128, 256, 512)
SOLVERS = {"euler": (Euler(), 1), "heun": (Heun(), 2), "ddim": (DDIM(), 1)}

pytestmark = pytest.mark.usefixtures("x64")


def heun_weights(first, second):
    """Heun's step with other weights: order 1 unless they are 1/2 and 1/2."""

    def change(solver, keys, denoise, process, state, t, s):
        h = s - t
        v = velocity(process, denoise(state.x, t), t)
        ahead = combine((1.0, state.x), (h, v))
        w = velocity(process, denoise(ahead, s), s)
        return XState(combine((1.0, state.x), (first * h, v), (second * h, w)))

    return change


def sigma_of_t(solver, keys, denoise, process, state, t, s):
    """DDIM with sigma_t in place of sigma_s: inconsistent, order 0."""
    prediction = denoise(state.x, t)
    alpha, sigma = process.coeffs(s).alpha, process.coeffs(t).sigma
    return XState(combine((alpha, prediction.x0), (sigma, prediction.eps)))


MUTANTS = {
    "ddim with sigma_t": (Mutant(DDIM(), sigma_of_t), 1),
    "heun with a third": (Mutant(Heun(), heun_weights(1 / 3, 2 / 3)), 2),
    "heun reversed": (Mutant(Heun(), heun_weights(0.52, 0.48)), 2),
    "euler's step doubled": (Mutant(Euler(), heun_weights(0.0, 1.01)), 1),
}


@functools.cache
def starts(name, dim):
    """Particles at the noisy end with the spread of the data and noise there."""
    span = SPANS[name]
    c = span.process.coeffs(jnp.asarray(span.high))
    z = standard_normal(1, (48, dim))
    return 0.5 * float(c.alpha) + float(jnp.sqrt(c.sigma**2 + 0.3 * c.alpha**2)) * z


def keep_order(name, solver, oracle, x, exact):
    """The fitted order from high to low times, with the last interval a step like the others."""
    span = SPANS[name]
    solve = padded_solver(solver, span.process, oracle.denoiser(span.process), Keep())
    errors = []
    for n in STEPS:
        times = grids.log_snr(span.process, n, t_max=span.high, end=span.low)
        errors.append(median_error(solve(x, padded(times, STEPS[-1]), n), exact))
    return order_of_convergence(STEPS, errors)


def check_gaussian(name, solver, order):
    span, oracle = SPANS[name], gaussian(3, jnp.float64)
    x = jnp.asarray(starts(name, 3))
    exact = oracle.flow(span.process, x, jnp.asarray(span.high), jnp.asarray(span.low))
    assert abs(keep_order(name, solver, oracle, x, exact) - order) < 0.2


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("case", SOLVERS)
def test_order_on_a_gaussian(case, name):
    """Truth: the closed form of the probability flow of a Gaussian."""
    check_gaussian(name, *SOLVERS[case])


@pytest.mark.parametrize("case", MUTANTS)
def test_order_finds_wrong_coefficients(case):
    """The same check fails for each mutant."""
    with pytest.raises(AssertionError):
        check_gaussian("vp", *MUTANTS[case])


# f and g^2 as the papers print them, for a velocity that shares no code with the solvers.
RATES = {
    "vp": lambda t: (-(0.1 + 19.9 * t) / 2, 0.1 + 19.9 * t),
    "edm": lambda t: (0.0, 2 * t),
    "ve": lambda t: (0.0, 2 * (0.01 * 5000**t) ** 2 * np.log(5000)),
    "flow": lambda t: (-1 / (1 - t), 2 * t / (1 - t)),
}


def reference_flow(name, oracle, x):
    """f x - g^2/2 grad ln p_t by DOP853 at 1e-12, the gradient by autodiff of the log-density."""
    span = SPANS[name]
    score = jax.jit(
        jax.grad(lambda x, t: jnp.sum(oracle.log_prob(span.process, x, t))),
    )

    def slope(t, flat):
        f, g2 = RATES[name](t)
        return f * flat - g2 / 2 * np.asarray(score(flat.reshape(x.shape), t)).reshape(-1)

    solved = solve_ivp(
        slope,
        (span.high, span.low),
        np.asarray(x).reshape(-1),
        method="DOP853",
        rtol=1e-11,
        atol=1e-12,
    )
    assert solved.success
    return solved.y[:, -1].reshape(x.shape)


@pytest.mark.parametrize("name", RATES)
def test_order_on_a_mixture(name):
    """Truth: scipy's eighth-order method on a velocity from the log-density."""
    oracle = mixture(2, jnp.float64)
    x = jnp.asarray(starts(name, 2))
    exact = reference_flow(name, oracle, x)
    for solver, order in SOLVERS.values():
        assert abs(keep_order(name, solver, oracle, x, exact) - order) < 0.2


# The last step is DDIM's, with an error of sigma(last)^2: on a grid where sigma ~ sqrt(t) near 0,
# sqrt(t) must be what is spaced evenly, or second order would be lost there.
TO_END = {
    "edm": (EDM(t_max=5.0), grids.uniform),
    "flow": (RectifiedFlow(t_max=0.95), grids.uniform),
    "sub_vp": (SubVP(), grids.uniform),
    "vp": (VP(), grids.quadratic),
    "cosine": (Cosine(t_max=0.95), grids.quadratic),
}


@pytest.mark.parametrize("case", SOLVERS)
@pytest.mark.parametrize("name", TO_END)
def test_order_to_the_end(name, case):
    """The last interval, onto sigma = 0, keeps the global order."""
    (process, grid), (solver, order) = TO_END[name], SOLVERS[case]
    oracle = gaussian(3, jnp.float64)
    top = jnp.asarray(process.t_max)
    x = jnp.asarray(standard_normal(2, (32, 3))) * process.coeffs(top).sigma
    exact = oracle.flow(process, x, top, jnp.asarray(0.0))
    solve = padded_solver(solver, process, oracle.denoiser(process), ToEnd())
    gaps = [median_error(solve(x, padded(grid(process, n), STEPS[-1]), n), exact) for n in STEPS]
    assert abs(order_of_convergence(STEPS, gaps) - order) < 0.2


# One step there and one back: of an order p method with leading error c h^(p+1), the two add up for
# odd p and cancel for even p, which leaves order p + 1.
@pytest.mark.parametrize("case, order", [("euler", 1), ("ddim", 1), ("heun", 3)])
@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_round_trip(name, case, order):
    """Encoding on an increasing grid and decoding on the same grid."""
    span, oracle, solver = SPANS[name], mixture(2, jnp.float64), SOLVERS[case][0]
    process, denoise = span.process, oracle.denoiser(span.process)
    x = jnp.asarray(0.7 * standard_normal(3, (48, 2)))
    solve = padded_solver(solver, process, denoise, Keep())
    gaps = []
    for n in STEPS[:3]:
        times = grids.log_snr(process, n, t_max=span.high, end=span.low)
        encoded = solve(x, padded(times[::-1], STEPS[2]), n)
        assert median_error(encoded, x) > 0.1  # it went somewhere
        gaps.append(median_error(solve(encoded, padded(times, STEPS[2]), n), x))
    assert abs(order_of_convergence(STEPS[:3], gaps) - order) < 0.2


def test_the_fit_itself():
    """An exact power law gives its exponent; an error of zero has no order."""
    assert order_of_convergence((4, 8, 32), [3.0 * n**-1.7 for n in (4, 8, 32)]) == pytest.approx(
        1.7
    )
    with pytest.raises(ValueError, match="positive and finite"):
        order_of_convergence((4, 8), [1.0, 0.0])
