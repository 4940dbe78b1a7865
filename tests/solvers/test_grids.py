"""Grids against their closed formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.processes import EDM, VE, VP, Cosine, RectifiedFlow, SubVP, Tabulated, log_snr
from diffjax.solvers import grids

PROCESSES = {
    "vp": VP(),
    "sub_vp": SubVP(),
    "ve": VE(),
    "edm": EDM(),
    "cosine": Cosine(),
    "flow": RectifiedFlow(),
    "ddpm": Tabulated.ddpm(50),
}
GRIDS = {
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
    "log_snr": grids.log_snr,
    "karras": grids.karras,
}
NODES = ("log_snr", "karras")


def built(grid, name, n, **options):
    """The grid, starting below 1 where the log-SNR is infinite there."""
    if grid in NODES and name == "flow":
        options = {"t_max": 0.99} | options
    return np.asarray(GRIDS[grid](PROCESSES[name], n, **options))


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid(grid, name):
    """n + 1 times, strictly decreasing, with the ends exact: 0, or t_min where noise remains."""
    process = PROCESSES[name]
    top = np.float32(0.99 if grid in NODES and name == "flow" else process.t_max)
    bottom = np.float32(process.t_min) if name == "ve" else np.float32(0)
    for n in (1, 2, 7, 200):
        times = built(grid, name, n)
        assert times.shape == (n + 1,)
        assert times.dtype == np.float32
        assert np.all(np.diff(times) < 0)
        assert times[0] == top
        assert times[-1] == bottom
        if grid in NODES and name != "ve" and n > 1:
            assert times[-2] == np.float32(process.t_min)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("grid", GRIDS)
def test_ends_as_asked(grid, name):
    """t_max, t_min and end are used as given."""
    low, high = (0.5, 3.0) if name == "edm" else (0.3, 0.7)
    times = built(grid, name, 6, t_max=high, end=low)
    assert times[0] == np.float32(high)
    assert times[-1] == np.float32(low)
    assert np.all(np.diff(times) < 0)
    if grid in NODES:
        times = built(grid, name, 6, t_max=high, t_min=low, end=0.0)
        assert (times[0], times[-2], times[-1]) == (np.float32(high), np.float32(low), 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PROCESSES)
def test_equal_spacing(name):
    """Each grid is linear in its own variable."""
    process = PROCESSES[name] if name != "ddpm" else Tabulated.ddpm(50)
    options = {"t_max": 0.9, "end": 0.1}
    n = 12

    def linear(values):
        steps = np.diff(np.asarray(values))
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-7)

    linear(grids.uniform(process, n, **options))
    linear(np.sqrt(grids.quadratic(process, n, **options)))
    linear(log_snr(process, grids.log_snr(process, n, **options)))
    for rho in (3.0, 7.0):
        times = grids.karras(process, n, rho=rho, **options)
        linear(jnp.exp(-log_snr(process, times) / 2) ** (1 / rho))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n, rho", [(18, 7.0), (40, 7.0), (5, 3.0)])
def test_karras_is_the_paper_formula(n, rho):
    """sigma_i of Karras et al., eq. 5, with sigma_N = 0; on EDM sigma is t."""
    i = np.arange(n)
    root = 80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))
    exact = np.append(root**rho, 0.0)
    np.testing.assert_allclose(grids.karras(EDM(), n, rho=rho), exact, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_quadratic_is_the_paper_formula():
    np.testing.assert_allclose(grids.quadratic(VP(), 10), (np.arange(10, -1, -1) / 10) ** 2)


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_inside_jit(grid, fresh_cache):
    """With end= a grid can be built from traced numbers; without it the message says so."""
    make = jax.jit(lambda process: GRIDS[grid](process, 8, end=0.0))
    for beta in (20.0, 10.0):
        process = VP(beta_max=beta)
        np.testing.assert_allclose(make(process), GRIDS[grid](process, 8), rtol=2e-5)
    assert make._cache_size() == 1
    with pytest.raises(ValueError, match=r"say where the grid ends: end=0.0"):
        jax.jit(lambda process: GRIDS[grid](process, 8))(VP())


def test_float32_grids_of_many_steps():
    """1000 steps stay strictly decreasing in float32, next to both ends too."""
    for name in PROCESSES:
        for grid in GRIDS:
            assert np.all(np.diff(built(grid, name, 1000)) < 0), (name, grid)


def test_given():
    times = grids.given([1.0, 0.5, 0.1])
    np.testing.assert_array_equal(times, np.asarray([1.0, 0.5, 0.1], np.float32))
    with pytest.raises(ValueError, match=r"strictly; got times\[2\] = 0.5.* after 0.5"):
        grids.given([1.0, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"shape \(n\+1,\) with n >= 1; got \(1,\)"):
        grids.given([1.0])
    with pytest.raises(ValueError, match="strictly"):
        grids.given([1.0, float("nan"), 0.0])


@pytest.mark.parametrize("grid", GRIDS)
def test_errors(grid):
    make, process = GRIDS[grid], VP()
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        make(process, 0)
    with pytest.raises(TypeError, match="n must be an int; got 2.5"):
        make(process, 2.5)
    with pytest.raises(ValueError, match="must be below t_max; got 0.5 and 0.5"):
        make(process, 4, t_max=0.5, end=0.5)
    with pytest.raises(ValueError, match="end must not be negative; got -0.1"):
        make(process, 4, end=-0.1)


def test_errors_of_the_level_grids():
    with pytest.raises(ValueError, match="rho must be positive; got 0"):
        grids.karras(EDM(), 4, rho=0)
    for make in (grids.log_snr, grids.karras):
        with pytest.raises(ValueError, match=r"finite at both ends; got -inf at t = 1.*t_max="):
            make(RectifiedFlow(), 4)
