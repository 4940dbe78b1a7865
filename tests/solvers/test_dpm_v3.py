"""DPM-Solver-v3: its special cases, exactness for Gaussian data, order and few steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.pytree import replace
from diffjax.processes import VP, RectifiedFlow, log_snr, prior
from diffjax.search import load_statistics, model_statistics, save_statistics
from diffjax.solvers import (
    DDIM,
    DPMSolverPP,
    DPMSolverV3,
    Heun,
    Keep,
    ModelStatistics,
    Multistep,
    grids,
    sample,
)
from diffjax.testing import gaussian, median_error, mixture, order_of_convergence

DRAW = jax.jit(sample)
PROCESS = VP()
DIM = 4

pytestmark = pytest.mark.usefixtures("x64")


def constant(ell, s):
    """The same coefficients everywhere, b = 0."""
    ones = jnp.ones(2)
    return ModelStatistics(jnp.asarray([-9.0, 9.0]), ell * ones, s * ones, 0 * ones)


def draw(denoise, x, times, solver, process=PROCESS, **options):
    return DRAW(jax.random.key(0), denoise, x, times, solver=solver, process=process, **options).x


@functools.cache
def problem():
    """The mixture's denoiser and a batch at t_max."""
    denoise = mixture(DIM, jnp.float64).denoiser(PROCESS)
    return denoise, prior(jax.random.key(0), PROCESS, (64, DIM), jnp.float64)


@functools.cache
def measured(levels=120, dim=16):
    """The statistics of the mixture in `dim` dimensions."""
    data = mixture(dim, jnp.float64)
    x0 = data.draw(jax.random.key(2), 1024, jnp.float64)
    find = jax.jit(model_statistics, static_argnames="levels")
    return find(jax.random.key(1), data.denoiser(PROCESS), PROCESS, x0, levels=levels)


SPECIAL = [(1.0, 0.0, "x0", False), (0.0, -1.0, "eps", False), (1.0, 0.0, "x0", True)]
QUICK = [(*SPECIAL[1], 2), (*SPECIAL[2], 3)]


@pytest.mark.parametrize(
    ("ell", "s", "prediction", "corrector", "order"),
    [
        pytest.param(*case, order, marks=() if (*case, order) in QUICK else pytest.mark.slow)
        for case in SPECIAL
        for order in (1, 2, 3)
    ],
)
def test_special_cases(ell, s, prediction, corrector, order):
    """Constant coefficients give DPM-Solver++, DPM-Solver and UniPC."""
    denoise, x = problem()
    times = grids.log_snr(PROCESS, 8)
    known = Multistep(order, prediction, corrector=order if corrector else 0)
    solver = DPMSolverV3(constant(ell, s), order, corrector=corrector)
    np.testing.assert_allclose(
        draw(denoise, x, times, solver), draw(denoise, x, times, known), atol=1e-11
    )


@functools.cache
def of_gaussian():
    """Gaussian data, and its statistics."""
    data = gaussian(DIM, jnp.float64)
    x0 = data.draw(jax.random.key(2), 32, jnp.float64)
    denoise = data.denoiser(PROCESS)
    return data, model_statistics(jax.random.key(1), denoise, PROCESS, x0, levels=400)


def test_gaussian_statistics():
    """For Gaussian data l is sigma^2/V, f = -sigma^2 m/V for every x, and so s = 0, b = f'."""
    data, found = of_gaussian()
    m, d = data.mean, data.std

    def variance_share(lam):
        # alpha^2 and sigma^2 of a variance-preserving process, from their ratio alone.
        signal, noise = jax.nn.sigmoid(2 * lam), jax.nn.sigmoid(-2 * lam)
        return noise / (signal * d**2 + noise)

    np.testing.assert_allclose(found.ell, jax.vmap(variance_share)(found.lam), rtol=1e-9)
    np.testing.assert_array_equal(found.s, 0)
    slope = jax.vmap(jax.jacfwd(lambda lam: -variance_share(lam) * m))(found.lam)
    np.testing.assert_allclose(found.b[1:-1], slope[1:-1], atol=1e-3)


def test_gaussian_data_in_one_step():
    """Any step is exact as far as the table resolves; DDIM is far off."""
    data, found = of_gaussian()
    denoise, (_, x) = data.denoiser(PROCESS), problem()
    times = jnp.asarray([0.9, 0.3])
    exact = data.flow(PROCESS, x, times[0], times[1])
    off = lambda solver: np.abs(draw(denoise, x, times, solver, final=Keep()) - exact).max()  # noqa: E731
    assert off(DPMSolverV3(found, 1)) < 2e-4
    assert off(DDIM()) > 0.3
    # Each of the three numbers matters.
    for name, factor in (("ell", 1.1), ("b", 1.1)):
        wrong = replace(found, **{name: factor * getattr(found, name)})
        assert off(DPMSolverV3(wrong, 1)) > 1e-3
    assert off(DPMSolverV3(replace(found, s=found.s + 0.1), 1)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "corrector", "expected"), [(1, False, 1), (2, False, 2), (3, True, 3)]
)
def test_order(order, corrector, expected):
    """With measured coefficients, on a grid even in the log-SNR; a start of order 1."""
    found = measured(levels=600, dim=DIM)  # the table's kinks must be finer than the steps
    denoise, x = problem()
    low, high = 0.2, 0.8
    lam = log_snr(PROCESS, jnp.asarray([high, low]))

    def end(n, solver):
        times = PROCESS.inverse_log_snr(jnp.linspace(lam[0], lam[1], n + 1))
        return draw(denoise, x, times, solver, final=Keep())

    exact = end(2048, Multistep(3, corrector=3))
    steps = (12, 24, 48)
    solver = DPMSolverV3(found, order, corrector=corrector)
    errors = [median_error(end(n, solver), exact) for n in steps]
    assert order_of_convergence(steps, errors) > expected - 0.3, errors


@pytest.mark.slow
def test_few_steps():
    """At 5 calls on the mixture in 16 dimensions it is ahead of DPM-Solver++(2M) and DDIM."""
    data = mixture(16, jnp.float64)
    denoise = data.denoiser(PROCESS)
    times, fine = grids.log_snr(PROCESS, 5), grids.log_snr(PROCESS, 2000)
    for seed in range(5):
        x = prior(jax.random.key(seed), PROCESS, (256, 16), jnp.float64)
        exact = draw(denoise, x, fine, Heun())
        solvers = DPMSolverV3(measured(), 3), DPMSolverPP(2), DDIM()
        ours, *others = (median_error(draw(denoise, x, times, s), exact) for s in solvers)
        assert 1.5 * ours < min(others), seed


def test_file(tmp_path):
    found = constant(1.0, 0.0)
    save_statistics(tmp_path / "statistics.npz", found)
    again = load_statistics(tmp_path / "statistics.npz")
    for name in ("lam", "ell", "s", "b"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    (tmp_path / "other").write_text("x")
    with pytest.raises(ValueError, match="no model statistics"):
        load_statistics(tmp_path / "other")


def test_refusals():
    denoise, x = problem()
    with pytest.raises(ValueError, match="lam must hold 2 levels or more"):
        replace(constant(1.0, 0.0), lam=jnp.asarray([9.0, -9.0]))
    with pytest.raises(ValueError, match="alpha = 0"):
        DPMSolverV3(constant(1.0, 0.0)).init(RectifiedFlow(), x, jnp.asarray(1.0))
    with pytest.raises(ValueError, match="half log-SNR must be finite"):
        model_statistics(jax.random.key(0), denoise, RectifiedFlow(), x)
