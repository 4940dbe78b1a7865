"""Runge-Kutta by tableau: orders in every variable, stage times, calls, ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import RK23, RK45

from diffjax.processes import EDM, VP, RectifiedFlow
from diffjax.solvers import (
    DDIM,
    EDMChurn,
    Euler,
    Heun,
    Keep,
    ToEnd,
    grids,
    sample,
    tableaus,
)
from diffjax.solvers.runge_kutta import (
    RK4,
    BogackiShampine,
    DormandPrince,
    InLogSNR,
    InNoiseLevel,
    InTime,
    Midpoint,
    RungeKutta,
)
from diffjax.solvers.tableaus import Tableau
from diffjax.testing import median_error, order_of_convergence, propagate_moments
from tests.oracles import PointMass, gaussian, mixture
from tests.solvers.helpers import SPANS, padded, padded_solver, standard_normal
from tests.solvers.test_order import reference_flow, starts

TABLEAUS = {name: value for name, value in vars(tableaus).items() if isinstance(value, Tableau)}
VARIABLES = {"t": InTime(), "noise_level": InNoiseLevel(), "log_snr": InLogSNR()}


# --- the numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLEAUS)
def test_rows_add_up_to_their_nodes(name):
    """sum_j a_ij = c_i, and the last row is a quadrature of the tableau's order."""
    tableau = TABLEAUS[name]
    np.testing.assert_allclose(tableau.matrix().sum(1), tableau.c, rtol=1e-14)
    nodes, weights = np.asarray((0.0, *tableau.c[:-1])), np.asarray(tableau.a[-1])
    for power in range(tableau.order):
        np.testing.assert_allclose(weights @ nodes**power, 1 / (power + 1), rtol=1e-13)
    if tableau.e:
        every = np.asarray((0.0, *tableau.c))
        for power in range(tableau.order - 1):
            np.testing.assert_allclose(np.asarray(tableau.e) @ every**power, 0, atol=1e-15)


@pytest.mark.parametrize(
    "tableau, peer", [(tableaus.DORMAND_PRINCE, RK45), (tableaus.BOGACKI_SHAMPINE, RK23)]
)
def test_embedded_pairs_are_scipys(tableau, peer):
    stages = peer.n_stages - 1
    np.testing.assert_allclose(tableau.matrix()[:-1, :stages], peer.A[1:, :stages], atol=1e-15)
    np.testing.assert_allclose(tableau.a[-1], peer.B, atol=1e-15)
    np.testing.assert_allclose((0.0, *tableau.c[:-1]), peer.C, atol=1e-15)
    np.testing.assert_allclose(np.abs(tableau.e), np.abs(peer.E), atol=1e-15)


# --- orders ----------------------------------------------------------------------------------

STEPS = {2: (32, 64, 128), 3: (32, 64, 128), 4: (16, 32, 64), 5: (60, 90, 128)}


def keep_order(name, solver, oracle, x, exact, order, most=128):
    """The fitted order from high to low times on grids even in the log-SNR."""
    span = SPANS[name]
    solve = padded_solver(solver, span.process, oracle.denoiser(span.process), Keep())
    errors = []
    for n in STEPS[order]:
        times = grids.log_snr(span.process, n, t_max=span.high, end=span.low)
        errors.append(median_error(solve(x, padded(times, most), n), exact))
    return order_of_convergence(STEPS[order], errors)


def gaussian_order(name, solver, order):
    span, oracle = SPANS[name], gaussian(3, jnp.float64)
    x = jnp.asarray(starts(name, 3))
    exact = oracle.flow(span.process, x, jnp.asarray(span.high), jnp.asarray(span.low))
    return keep_order(name, solver, oracle, x, exact, order)


# Dormand-Prince in the noise level is left out: its leading error is so small there that order 6
# shows until rounding does. So is the midpoint rule's, of order 3 on grids even in the log-SNR.
CASES = [
    (DormandPrince, "log_snr", "vp"),
    (RK4, "noise_level", "vp"),
    (BogackiShampine, "noise_level", "flow"),
    (Midpoint, "log_snr", "cosine"),
]
MORE = [
    (DormandPrince, "t", "ve"),
    (RK4, "noise_level", "cosine"),
    (BogackiShampine, "log_snr", "sub_vp"),
    (DormandPrince, "log_snr", "flow"),
    (RK4, "t", "flow"),
    (Midpoint, "t", "vp"),
    (Midpoint, "t", "ve"),
]


def named(cases, marks=()):
    return [pytest.param(*c, id=f"{c[0].__name__}-{c[1]}-{c[2]}", marks=marks) for c in cases]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "preset, variable, name", [*named(CASES), *named(MORE, marks=pytest.mark.slow)]
)
def test_order_on_a_gaussian(preset, variable, name):
    """Truth: the closed form of the probability flow of a Gaussian."""
    solver = preset(VARIABLES[variable])
    order = solver.tableau.order
    assert abs(gaussian_order(name, solver, order) - order) < 0.2


def changed(tableau, row, column, factor):
    """A tableau with one number changed, and the first of its row so that the sum is kept."""
    a = [list(r) for r in tableau.a]
    a[row][0] += a[row][column] * (1 - factor)
    a[row][column] *= factor
    return tableau._replace(a=tuple(tuple(r) for r in a))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "tableau, row, column",
    [
        (tableaus.RK4, 3, 2),
        pytest.param(tableaus.DORMAND_PRINCE, 4, 2, marks=pytest.mark.slow),
        pytest.param(tableaus.BOGACKI_SHAMPINE, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_order_finds_wrong_coefficients(tableau, row, column):
    """One number 3% off: the order is lost, also where consistency is kept."""
    wrong = RungeKutta(changed(tableau, row, column, 1.03), InNoiseLevel())
    assert gaussian_order("vp", wrong, tableau.order) < tableau.order - 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_order_on_a_mixture(name="vp"):
    """Truth: scipy's eighth-order method on a velocity from the log-density."""
    oracle = mixture(2, jnp.float64)
    x = jnp.asarray(starts(name, 2))
    exact = reference_flow(name, oracle, x)
    steps = (64, 96, 144)
    for solver, order in ((RK4(InNoiseLevel()), 4), (BogackiShampine(InLogSNR()), 3)):
        span = SPANS[name]
        solve = padded_solver(solver, span.process, oracle.denoiser(span.process), Keep())
        errors = []
        for n in steps:
            times = grids.log_snr(span.process, n, t_max=span.high, end=span.low)
            errors.append(median_error(solve(x, padded(times, 144), n), exact))
        assert abs(order_of_convergence(steps, errors) - order) < 0.3


@pytest.mark.usefixtures("x64")
def test_order_to_the_end():
    """The last interval, onto sigma = 0 by the exact linear step, keeps second order."""
    process, oracle = EDM(t_max=5.0), gaussian(3, jnp.float64)
    x = 5.0 * jnp.asarray(standard_normal(2, (32, 3)))
    exact = oracle.flow(process, x, jnp.asarray(5.0), jnp.asarray(0.0))
    solve = padded_solver(Midpoint(), process, oracle.denoiser(process), ToEnd())
    steps = (64, 128, 256)
    errors = [
        median_error(solve(x, padded(grids.uniform(process, n), 256), n), exact) for n in steps
    ]
    assert abs(order_of_convergence(steps, errors) - 2) < 0.2


# --- the same method under another name ------------------------------------------------------


@functools.cache
def solved(solver, name="vp", batch=4):
    process = SPANS[name].process
    oracle = mixture(2, jnp.float64).denoiser(process)
    times = grids.uniform(process, 7, t_max=SPANS[name].high)
    x = jnp.asarray(standard_normal(3, (batch, 2)))
    run = jax.jit(
        lambda x: sample(jax.random.key(0), oracle, x, times, solver=solver, process=process).x
    )
    return np.asarray(run(x))


@pytest.mark.usefixtures("x64")
def test_known_methods(name="vp"):
    """Euler and Heun in t; DDIM is Euler in the noise level."""
    same = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
    same(solved(RungeKutta(tableaus.EULER), name), solved(Euler(), name))
    same(solved(RungeKutta(tableaus.HEUN), name), solved(Heun(), name))
    same(solved(RungeKutta(tableaus.EULER, InNoiseLevel()), name), solved(DDIM(), name))
    assert (
        np.abs(solved(RungeKutta(tableaus.HEUN, InLogSNR()), name) - solved(Heun(), name)).max()
        > 1e-5
    )


# --- where and how often the network is asked ------------------------------------------------


def recorded(solver, process, times, final, n_steps=None):
    """The times at which the denoiser ran, in order, under jit; and the declared calls."""
    seen = []
    oracle = gaussian(2).denoiser(process)

    def denoise(x, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
        return oracle(x, t)

    x = jnp.ones((2, 2))
    run = jax.jit(
        lambda times: (
            sample(
                jax.random.key(0),
                denoise,
                x,
                times,
                solver=solver,
                process=process,
                final=final,
                n_steps=n_steps,
            ).nfe
        )
    )
    declared = int(run(times))
    jax.effects_barrier()
    return np.asarray(seen), declared


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize(
    "preset",
    [pytest.param(Midpoint, marks=pytest.mark.slow), DormandPrince],
    ids=lambda p: p.__name__,
)
def test_stages_lie_in_their_interval(preset, variable):
    """Times of all calls: within [s, t], in the tableau's order, and never where sigma = 0."""
    process, solver = VP(), preset(VARIABLES[variable])
    times = grids.uniform(process, 3)
    seen, declared = recorded(solver, process, times, ToEnd())
    assert declared == len(seen) == 2 * solver.stages + 1
    assert seen.min() > 0
    for i in range(2):
        low, high = float(times[i + 1]), float(times[i])
        inside = seen[i * solver.stages : (i + 1) * solver.stages]
        assert inside.min() >= low and inside.max() <= high
        nodes = VARIABLES[variable].of_time(process, jnp.asarray([high, *inside, low]))
        fraction = (nodes[1:-1] - nodes[0]) / (nodes[-1] - nodes[0])
        np.testing.assert_allclose(fraction, (0.0, *solver.tableau.c[:-1]), atol=2e-5)
    assert seen[-1] == float(times[2])


def test_stages_of_an_inversion():
    """On an increasing grid too."""
    seen, declared = recorded(RK4(InLogSNR()), VP(), jnp.asarray([0.1, 0.4, 0.9]), Keep())
    assert declared == len(seen) == 8
    assert seen[0] == np.float32(0.1) and seen.max() == np.float32(0.9)
    assert (np.diff(seen) >= 0).all()


def test_one_copy_of_the_network():
    """However many stages: one in the steps and one in the last interval."""
    process, traced = VP(), []
    oracle = gaussian(2).denoiser(process)

    def denoise(x, t):
        traced.append(None)
        return oracle(x, t)

    run = jax.jit(
        lambda x: (
            sample(
                jax.random.key(0),
                denoise,
                x,
                grids.uniform(process, 4),
                solver=DormandPrince(),
                process=process,
            ).x
        )
    )
    run.lower(jnp.ones((2, 2))).compile()
    program = run.lower(jnp.ones((2, 2))).as_text()
    assert program.count("stablehlo.while") == 2  # steps and stages
    assert len(traced) <= 4  # two a trace


@pytest.mark.parametrize(
    "preset", [RK4, pytest.param(Midpoint, marks=pytest.mark.slow)], ids=lambda p: p.__name__
)
def test_landing_on_a_point(preset):
    process, point = VP(), jnp.asarray([0.3, -0.9])
    x = jax.random.normal(jax.random.key(1), (3, 2))
    denoise, times = PointMass(point).denoiser(process), grids.uniform(process, 4)
    given = {"solver": preset(InNoiseLevel()), "process": process}
    end = jax.jit(lambda x: sample(jax.random.key(0), denoise, x, times, **given).x)(x)
    np.testing.assert_allclose(end, jnp.broadcast_to(point, end.shape), atol=1e-6)


def test_a_flow_from_pure_noise():
    """In t a flow may start at t = 1; where sigma/alpha is infinite the start is refused."""
    process = RectifiedFlow()
    oracle, x = gaussian(2).denoiser(process), jnp.ones((2, 2))
    args = (jax.random.key(0), oracle, x, grids.uniform(process, 4))
    end = jax.jit(lambda: sample(*args, solver=RK4(InTime()), process=process).x)()
    assert jnp.isfinite(end).all()
    for variable in (InNoiseLevel(), InLogSNR()):
        with pytest.raises(ValueError, match=r"divides by alpha, which is 0.*t_max=.*InTime\(\)"):
            sample(*args, solver=RK4(variable), process=process)


# --- churn -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "inner, order",
    [(Midpoint(InTime()), 2), (RK4(InLogSNR()), 4)],
    ids=["midpoint", "rk4"],
)
def test_churn_keeps_the_order(inner, order):
    """A fixed churn a step: the covariance stays that of p_t up to the inner method's error."""
    span = SPANS["vp"]
    process, oracle = span.process, gaussian(2, jnp.float64)

    def law(t):
        c = process.coeffs(jnp.asarray(t))
        return c.alpha * oracle.mean, jnp.diag(c.alpha**2 * oracle.std**2 + c.sigma**2)

    @jax.jit
    def run(solver, times):
        moments = propagate_moments(
            solver, oracle.denoiser(process), process, times, *law(span.high)
        )
        return jnp.linalg.norm(moments[1] - law(span.low)[1])

    steps = (24, 36, 54)
    errors = []
    for n in steps:
        grid = grids.log_snr(process, n, t_max=span.high, end=span.low)
        errors.append(run(EDMChurn(inner, s_churn=2.0, n_steps=float(n)), grid))
    assert abs(order_of_convergence(steps, errors) - order) < 0.25
