"""Shares, nearest neighbours and the histogram model against brute force and hand counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from diffjax.metrics import (
    class_shares,
    histogram_bits_per_dim,
    nearest_distance,
    recognised_share,
)


def test_shares_by_hand():
    probabilities = jnp.array([[0.9, 0.1, 0.0], [0.3, 0.7, 0.0], [0.05, 0.1, 0.85], [1.0, 0, 0]])
    assert recognised_share(probabilities) == 0.75
    assert recognised_share(probabilities, threshold=0.95) == 0.25
    np.testing.assert_allclose(class_shares(probabilities), [0.5, 0.25, 0.25])


@pytest.mark.parametrize("block", [1, 7, 256])
def test_nearest_distance_is_brute_force(rng, block):
    samples, train = rng.uniform(-1, 1, (45, 4, 3, 2)), rng.uniform(-1, 1, (101, 4, 3, 2))
    truth = cdist(samples.reshape(45, -1), train.reshape(101, -1)).min(axis=1).mean()
    np.testing.assert_allclose(nearest_distance(samples, train, block=block), truth, rtol=1e-6)


def test_small_distances_survive_far_images(rng):
    """Memorised images 1e-3 from their originals among images of size 1e2."""
    train = rng.normal(scale=100, size=(200, 8, 8, 1)).astype(np.float32)
    samples = train[:50] + np.float32(1 / 1024)
    truth = cdist(samples.reshape(50, -1), train.reshape(200, -1)).min(axis=1).mean()
    np.testing.assert_allclose(nearest_distance(samples, train), truth, rtol=1e-3)
    assert nearest_distance(train[:50], train) == 0


def test_nearest_distance_of_uint8(rng):
    samples, train = rng.integers(0, 256, (2, 20, 5, 5, 3)).astype(np.uint8)
    truth = cdist(samples.reshape(20, -1).astype(float), train.reshape(20, -1)).min(axis=1).mean()
    np.testing.assert_allclose(nearest_distance(samples, train), truth, rtol=1e-6)


def test_nearest_distance_keeps_to_its_block():
    """Twice the samples need no twice the memory beyond the flattened samples themselves."""

    def temporary(n):
        images = [jax.ShapeDtypeStruct((m, 2, 2, 1), np.float32) for m in (n, 4096)]
        compiled = jax.jit(lambda a, b: nearest_distance(a, b, block=32)).lower(*images).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(2048) - temporary(1024) < 0.1 * 1024 * 4096 * 4


def test_histogram_by_hand():
    """Two pixels, three levels, M = 4, a = 1/2: every probability is a count over 5.5."""
    train = np.array([[0, 2], [0, 2], [1, 2], [0, 2]])
    heldout = np.array([[0, 2], [2, 0]])
    first = -(np.log2(3.5 / 5.5) + np.log2(4.5 / 5.5)) / 2
    second = -2 * np.log2(0.5 / 5.5) / 2
    bits = histogram_bits_per_dim(train, heldout, 3, smoothing=0.5)
    np.testing.assert_allclose(bits.mean, (first + second) / 2, rtol=1e-12)
    np.testing.assert_allclose(bits.standard_error, abs(first - second) / 2, rtol=1e-12)


def test_histogram_reaches_the_entropy_of_independent_pixels(rng):
    """On held-out data of known law: no better than the entropy, and close to it."""
    levels, pixels = 5, 12
    law = rng.dirichlet(np.ones(levels), size=pixels)
    entropy = -np.mean(np.sum(law * np.log2(law), axis=1))
    draw = np.stack([rng.choice(levels, size=40_000, p=p) for p in law], axis=1)
    bits = histogram_bits_per_dim(draw[:20_000].reshape(-1, 3, 4, 1), draw[20_000:], levels)
    assert abs(bits.mean - entropy) < 4 * bits.standard_error
    assert 5e-4 < bits.standard_error < 5e-3


def test_histogram_is_the_best_of_its_kind_on_its_own_data(rng):
    """Without smoothing, on the training images, it attains the empirical entropy: the optimum."""
    train = rng.integers(0, 4, (50, 6)) // rng.integers(1, 4, 6)
    shares = np.stack([np.mean(train == v, axis=0) for v in range(4)])
    logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    entropy = -np.mean(np.sum(shares * logs, axis=0))
    exact = histogram_bits_per_dim(train, train, 4, smoothing=0.0)
    np.testing.assert_allclose(exact.mean, entropy, rtol=1e-12)
    assert histogram_bits_per_dim(train, train, 4, smoothing=1.0).mean > exact.mean


def test_heavy_smoothing_is_the_uniform_model(rng):
    images = rng.integers(0, 17, (20, 8, 8, 1))
    bits = histogram_bits_per_dim(images, images, 17, smoothing=1e12)
    np.testing.assert_allclose(bits.mean, np.log2(17), rtol=1e-9)


def test_an_unseen_level_without_smoothing_costs_infinity():
    bits = histogram_bits_per_dim(np.zeros((3, 4), int), np.ones((2, 4), int), 2, smoothing=0.0)
    assert bits.mean == np.inf


def test_bad_input():
    levels = np.zeros((3, 4), np.uint8)
    with pytest.raises(TypeError, match="integer levels 0 to 16"):
        histogram_bits_per_dim(levels.astype(float), levels, 17)
    with pytest.raises(ValueError, match=r"level of heldout must lie in \[0, 16\]; got 17"):
        histogram_bits_per_dim(levels, levels + 17, 17)
    with pytest.raises(ValueError, match="as many pixels; got 4 and 3"):
        histogram_bits_per_dim(levels, levels[:, :3], 17)
    with pytest.raises(ValueError, match="one shape"):
        nearest_distance(jnp.zeros((2, 4, 4, 1)), jnp.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="threshold"):
        recognised_share(jnp.ones((2, 2)) / 2, threshold=80)
