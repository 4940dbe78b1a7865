"""Weak order of the stochastic solvers on a Gaussian, without sampling noise.

On Gaussian data a step is affine in x and in its noise, so mean and covariance are propagated
exactly (`diffjax.testing.propagate_moments`) and compared with those of p_t at the end.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import random
from diffjax.processes import EDM, VP
from diffjax.solvers import (
    DDIM,
    Ancestral,
    EDMChurn,
    Euler,
    EulerMaruyama,
    Heun,
    Keep,
    ReverseDiffusion,
    XState,
    grids,
    sample,
)
from diffjax.testing import given_noise, order_of_convergence, propagate_moments
from tests.oracles import gaussian
from tests.solvers.helpers import SPANS, Mutant, noise_scaled_by, padded, times_swapped

pytestmark = pytest.mark.usefixtures("x64")

STEPS = (128, 256, 512, 1024)
SOLVERS = {
    "euler_maruyama": EulerMaruyama(),
    "reverse_diffusion": ReverseDiffusion(),
    "ancestral_small": Ancestral("small"),
    "ancestral_large": Ancestral("large"),
    "ddim_eta_1": DDIM(eta=1.0),
}
ORACLE = ((-0.5, 0.7), (0.3, 0.8))


def marginal(oracle, process, t):
    """Mean and covariance of p_t for Gaussian data, from the forward law."""
    c = process.coeffs(jnp.asarray(t))
    return c.alpha * oracle.mean, jnp.diag(c.alpha**2 * oracle.std**2 + c.sigma**2)


def moment_errors(solver, span, grid=grids.log_snr):
    """|mean - exact| and |covariance - exact| at the low time, one row for each of STEPS."""
    process, oracle = span.process, gaussian(2, jnp.float64)
    denoise, start = oracle.denoiser(process), marginal(oracle, process, span.high)
    exact = marginal(oracle, process, span.low)
    run = jax.jit(lambda times: propagate_moments(solver, denoise, process, times, *start))
    rows = []
    for n in STEPS:
        mean, covariance = run(padded(grid(process, n, t_max=span.high, end=span.low), STEPS[-1]))
        rows.append((jnp.linalg.norm(mean - exact[0]), jnp.linalg.norm(covariance - exact[1])))
    return np.asarray(rows)


def check_weak_order(solver, span, order=1):
    errors = moment_errors(solver, span)
    for kind in range(2):
        if errors[:, kind].max() > 1e-12:  # some means are exact for every n
            assert abs(order_of_convergence(STEPS, errors[:, kind]) - order) < 0.2


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("case", SOLVERS)
def test_weak_order(case, name):
    """Mean and covariance converge at order 1."""
    check_weak_order(SOLVERS[case], SPANS[name])


@pytest.mark.parametrize("change", [noise_scaled_by(1.03), noise_scaled_by(0.0), times_swapped])
@pytest.mark.parametrize("case", ["euler_maruyama", "reverse_diffusion", "ddim_eta_1"])
def test_weak_order_finds_mutants(case, change):
    """Noise 3% off, missing noise, t and s swapped: the same check fails."""
    with pytest.raises((AssertionError, ValueError)):
        check_weak_order(Mutant(SOLVERS[case], change), SPANS["vp"])


def test_propagation_agrees_with_samples(key):
    """`propagate_moments` against 40,000 runs of the driver: within 4 standard errors.

    It would reject a mean off by 0.01 and a variance off by 2%.
    """
    span, oracle, n = SPANS["vp"], gaussian(2, jnp.float64), 40_000
    process = span.process
    denoise = oracle.denoiser(process)
    times = grids.log_snr(process, 5, t_max=span.high, end=span.low)
    start = marginal(oracle, process, span.high)
    mean, covariance = propagate_moments(
        ReverseDiffusion(), denoise, process, times, start[0], start[1]
    )
    z = jax.random.normal(key, (n, 2), jnp.float64)
    x = start[0][None] + z * jnp.sqrt(jnp.diag(start[1]))[None]
    end = sample(key, denoise, x, times, solver=ReverseDiffusion(), process=process, final=Keep()).x
    variance = jnp.diag(covariance)
    assert jnp.all(jnp.abs(end.mean(0) - mean) < 4 * jnp.sqrt(variance / n))
    assert jnp.all(jnp.abs(end.var(0) / variance - 1) < 4 * np.sqrt(2 / n))


def churned_variance(churn, process, t, variance):
    """Variance after the churn alone, from unit responses, and the time it raised to."""
    seen = {}

    class Stay:
        stages = final_stages = 1
        stochastic = False

        def init(self, process, x, t):
            raise AssertionError

        def step(self, keys, denoise, process, state, t, s):
            seen["t"] = t
            return state

    wrapped = EDMChurn(Stay(), churn.s_churn, churn.n_steps, s_noise=churn.s_noise)
    keys = random.sample_keys(jax.random.key(0), 2)
    with given_noise(lambda name, like: jnp.asarray([[0.0], [1.0]])):
        x = jnp.asarray([[1.0], [0.0]])
        state = wrapped.step(keys, None, process, XState(x), jnp.asarray(t), jnp.asarray(t / 2))
    gain, spread = state.x[0, 0], state.x[1, 0]
    return gain**2 * variance + spread**2, seen["t"]


@pytest.mark.parametrize("name", SPANS)
def test_churn_raises_the_level_exactly(name):
    """sigma/alpha grows by 1 + gamma, and x has exactly the variance of p at the raised time."""
    process, low, _ = SPANS[name]
    churn = EDMChurn(Euler(), s_churn=3.0, n_steps=10)
    at = lambda t: process.coeffs(jnp.asarray(t))  # noqa: E731
    deviation = 0.6
    before = at(low).alpha ** 2 * deviation**2 + at(low).sigma ** 2
    after, raised = churned_variance(churn, process, low, before)
    ratio = (at(raised).sigma / at(raised).alpha) / (at(low).sigma / at(low).alpha)
    np.testing.assert_allclose(ratio, 1.3, rtol=1e-10)
    exact = at(raised).alpha ** 2 * deviation**2 + at(raised).sigma ** 2
    np.testing.assert_allclose(after, exact, rtol=1e-10)
    # The mutant: noise 3% too strong.
    wrong, _ = churned_variance(EDMChurn(Euler(), 3.0, 10, s_noise=1.03), process, low, before)
    assert abs(wrong / exact - 1) > 1e-3


@pytest.mark.parametrize("process", [VP(), EDM()], ids=["vp", "edm"])
def test_churn_is_capped_and_bounded(process):
    """gamma is at most sqrt(2) - 1, and 0 outside [s_min, s_max]."""
    t = jnp.asarray(process.t_max / 4)
    level = float(process.coeffs(t).sigma / process.coeffs(t).alpha)
    _, raised = churned_variance(EDMChurn(Euler(), 1e3, 10), process, t, 1.0)
    c = process.coeffs(raised)
    np.testing.assert_allclose(c.sigma / c.alpha / level, np.sqrt(2), rtol=1e-10)
    keys = random.sample_keys(jax.random.key(0), 4)
    x = jnp.ones((4, 2))
    oracle = gaussian(2, jnp.float64).denoiser(process)
    inner = Heun()
    plain = inner.step(keys, oracle, process, inner.init(process, x, t), t, t / 2).x
    for bounds in ({"s_min": 1.01 * level}, {"s_max": 0.99 * level}):
        solver = EDMChurn(inner, 5.0, 10, **bounds)
        state = solver.init(process, x, t)
        np.testing.assert_array_equal(solver.step(keys, oracle, process, state, t, t / 2).x, plain)
    solver = EDMChurn(inner, 5.0, 10, s_min=0.99 * level, s_max=1.01 * level)
    state = solver.init(process, x, t)
    assert jnp.abs(solver.step(keys, oracle, process, state, t, t / 2).x - plain).max() > 0.01


def test_churned_heun_keeps_second_order():
    """A fixed churn a step: x stays distributed as p_t up to Heun's own error, of order 2.

    gamma = s_churn/n with s_churn fixed, so the added noise in all does not depend on n.
    """
    for name in ("edm", "vp"):
        span = SPANS[name]
        process, oracle = span.process, gaussian(2, jnp.float64)
        denoise, start = oracle.denoiser(process), marginal(oracle, process, span.high)
        exact = marginal(oracle, process, span.low)
        steps, errors = (64, 128, 256), []
        for n in steps:
            solver = EDMChurn(Heun(), s_churn=2.0, n_steps=n)
            times = grids.log_snr(process, n, t_max=span.high, end=span.low)
            _, covariance = jax.jit(propagate_moments)(solver, denoise, process, times, *start)
            errors.append(jnp.linalg.norm(covariance - exact[1]))
        assert abs(order_of_convergence(steps, errors) - 2) < 0.2


@pytest.mark.parametrize("inner", [Euler(), Heun(), DDIM()], ids=["euler", "heun", "ddim"])
def test_no_churn_is_the_inner_solver(inner):
    """At s_churn = 0 the draw is made and changes nothing."""
    process, oracle = VP(), gaussian(2, jnp.float64)
    denoise, times = oracle.denoiser(process), grids.quadratic(process, 6)
    x = jax.random.normal(jax.random.key(1), (5, 2), jnp.float64)
    run = jax.jit(
        lambda solver: (
            sample(jax.random.key(0), denoise, x, times, solver=solver, process=process).x
        )
    )
    np.testing.assert_allclose(run(EDMChurn(inner, 0.0, 6)), run(inner), rtol=1e-12, atol=1e-12)
