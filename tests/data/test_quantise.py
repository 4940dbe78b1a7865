"""The map between levels and the model's range, against brute force and the published formulas."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffjax.core import quantise
from diffjax.core.quantise import Quantisation

RANGES = [(-1.0, 1.0), (0.0, 1.0)]
PLACEMENTS = ["ends", "centres"]


def every_level(levels):
    """256 pixels that hold every level: one shape, so that sweeps over levels compile once."""
    return (np.arange(256) % levels).astype(np.uint8)


def bin_of(x, levels, low, high):
    """The bin that holds x, found among float64 edges: 0 ... levels - 1, else outside."""
    edges = np.linspace(low, high, levels + 1)
    return np.searchsorted(edges, np.asarray(x, np.float64), side="right") - 1


@pytest.mark.parametrize(("ends", "placement"), list(itertools.product(RANGES, PLACEMENTS)))
def test_levels_survive_the_way_there_and_back(ends, placement):
    for levels in range(2, 257):
        k = every_level(levels)
        q = Quantisation(levels, *ends, placement=placement)
        x = q.to_model(k)
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(q.from_model(x), k, err_msg=f"{levels} levels")


def test_ends_are_the_published_scaling():
    k = every_level(256)
    np.testing.assert_allclose(Quantisation().to_model(k), k / 255 * 2 - 1, atol=2e-7)
    np.testing.assert_allclose(Quantisation(low=0.0).to_model(k), k / 255, atol=2e-7)


def test_within_is_the_published_dequantisation(rng):
    k, u = every_level(256), rng.uniform(size=256).astype(np.float32)
    expected = (u + 255 * (k / 255)) / 256
    np.testing.assert_allclose(Quantisation(low=0.0).within(k, u), expected, atol=2e-7)
    np.testing.assert_allclose(Quantisation().within(k, u), 2 * expected - 1, atol=2e-7)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_from_model_picks_the_nearest_level(levels, placement):
    # Points off the ties by 1e-5, also outside of the range, against a search over all levels.
    q = Quantisation(levels, placement=placement)
    x = np.linspace(-1.3, 1.3, 4001, dtype=np.float64)
    points = np.asarray(q.to_model(every_level(levels)), np.float64)[:levels]
    distances = np.sort(np.abs(x[:, None] - points), axis=1)
    x = x[distances[:, 1] - distances[:, 0] > 1e-5]
    nearest = np.argmin(np.abs(x[:, None] - points), axis=1)
    found = q.from_model(x.astype(np.float32))
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, nearest)


@pytest.mark.parametrize("ends", RANGES)
@pytest.mark.parametrize("u", [0.0, 1 - 2**-24], ids=["lowest", "highest"])
def test_dequantised_pixels_stay_in_their_bin(monkeypatch, ends, u):
    # The extreme draws are the ones that rounding could carry away.
    monkeypatch.setattr(quantise, "uniform_like", lambda keys, name, x: jnp.full_like(x, u))
    for levels in range(2, 257):
        q = Quantisation(levels, *ends, placement="centres")
        k = every_level(levels)
        x = q.dequantise(jax.random.key(0), k)
        np.testing.assert_array_equal(bin_of(x, levels, *ends), k, err_msg=f"{levels} levels")
        np.testing.assert_array_equal(q.from_model(x), k, err_msg=f"{levels} levels")


@pytest.mark.parametrize(("levels", "k"), [(256, 200), (17, 0), (17, 16)])
def test_dequantisation_is_uniform(key, levels, k):
    # n = 65,536: the test at 1e-3 rejects a distribution function that is off by 0.0076.
    x = Quantisation(levels).dequantise(key, np.full((4096, 16), k, np.uint8))
    fraction = (np.asarray(x, np.float64) + 1) / 2 * levels - k
    assert scipy.stats.kstest(fraction.ravel(), "uniform").pvalue > 1e-3


def test_dequantisation_is_per_sample(key):
    k = np.zeros((8, 4, 3, 1), np.uint8)
    x = Quantisation(17).dequantise(key, k)
    np.testing.assert_array_equal(Quantisation(17).dequantise(key, k[:3]), x[:3])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(8))
    np.testing.assert_array_equal(Quantisation(17).dequantise(keys[5:6], k[5:6]), x[5:6])
    assert len(np.unique(x)) == x.size


@pytest.mark.parametrize(
    ("q", "offset"),
    [(Quantisation(), -7), (Quantisation(low=0.0), -8), (Quantisation(17), 1 - math.log2(17))],
)
def test_bits_of_a_uniform_model_are_log2_of_the_levels(q, offset):
    np.testing.assert_allclose(q.log2_bin_width(), offset, atol=1e-6)
    log2_density = -math.log2(q.high - q.low)
    np.testing.assert_allclose(-log2_density - q.log2_bin_width(), math.log2(q.levels), atol=1e-6)


def test_the_range_is_traced_and_the_levels_are_not(key):
    traces = []

    @jax.jit
    def back_and_forth(q, k, key):
        traces.append(q.levels)
        return q.from_model(q.to_model(k)), q.from_model(q.dequantise(key, k)), q.log2_bin_width()

    k = np.arange(17, dtype=np.uint8)
    for low in (-1.0, 0.0, -2.5):
        plain, noisy, width = back_and_forth(Quantisation(17, low, placement="centres"), k, key)
        np.testing.assert_array_equal(plain, k)
        np.testing.assert_array_equal(noisy, k)
        np.testing.assert_allclose(width, math.log2((1 - low) / 17), atol=1e-6)
    assert traces == [17]


def test_float64_is_honoured(x64):
    k = every_level(256)
    np.testing.assert_allclose(Quantisation().to_model(k), k / 255 * 2 - 1, atol=1e-15)
    assert Quantisation().dequantise(jax.random.key(0), k).dtype == jnp.float64


def test_half_precision_samples_keep_their_levels():
    q = Quantisation(17, placement="centres")
    k = every_level(17)
    np.testing.assert_array_equal(q.from_model(q.to_model(k).astype(jnp.bfloat16)), k)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"levels": 1}, ValueError, "levels must be at least 2; got 1"),
        ({"levels": 65536}, ValueError, r"levels must lie in \[2, 256\]; got 65536"),
        ({"levels": 17.0}, TypeError, "levels must be an int; got 17.0"),
        ({"low": 1.0}, ValueError, "low must be below high; got 1.0 and 1.0"),
        ({"placement": "edges"}, ValueError, "placement must be one of 'ends', 'centres'"),
    ],
)
def test_bad_fields(arguments, error, words):
    with pytest.raises(error, match=words):
        Quantisation(**arguments)


def test_scaling_twice_raises():
    q = Quantisation()
    with pytest.raises(TypeError, match="integer levels.*float32"):
        q.to_model(q.to_model(every_level(256)))
    with pytest.raises(TypeError, match="floating point; got dtype uint8"):
        q.from_model(every_level(256))
