"""The teleport start: exact on Gaussians, and fewer calls at equal error on a mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.processes import EDM, VP, RectifiedFlow, velocity
from diffjax.solvers import (
    GaussianDiagonal,
    GaussianDirections,
    Heun,
    fit_gaussian,
    fit_gaussian_diagonal,
    grids,
    sample,
    teleport,
)
from diffjax.testing import median_error
from tests import members
from tests.oracles import gaussian, mixture
from tests.solvers.helpers import SPANS, standard_normal

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x64")


def covariance(dim, rank, rest):
    """Orthonormal vectors (rank, dim), their variances, and the matrix with `rest` elsewhere."""
    vectors = np.linalg.qr(standard_normal(1, (dim, rank)))[0].T
    variances = np.linspace(0.2, 2.0, rank)
    whole = rest * (np.eye(dim) - vectors.T @ vectors) + (vectors.T * variances) @ vectors
    return vectors, variances, whole


@pytest.mark.parametrize("name", SPANS)
def test_it_is_the_flow_of_a_gaussian(name):
    """Against the element-wise closed form of the oracle, in rotated coordinates, both ways."""
    process, low, high = SPANS[name]
    oracle, x = gaussian(4, jnp.float64), jnp.asarray(standard_normal(0, (5, 4)))
    turn = jnp.asarray(np.linalg.qr(standard_normal(2, (4, 4)))[0])
    mean = oracle.mean @ turn
    data = GaussianDirections(mean, turn, oracle.std**2)
    for t, s in ((high, low), (low, high)):
        exact = oracle.flow(process, x, jnp.asarray(t), jnp.asarray(s))
        found = teleport(process, x @ turn, t, s, data)
        np.testing.assert_allclose(found, exact @ turn, rtol=1e-10, atol=1e-12)
        diagonal = GaussianDiagonal(oracle.mean, oracle.std**2)
        np.testing.assert_allclose(teleport(process, x, t, s, diagonal), exact, rtol=1e-10)


def test_it_starts_from_clean_data():
    """From sigma = 0, where no direction but the data's holds anything, and back."""
    process, t = EDM(), jnp.asarray(3.0)
    vectors, variances, _ = covariance(6, 2, rest=0.0)
    mean, along = standard_normal(3, 6), standard_normal(4, (5, 2))
    data = GaussianDirections(mean, vectors, jnp.asarray(variances))
    clean = jnp.asarray(mean + along @ vectors)
    noisy = teleport(process, clean, 0.0, t, data)
    spread = np.sqrt(1 + 3.0**2 / variances)
    np.testing.assert_allclose(noisy, mean + (along * spread) @ vectors, rtol=1e-12)
    np.testing.assert_allclose(teleport(process, noisy, t, 0.0, data), clean, rtol=1e-12)


def test_a_rest_and_a_tree():
    """Low rank and one variance for the rest, on a tree, against the matrix's eigenvectors."""
    process, t, s = VP(), jnp.asarray(0.8), jnp.asarray(0.2)
    vectors, variances, whole = covariance(6, 2, rest=0.3)
    mean, x = standard_normal(3, 6), standard_normal(4, (5, 6))
    at, to = process.coeffs(t), process.coeffs(s)
    values, axes = np.linalg.eigh(whole)
    a, b, a_s, b_s = (float(c) for c in (at.alpha, at.sigma, to.alpha, to.sigma))
    ratio = np.sqrt((a_s**2 * values + b_s**2) / (a**2 * values + b**2))
    exact = a_s * mean + (x - a * mean) @ (axes * ratio) @ axes.T
    cut = lambda a: {"a": jnp.asarray(a[..., :2]), "b": jnp.asarray(a[..., 2:])}  # noqa: E731
    data = GaussianDirections(cut(mean), cut(vectors), jnp.asarray(variances), 0.3)
    found = teleport(process, cut(x), t, s, data)
    np.testing.assert_allclose(found["a"], exact[:, :2], rtol=1e-10)
    np.testing.assert_allclose(found["b"], exact[:, 2:], rtol=1e-10)


def test_its_slope_is_the_velocity_where_there_is_no_signal():
    """At t = 1 of a straight flow, where alpha = 0 and the score says nothing."""
    process, one = RectifiedFlow(), jnp.asarray(1.0)
    oracle, x = gaussian(3, jnp.float64), jnp.asarray(standard_normal(0, (4, 3)))
    data = GaussianDiagonal(oracle.mean, oracle.std**2)
    slope = jax.jvp(lambda s: teleport(process, x, one, s, data), (one,), (jnp.ones(()),))[1]
    exact = velocity(process, oracle.denoiser(process)(x, one), one)
    np.testing.assert_allclose(slope, exact, rtol=1e-10, atol=1e-12)


def test_fits():
    """Against NumPy's covariance; a low rank keeps the total variance."""
    samples = 3 + standard_normal(0, (40, 5)) @ standard_normal(1, (5, 5))
    whole = np.cov(samples.T)
    data = fit_gaussian(samples)
    vectors = np.asarray(data.vectors)
    matrix = (vectors.T * np.asarray(data.variances)) @ vectors
    np.testing.assert_allclose(matrix, whole, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(data.mean, samples.mean(0), rtol=1e-12)
    low = fit_gaussian(samples.reshape(40, 5, 1), rank=2)
    assert low.vectors.shape == (2, 5, 1)
    total = low.variances.sum() + 3 * low.rest
    np.testing.assert_allclose(total, np.trace(whole), rtol=1e-12)
    np.testing.assert_allclose(low.variances, np.linalg.eigvalsh(whole)[:-3:-1], rtol=1e-10)
    diagonal = fit_gaussian_diagonal(samples)
    np.testing.assert_allclose(diagonal.variances, np.diag(whole), rtol=1e-10)
    with pytest.raises(ValueError, match=r"at most min\(N - 1, D\) = 5; got 6"):
        fit_gaussian(samples, rank=6)


def test_fits_of_a_large_offset_keep_their_digits():
    """Means of 1e4 and deviations of 1e-2, of data in float32."""
    exact = 1e4 + 1e-2 * standard_normal(0, (500, 3))
    samples = exact.astype(np.float32)
    found = fit_gaussian(samples)
    truth = np.linalg.eigvalsh(np.cov(samples.astype(np.float64).T))[::-1]
    np.testing.assert_allclose(found.variances, truth, rtol=1e-6)


def test_it_saves_steps_at_equal_error_on_a_mixture():
    """EDM's grid of 18: its steps above a level dropped, the rest as they are.

    Error: the median distance from the flow's own end point, by a fine solve. Half of the steps are
    dropped at no more error, since the closed form makes none of a solver's own; with the noise of
    that level alone, x shrunk, the error is several times as large.
    """
    process, oracle = EDM(), mixture(4, jnp.float64)
    denoise = oracle.denoiser(process)
    x = jnp.asarray(80 * standard_normal(5, (400, 4)))
    run = jax.jit(sample, static_argnames=("save",))
    solve = lambda x, times: run(  # noqa: E731
        KEY, denoise, x, times, solver=Heun(), process=process
    )
    exact = solve(x, grids.karras(process, 400)).x
    mean, whole = oracle.moments()
    values, vectors = np.linalg.eigh(whole)
    data = GaussianDirections(mean, jnp.asarray(vectors.T), jnp.asarray(values))
    times = grids.karras(process, 18)
    plain = solve(x, times)
    dropped = 10
    start = teleport(process, x, times[0], times[dropped], data)
    short = solve(start, times[dropped:])
    assert short.nfe == plain.nfe - 2 * dropped
    error, other = median_error(plain.x, exact), median_error(short.x, exact)
    assert other <= error
    shrunk = solve(x * times[dropped] / times[0], times[dropped:])
    assert median_error(shrunk.x, exact) > 3 * error


def test_a_schedule_per_pixel_raises():
    process = members.by_name(members.PROCESSES, "per_pixel").process
    data = GaussianDiagonal(jnp.zeros(members.D), jnp.ones(members.D))
    with pytest.raises(ValueError, match="scalar coefficients"):
        teleport(process, jnp.ones((2, members.D)), 0.9, 0.5, data)
