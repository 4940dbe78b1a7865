"""SEEDS and stochastic Heun: weak orders by exact moments, and by quadrature on a mixture.

For Gaussian data a step is affine in x and in its noise, so mean and covariance are propagated
exactly. For a mixture in one dimension E f(x_s | x_t) is computed on a table, backwards from f, by
Gauss-Hermite quadrature over the step's draws: no sampling noise either.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import hermite_e
from scipy.integrate import quad
from scipy.interpolate import make_interp_spline

from diffjax.processes import VP, RectifiedFlow
from diffjax.solvers import Ancestral, NoiselessPredictor, ToEnd, XState, grids, sample
from diffjax.solvers.seeds import SEEDS, SEEDS2, SEEDS3, StochasticHeun, centroid, hold
from diffjax.testing import given_noise, order_of_convergence, propagate_moments
from diffjax.testing.case import PLAIN
from tests.oracles import PointMass, gaussian, mixture
from tests.solvers.helpers import (
    SPANS,
    Counter,
    Mutant,
    noise_scaled_by,
    padded,
    scaled_noise,
)

STEPS = (64, 128, 256)


# --- the weights -----------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_centroid_against_quadrature():
    """phi by SciPy, on both sides of where the series ends."""
    for h in (-30.0, -3.0, -0.6, -0.4999, -0.1, -1e-6, 0.0, 1e-3, 0.3, 0.4999, 0.5001, 2.0, 25.0):
        top = max(h, 0.0)
        grow = lambda v, h=h, top=top: np.exp(h * v - top)  # noqa: E731
        mass, first = quad(grow, 0, 1, epsabs=0)[0], quad(lambda v, g=grow: v * g(v), 0, 1)[0]
        np.testing.assert_allclose(centroid(jnp.asarray(h)), first / mass, rtol=1e-10)
        slope = jax.grad(centroid)(h)
        assert np.isfinite(slope) and 0 < slope < 0.09


# --- Gaussian data: exact moments ------------------------------------------------------------


def marginal(oracle, process, t):
    """Mean and covariance of p_t for Gaussian data, from the forward law."""
    c = process.coeffs(jnp.asarray(t))
    return c.alpha * oracle.mean, jnp.diag(c.alpha**2 * oracle.std**2 + c.sigma**2)


def moment_orders(solver, name):
    """Orders of the mean and of the covariance at the low time; None where exact.

    The mean starts d away from p_t's, where it obeys d' = (f + g^2/V) d, V = alpha^2 std^2 +
    sigma^2: so d_s = d_t (V_s/V_t) (alpha_t/alpha_s).
    """
    span, oracle = SPANS[name], gaussian(2, jnp.float64)
    process = span.process
    denoise, start = oracle.denoiser(process), marginal(oracle, process, span.high)
    exact = marginal(oracle, process, span.low)
    off = 0.5 * jnp.sqrt(jnp.diag(start[1]))
    alphas = [process.coeffs(jnp.asarray(t)).alpha for t in (span.high, span.low)]
    kept = jnp.diag(exact[1]) / jnp.diag(start[1]) * alphas[0] / alphas[1]
    start, exact = (start[0] + off, start[1]), (exact[0] + kept * off, exact[1])
    run = jax.jit(
        lambda times: propagate_moments(solver, denoise, process, times, *start),
        compiler_options=PLAIN,
    )
    ends = [
        run(padded(grids.log_snr(process, n, t_max=span.high, end=span.low), STEPS[-1]))
        for n in STEPS
    ]
    orders = []
    for k in range(2):
        errors = [float(jnp.linalg.norm(end[k] - exact[k])) for end in ends]
        orders.append(None if max(errors) < 1e-12 else order_of_convergence(STEPS, errors))
    return orders


QUICK = ["heun_eps-ve", "seeds2_x0-vp", "seeds3_eps-cosine"]
# solver, process, order of the mean, order of the covariance. E[x0 | x_t] is a martingale of the
# reverse SDE, so that a rule in x0 has the mean exactly (None).
ORDERS = {
    "heun_eps-ve": (StochasticHeun("eps"), "ve", 2, 2),
    "seeds2_x0-vp": (SEEDS2("x0"), "vp", None, 2),
    "seeds2_eps-ve": (SEEDS2("eps"), "ve", 2, 2),
    "seeds2_exact-flow": (SEEDS(2, "x0", "exact", 0.7), "flow", None, 2),
    "seeds3_x0-flow": (SEEDS3("x0"), "flow", None, 2),
    "seeds3_eps-cosine": (SEEDS3("eps"), "cosine", 3, 2),
    "seeds1_eps-vp": (SEEDS(1, "eps"), "vp", 1, 1),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in ORDERS]
)
def test_weak_order(case):
    """Mean and covariance of the marginals converge at the declared order."""
    solver, name, *expected = ORDERS[case]
    for measured, order in zip(moment_orders(solver, name), expected, strict=True):
        assert (measured is None) == (order is None)
        assert order is None or abs(measured - order) < 0.2


def fresh_noise(self, process, times):
    """The mutation: right variances at every stage, and stages independent of each other."""
    return jnp.diag(
        jnp.stack([hold(process, times[0], s, self.prediction).spread for s in times[1:]])
    )


@pytest.mark.usefixtures("x64")
def test_weak_order_finds_mutants():
    """Noise 3% off: no order. Noise that is not one path: order 1."""
    assert moment_orders(Mutant(SEEDS2("x0"), noise_scaled_by(1.03)), "vp")[1] < 0.5
    with mock.patch.object(SEEDS, "_gains", fresh_noise):
        assert moment_orders(SEEDS3("eps"), "vp")[1] < 1.3


@pytest.mark.usefixtures("x64")
def test_one_stage_is_the_ancestral_step():
    """Exponential Euler with x0 is DDPM's step, written otherwise."""
    span, oracle = SPANS["vp"], gaussian(2, jnp.float64)
    process = span.process
    denoise, start = oracle.denoiser(process), marginal(oracle, process, span.high)
    times = grids.quadratic(process, 6, t_max=span.high, end=span.low)
    ours, peer = (
        propagate_moments(solver, denoise, process, times, *start)
        for solver in (SEEDS(1, "x0"), Ancestral("small"))
    )
    for a, b in zip(ours, peer, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


# --- a mixture: weak order where x0 is not affine ----------------------------------------------


def weak_errors(solver, steps, count=240, reach=7.0, order=5):
    """|E f - exact| at the low time of VP for f = x^2 and cos(2 x), by backward quadrature."""
    span, data = SPANS["vp"], mixture(1, jnp.float64)
    process, denoise = span.process, data.denoiser(span.process)
    nodes, draws = np.linspace(-reach, reach, count), solver.stages
    z, w = hermite_e.hermegauss(order)
    zs = np.stack(np.meshgrid(*[z] * draws, indexing="ij"), -1).reshape(-1, draws)
    ws = np.stack(np.meshgrid(*[w / w.sum()] * draws, indexing="ij"), -1).prod(-1).reshape(-1)
    x = jnp.asarray(np.repeat(nodes, len(zs)))[:, None]
    noise = jnp.asarray(np.tile(zs, (count, 1)))

    @jax.jit
    def step(t, s):
        used = iter(range(draws))
        with given_noise(lambda name, like: noise[:, next(used)][:, None]):
            return solver.step(None, denoise, process, XState(x), t, s).x[:, 0]

    def expect(f, t):
        """E f under the mixture's marginal at t, by the trapezoidal rule."""
        v = jnp.linspace(-reach, reach, 4001)
        density = np.exp(data.log_prob(process, v[:, None], jnp.asarray(t)))
        return np.trapezoid(f(np.asarray(v)) * density, v)

    tests = [np.square, lambda v: np.cos(2 * v)]
    errors = []
    for n in steps:
        times = grids.uniform(process, n, t_max=span.high, end=span.low)
        values = tests
        for t, s in zip(times[-2::-1], times[:0:-1], strict=True):
            ends = np.clip(step(t, s), -reach, reach)
            values = [
                make_interp_spline(nodes, f(ends).reshape(count, -1) @ ws, k=5) for f in values
            ]
        pairs = zip(values, tests, strict=True)
        errors.append([abs(expect(now, span.high) - expect(f, span.low)) for now, f in pairs])
    return np.asarray(errors)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_weak_order_on_a_mixture():
    """Two functions of three modes, against the mixture's own marginal: order 2, and 1."""
    for solver, order in ((SEEDS2("x0"), 2), (SEEDS(1, "x0"), 1)):
        errors = weak_errors(solver, (24, 48))
        for kind in range(2):
            assert abs(order_of_convergence((24, 48), errors[:, kind]) - order) < 0.2


# --- a mixture by samples, few steps ---------------------------------------------------------


def mixture_gaps(solver, factor=1.0, n=40, count=50_000):
    """Errors of mean and covariance of a whole solve, in their standard errors."""
    process, data = VP(), mixture(2)
    x = jax.random.normal(jax.random.key(1), (count, 2))
    times = grids.log_snr(process, n)
    with scaled_noise(factor):
        end = jax.jit(
            lambda x: (
                sample(
                    jax.random.key(2),
                    data.denoiser(process),
                    x,
                    times,
                    solver=solver,
                    process=process,
                ).x
            )
        )(x)
    end = np.asarray(end, np.float64)
    mean, covariance = (np.asarray(part, np.float64) for part in data.moments())
    squares = (end - mean)[:, :, None] * (end - mean)[:, None, :]
    return np.concatenate(
        [
            (end.mean(0) - mean) / (end.std(0) / count**0.5),
            ((squares.mean(0) - covariance) / (squares.std(0) / count**0.5)).reshape(-1),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_moments_on_a_mixture(prediction):
    """40 steps down to the data: within 4 standard errors; not so with noise 3% too strong."""
    solver = SEEDS3(prediction)
    assert np.abs(mixture_gaps(solver)).max() < 4
    assert np.abs(mixture_gaps(solver, 1.03)).max() > 5


# --- calls, ends, starts ---------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_declared_calls_are_the_calls_that_run(stages, key):
    process, solver = VP(), SEEDS(stages)
    counter = Counter(gaussian().denoiser(process))
    times = grids.uniform(process, 4)
    nfe = jax.jit(
        lambda t: sample(key, counter, jnp.ones((2, 3)), t, solver=solver, process=process).nfe
    )(times)
    assert nfe == counter.read() == 3 * stages + 1


@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_landing_on_a_point(prediction, key):
    process, point = VP(), jnp.asarray([0.3, -0.9])
    x = jax.random.normal(key, (3, 2))
    times, denoise = grids.uniform(process, 4), PointMass(point).denoiser(process)
    given = {"solver": SEEDS2(prediction), "process": process}
    end = jax.jit(lambda x: sample(key, denoise, x, times, **given).x)(x)
    np.testing.assert_allclose(end, jnp.broadcast_to(point, end.shape), atol=1e-6)
    bare = NoiselessPredictor()
    end = jax.jit(lambda x: sample(key, denoise, x, times[:-1], final=bare, **given).x)(x)
    assert jnp.isfinite(end).all()


def test_starts_and_fields(key):
    """With x0 one stage may start where alpha = 0; the others say that they cannot."""
    flow = RectifiedFlow()
    args = (key, gaussian(2).denoiser(flow), jnp.ones((2, 2)), grids.uniform(flow, 4))
    assert jnp.isfinite(sample(*args, solver=SEEDS(1), process=flow, final=ToEnd()).x).all()
    for solver in (SEEDS2(), SEEDS3(), SEEDS(1, "eps")):
        with pytest.raises(ValueError, match="divides by alpha, which is 0"):
            sample(*args, solver=solver, process=flow)
    for bad, message in (
        ({"stages": 4}, "stages must be one of 1, 2, 3; got 4"),
        ({"prediction": "v"}, "prediction must be one of 'x0', 'eps'"),
        ({"weights": "all"}, "weights must be one of"),
        ({"node": 0.0}, "node must be positive"),
        ({"node": 1.2}, "node must lie in"),
        ({"stages": 3, "node": 0.7}, "node must be below the third stage's"),
    ):
        with pytest.raises(ValueError, match=message):
            SEEDS(**bad)
