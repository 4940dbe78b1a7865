"""BDIA: the published recursion, its orders, and that it runs backwards exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.processes import EDM, VP, RectifiedFlow
from diffjax.solvers import (
    BDIADDIM,
    BDIAEDM,
    DDIM,
    Heun,
    Keep,
    ToEnd,
    grids,
    invert,
    sample,
)
from diffjax.solvers.bdia import turned
from diffjax.testing import median_error, order_of_convergence
from tests.oracles import gaussian, mixture
from tests.solvers.helpers import SPANS, Counter, bent_denoiser, padded, padded_solver
from tests.solvers.helpers import standard_normal as noise

KEY = jax.random.key(0)
SOLVERS = {"ddim": BDIADDIM, "edm": BDIAEDM}
PROCESSES = {
    "vp": (VP(), grids.log_snr),
    "edm": (EDM(), grids.karras),
    "flow": (RectifiedFlow(), grids.uniform),
}
run = jax.jit(sample, static_argnames=("save",))
back = jax.jit(invert, static_argnames=("max_error",))
SLOW = pytest.mark.slow
# One of each dtype; the other pairs in the slow lane.
PAIRS = [
    ("edm", "edm"),
    pytest.param("vp", "ddim", marks=SLOW),
    pytest.param("edm", "ddim", marks=SLOW),
    pytest.param("vp", "edm", marks=SLOW),
    pytest.param("flow", "ddim", marks=SLOW),
    pytest.param("flow", "edm", marks=SLOW),
]


def levels(name, t):
    """alpha, sigma and their derivatives as the papers have them."""
    if name == "vp":
        integral = 0.1 * t + 19.9 * t**2 / 2
        a, beta = np.exp(-integral / 2), 0.1 + 19.9 * t
        s = np.sqrt(1 - a**2)
        return a, s, -beta / 2 * a, beta / 2 * a**2 / s
    return 1.0, t, 0.0, 1.0


def published(name, method, gamma, x, times, eps_of):
    """The paper's recursion on whole steps: z + (step on) + gamma (z_old - z - (step back))."""

    def ask(z, t):
        eps = eps_of(z, t)
        a, s, _, _ = levels(name, t)
        return (z - s * eps) / a, eps

    def one_step(z, t, u):
        x0, eps = ask(z, t)
        a, s, _, _ = levels(name, u)
        if method == "ddim":
            return a * x0 + s * eps
        slope = lambda x0, eps, t: levels(name, t)[2] * x0 + levels(name, t)[3] * eps  # noqa: E731
        first = slope(x0, eps, t)
        second = slope(*ask(z + (u - t) * first, u), u)
        return z + (u - t) * (first + second) / 2

    path = [x, one_step(x, times[0], times[1])]
    for r, t, s in zip(times, times[1:], times[2:], strict=False):
        older, z = path[-2:]
        ahead, behind = one_step(z, t, s) - z, one_step(z, t, r) - z
        path.append(older - (1 - gamma) * (older - z) - gamma * behind + ahead)
    return path


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("name", ["vp", "edm"])
def test_it_is_the_published_recursion(name, method, x64):
    span = SPANS[name]
    times = np.linspace(span.high, span.low, 7) ** 1.1
    x = noise(0, (5, 3))
    eps_of = lambda z, t: np.sin(z) + z / 3 + t / 5  # noqa: E731
    denoise = bent_denoiser(span.process)

    @jax.jit
    def solve(solver):
        given = {"solver": solver, "process": span.process, "final": Keep()}
        return sample(KEY, denoise, jnp.asarray(x), jnp.asarray(times), **given).state

    for gamma in (1.0, 0.5):
        path = published(name, method, gamma, x, times, eps_of)
        state = solve(SOLVERS[method](gamma))
        np.testing.assert_allclose(state.x, path[-1], rtol=1e-10)
        np.testing.assert_allclose(state.previous, path[-2], rtol=1e-10)


def there_and_back(name, solver, dtype, n=50):
    """(x, x again, the largest value of the path, nfe there, nfe back)."""
    process, grid = PROCESSES[name]
    times = grid(process, n)
    x = jnp.asarray(noise(1, (32, 3)), dtype) * float(process.coeffs(times[0]).sigma)
    denoise = mixture(3, dtype).denoiser(process)
    done = run(KEY, denoise, x, times, solver=solver, process=process, save=lambda state: state.x)
    again = back(denoise, done.state, times, solver=solver, process=process)
    assert done.x.dtype == again.x.dtype == dtype
    largest = max(float(jnp.abs(done.saved).max()), float(jnp.abs(x).max()))
    return x, again.x, largest, done.nfe, again.nfe


@pytest.mark.parametrize("name, method", PAIRS)
def test_round_trip_in_float32(name, method):
    """50 steps to sigma = 0 and back at gamma = 1."""
    x, again, largest, _, _ = there_and_back(name, SOLVERS[method](), jnp.float32)
    assert float(jnp.abs(again - x).max()) < 1e-6 * largest


@pytest.mark.parametrize("name, method", [("vp", "ddim"), pytest.param("edm", "edm", marks=SLOW)])
def test_round_trip_in_float64(name, method, x64):
    x, again, largest, there, back = there_and_back(name, SOLVERS[method](), jnp.float64)
    assert float(jnp.abs(again - x).max()) < 1e-12 * largest
    stages = SOLVERS[method]().stages
    assert (there, back) == (49 * stages + SOLVERS[method]().final_stages, 49 * stages)


def test_one_sample_of_the_two_is_not_enough(x64):
    """The mutant: from x alone the way back is a one-step method's, off by its error."""
    process, grid = PROCESSES["vp"]
    times = grid(process, 50, end=1e-3)
    x = jnp.asarray(noise(1, (32, 3)))
    given = {"solver": BDIADDIM(), "process": process, "final": Keep()}
    denoise = mixture(3, jnp.float64).denoiser(process)
    done = run(KEY, denoise, x, times, **given)
    again = run(KEY, denoise, done.x, times[::-1], **given)
    assert float(jnp.abs(again.x - x).max()) > 1e-6


@pytest.mark.parametrize("method", ["ddim", pytest.param("edm", marks=SLOW)])
def test_encoding_comes_back_to_the_data(method, x64):
    """Up from the data, then down: the pair at the top is what editing starts from."""
    process, solver = VP(), SOLVERS[method](0.9)
    times = grids.log_snr(process, 20, end=1e-3)[::-1]
    x = jnp.asarray(0.7 * noise(3, (16, 3)))
    denoise = mixture(3, jnp.float64).denoiser(process)
    up = run(KEY, denoise, x, times, solver=solver, process=process, final=Keep())
    assert float(jnp.abs(up.x - x).max()) > 0.5
    # On the driver itself, from the turned state: what `invert` does.
    state = turned(up.state, times[-1])
    given = {"solver": solver, "process": process, "final": Keep(), "state": state}
    down = run(KEY, denoise, x, times[-2::-1], **given)
    np.testing.assert_allclose(down.x, x, rtol=0, atol=1e-12)


@SLOW
@pytest.mark.parametrize("method", SOLVERS)
def test_rounding_grows_as_gamma_to_the_minus_n(method, x64):
    """A change of the final state comes back gamma^-n as large: the factor a step is 1/gamma."""
    process, gamma = VP(), 0.5
    denoise = gaussian(3, jnp.float64).denoiser(process)
    x, gaps = jnp.asarray(noise(1, (8, 3))), []
    counts = (8, 24)
    for n in counts:
        times = grids.log_snr(process, n, t_max=0.9, end=0.1)
        solver = SOLVERS[method](gamma)
        state = run(KEY, denoise, x, times, solver=solver, process=process, final=Keep()).state
        moved = state._replace(x=state.x + 1e-9)
        again = back(denoise, moved, times, solver=solver, process=process)
        gaps.append(float(jnp.abs(again.x - x).max()))
    rate = np.polyfit(counts, np.log(gaps), 1)[0]
    assert abs(rate / np.log(1 / gamma) - 1) < 0.1


def test_too_many_steps_back_raise():
    process, times = VP(), grids.log_snr(VP(), 50)
    denoise = gaussian(3).denoiser(process)
    x = jnp.ones((2, 3))
    given = {"process": process}
    state = run(KEY, denoise, x, times, solver=BDIADDIM(0.5), **given).state
    with pytest.raises(ValueError, match=r"gamma = 0.5 and 50 intervals in float32.*gamma = 1"):
        invert(denoise, state, times, solver=BDIADDIM(0.5), **given)
    # The bound is one: what it lets through is less far off than it says.
    solver = BDIADDIM(0.9)
    done = run(KEY, denoise, x, times, solver=solver, **given)
    again = invert(denoise, done.state, times, solver=solver, **given)
    assert float(jnp.abs(again.x - x).max()) < float(jnp.finfo(jnp.float32).eps) * 0.9**-50
    for gamma in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match="gamma must"):
            BDIADDIM(gamma)


STEPS = (64, 128, 256)


@functools.cache
def keep_errors(name, solver):
    """Errors from high to low times on a Gaussian, for each of STEPS; compiled once a structure."""
    span, oracle = SPANS[name], gaussian(3, jnp.float64)
    process = span.process
    x = jnp.asarray(noise(2, (32, 3)))
    exact = oracle.flow(process, x, jnp.asarray(span.high), jnp.asarray(span.low))
    solve = padded_solver(solver, process, oracle.denoiser(process), Keep())
    errors = []
    for n in STEPS:
        times = grids.log_snr(process, n, t_max=span.high, end=span.low)
        errors.append(median_error(solve(x, padded(times, STEPS[-1]), n), exact))
    return errors


ORDERS = [
    (BDIADDIM(1.0), 2),
    (BDIADDIM(0.5), 1),
    (BDIAEDM(1.0), 2),
    pytest.param(BDIAEDM(0.5), 2, marks=SLOW),
]


@pytest.mark.parametrize("solver, order", ORDERS, ids=repr)
@pytest.mark.parametrize("name", ["vp", pytest.param("edm", marks=SLOW)])
def test_order(name, solver, order, x64):
    """Truth: the closed form of a Gaussian's probability flow."""
    assert abs(order_of_convergence(STEPS, keep_errors(name, solver)) - order) < 0.2


@SLOW
def test_leading_errors(x64):
    """(1 - gamma)/(1 + gamma) of DDIM's error; of Heun's, all of it, whatever gamma."""
    euler, heun = keep_errors("vp", DDIM())[-1], keep_errors("vp", Heun())[-1]
    assert abs(keep_errors("vp", BDIADDIM(0.5))[-1] / euler - 1 / 3) < 0.02
    for solver in (BDIAEDM(1.0), BDIAEDM(0.5)):
        assert abs(keep_errors("vp", solver)[-1] / heun - 1) < 0.05


@pytest.mark.parametrize("method", SOLVERS)
def test_calls_are_as_declared_and_never_at_the_end(method):
    process, n, solver = EDM(), 6, SOLVERS[method]()
    times = grids.karras(process, n)
    x = 80 * jnp.asarray(noise(1, (4, 3)), jnp.float32)
    counter = Counter(gaussian(3).denoiser(process))
    seen = []

    def denoise(x, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return counter(x, t)

    done = sample(KEY, denoise, x, times, solver=solver, process=process, final=ToEnd())
    assert counter.read() == done.nfe
    back = invert(denoise, done.state, times, solver=solver, process=process)
    assert counter.read() == back.nfe
    assert min(seen) > 0
