"""The Fréchet distance against scipy's matrix square root and closed forms."""

import jax
import numpy as np
import pytest
import scipy.linalg

from diffjax.metrics import frechet_distance, gaussian_distance, moments, split_reference


def gaussian(rng, dim, condition=30.0):
    """A mean and a covariance whose eigenvalues span `condition`."""
    basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return rng.normal(size=dim), (basis * np.geomspace(1, condition, dim)) @ basis.T


def by_sqrtm(mean_a, cov_a, mean_b, cov_b):
    """The published formula, with the square root of the non-symmetric product."""
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * np.real(root))


def gathered(features):
    """Moments of features, in two batches."""
    m = moments.zeros(features.shape[1])
    for half in np.array_split(features, 2):
        m = moments.update(m, half)
    return m


def test_features_against_sqrtm(rng):
    a = (rng.normal(size=(400, 12)) @ rng.normal(size=(12, 12)) + 5).astype(np.float32)
    b = (rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12))).astype(np.float32)
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    truth = by_sqrtm(a64.mean(0), np.cov(a64.T), b64.mean(0), np.cov(b64.T))
    np.testing.assert_allclose(frechet_distance(gathered(a), gathered(b)), truth, rtol=1e-6)


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e6])
def test_gaussians_against_sqrtm(rng, condition):
    a, b = gaussian(rng, 16, condition), gaussian(rng, 16, condition)
    np.testing.assert_allclose(gaussian_distance(*a, *b), by_sqrtm(*a, *b), rtol=1e-8)


def test_commuting_covariances(rng):
    """Diagonal in one basis: the sum over axes of (m - m')^2 + (s - s')^2; zeros allowed."""
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    m_a, m_b = rng.normal(size=(2, 6))
    s_a, s_b = np.array([0, 0, 1, 2, 3, 1e3]), np.array([0, 1.5, 0, 2, 0.5, 1e-3])
    distance = gaussian_distance(
        basis @ m_a, (basis * s_a**2) @ basis.T, basis @ m_b, (basis * s_b**2) @ basis.T
    )
    truth = np.sum((m_a - m_b) ** 2) + np.sum((s_a - s_b) ** 2)
    np.testing.assert_allclose(distance, truth, rtol=1e-9)


def test_equal_sets_are_at_distance_zero(rng):
    features = rng.normal(size=(50, 8)).astype(np.float32)
    few = features[:5]  # singular covariance
    assert frechet_distance(gathered(features), gathered(features)) < 1e-12
    assert frechet_distance(gathered(few), gathered(few)) < 1e-12


def test_shift_and_symmetry(rng):
    features = rng.normal(size=(80, 8)).astype(np.float32)
    shift = np.arange(8, dtype=np.float32)
    a, b = gathered(features), gathered(features + shift)
    np.testing.assert_allclose(frechet_distance(a, b), np.sum(shift**2), rtol=1e-5)
    np.testing.assert_allclose(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-12)


def test_split_reference_is_the_bias_between_like_sets(key, rng):
    """Its mean and deviation agree with those of fresh, independent pairs of sets."""
    n, dim = 100, 6
    reference = split_reference(key, rng.normal(size=(5000, dim)).astype(np.float32), n, splits=40)
    fresh = []
    for _ in range(200):
        a, b = rng.normal(size=(2, n, dim))
        fresh.append(by_sqrtm(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)))
    error = np.std(fresh) * np.sqrt(1 / 40 + 1 / 200)
    assert abs(reference.mean - np.mean(fresh)) < 4 * error
    assert 0.6 < reference.std / np.std(fresh, ddof=1) < 1.5


def test_split_halves_are_disjoint(key):
    """With n = N / 2 the halves' means average to the whole's, so their distance is known.

    Features of one dimension that are 0 but for a single 1: one half has it, the other has not.
    """
    features = np.zeros((20, 1), np.float32)
    features[3] = 1.0
    variance = np.var(features[:10], ddof=1)
    reference = split_reference(key, features, 10, splits=5)
    np.testing.assert_allclose(reference.mean, 0.1**2 + variance, rtol=1e-6)
    assert reference.std < 1e-7
    again = split_reference(key, features, 10, splits=5)
    assert again == reference


def test_bad_input(key, rng):
    mean, cov = gaussian(rng, 3)
    with pytest.raises(ValueError, match="at least 2 features; moments b hold 1"):
        frechet_distance(gathered(np.ones((4, 3), np.float32)), one_row())
    with pytest.raises(ValueError, match="positive semi-definite"):
        gaussian_distance(mean, -cov, mean, cov)
    with pytest.raises(ValueError, match="must be finite"):
        gaussian_distance(mean, cov, mean, cov * np.nan)
    with pytest.raises(ValueError, match="need shapes"):
        gaussian_distance(mean, cov, mean[:2], cov)
    with pytest.raises(ValueError, match="Two halves of 6 need 12 features; got 10"):
        split_reference(key, np.ones((10, 2), np.float32), 6)


def one_row():
    """Moments of a single feature vector."""
    return moments.update(moments.zeros(3), jax.numpy.ones((1, 3)))
