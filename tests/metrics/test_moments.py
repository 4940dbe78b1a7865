"""Streamed moments against float64 NumPy on the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffjax.metrics import moments

DIM = 5
update = jax.jit(moments.update)
merge = jax.jit(moments.merge)


def offset_features(rng, n, offset=1e4):
    """Correlated features, standard deviations 0.5 to 2, far from zero; float32."""
    mixing = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0] * np.geomspace(0.5, 2, DIM)
    return (offset + rng.normal(size=(n, DIM)) @ mixing).astype(np.float32)


def assert_exact(m, features, tolerance=1e-6):
    """Mean within `tolerance` standard deviations, covariance entries within it of s_i s_j.

    The truth is taken about the first row, or float64 itself would lose digits to the offset.
    """
    origin = np.asarray(features[0], np.float64)
    residuals = np.asarray(features, np.float64) - origin
    std = residuals.std(axis=0, ddof=1)
    gap = np.asarray(m.mean.hi, np.float64) - origin + np.asarray(m.mean.lo, np.float64)
    assert int(m.count) == len(features)
    assert np.max(np.abs(gap - residuals.mean(axis=0)) / std) < tolerance
    gap = np.asarray(moments.cov(m), np.float64) - np.cov(residuals.T)
    assert np.max(np.abs(gap) / np.outer(std, std)) < tolerance


def stream(features, sizes):
    """Feeds the features in batches whose sizes repeat."""
    m, start, i = moments.zeros(DIM), 0, 0
    while start < len(features):
        size = sizes[i % len(sizes)]
        m = update(m, features[start : start + size])
        start, i = start + size, i + 1
    return m


@pytest.mark.parametrize("sizes", [(4001,), (7, 64, 1, 33), (400, 201)], ids=str)
def test_offset_features_in_any_batches(rng, sizes):
    features = offset_features(rng, 4001)
    assert_exact(stream(features, sizes), features)


def test_unlike_batches(rng):
    """The first batch is no guide to the others: the means of the batches lie 1e3 apart."""
    features = offset_features(rng, 3000) + np.repeat(
        rng.normal(scale=1e3, size=(30, DIM)), 100, 0
    ).astype(np.float32)
    assert_exact(stream(features, (100,)), features)


def test_long_streams_do_not_drift(rng):
    """40,000 batches of 8 in one scan; plain float32 sums lose a hundred times the tolerance."""
    features = offset_features(rng, 320_000, offset=3.0)
    batches = features.reshape(-1, 8, DIM)
    scan = jax.jit(
        lambda x: jax.lax.scan(lambda m, f: (moments.update(m, f), None), moments.zeros(DIM), x)[0]
    )
    assert_exact(scan(batches), features)
    squares = np.square(features[:, 0] - features[:, 0].mean())
    plain = np.add.accumulate(squares)[-1] / (len(squares) - 1)  # one float32 sum after another
    truth = features[:, 0].astype(np.float64).var(ddof=1)
    assert abs(plain - truth) / truth > 5e-6


def test_merge_in_any_order(rng):
    features = offset_features(rng, 900)
    a, b, c = (stream(f, (37,)) for f in np.split(features, [100, 350]))
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(merge(c, a), b)):
        assert_exact(merged, features)


def test_nothing_is_neutral(rng):
    features = offset_features(rng, 50)
    m, empty = stream(features, (50,)), moments.zeros(DIM)
    nothing = update(m, np.full((3, DIM), np.nan, np.float32), np.zeros(3, bool))
    for same in (merge(m, empty), nothing):
        jax.tree.map(np.testing.assert_array_equal, same, m)
    assert_exact(merge(empty, m), features)


def test_merge_keeps_the_low_halves():
    """Of both sides: 1e4 + 3e-4 and 1 + 3e-6 are not float32 numbers."""
    low = jnp.full((DIM, DIM), 3e-6)
    one = moments.Moments(
        jnp.int32(9),
        moments.Pair(jnp.full(DIM, 1e4), jnp.full(DIM, 3e-4)),
        moments.Pair(jnp.ones((DIM, DIM)), low),
    )
    twice = merge(one, one)
    for pair, total in ((twice.mean, 1e4 + 3e-4), (twice.scatter, 2 + 6e-6)):
        got = np.asarray(pair.hi, np.float64) + np.asarray(pair.lo, np.float64)
        np.testing.assert_allclose(got, total, rtol=1e-10)


def test_masked_rows_do_not_count(rng):
    features = offset_features(rng, 65)
    mask = rng.random(65) < 0.6
    padded = np.where(mask[:, None], features, np.nan)
    assert_exact(update(moments.zeros(DIM), padded, mask), features[mask])


def test_sharded_is_unsharded(rng):
    features = offset_features(rng, 1600)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    m = moments.zeros(DIM)
    for half in np.split(features, 2):
        m = update(m, jax.device_put(half, split))
    assert_exact(m, features)


def test_mean_and_cov_are_of_device_precision(rng):
    features = rng.normal(size=(200, DIM)).astype(np.float32)
    m = stream(features, (32,))
    np.testing.assert_allclose(moments.mean(m), features.astype(np.float64).mean(0), atol=1e-7)
    one = update(moments.zeros(DIM), features[:1])
    np.testing.assert_array_equal(moments.mean(one), features[0])
    assert np.all(np.isnan(moments.cov(one)))


def test_float64(x64, rng):
    features = 1e6 + rng.normal(size=(501, DIM))
    m = moments.zeros(DIM)
    for batch in np.split(features, [100, 317]):
        m = update(m, batch)
    assert moments.cov(m).dtype == np.float64
    assert_exact(m, features, tolerance=1e-13)


def test_half_precision_features_are_summed_in_float32(rng):
    features = jnp.asarray(rng.normal(size=(3000, DIM)), jnp.bfloat16)
    assert_exact(update(moments.zeros(DIM), features), np.asarray(features, np.float64))


def test_bad_input():
    m = moments.zeros(DIM)
    with pytest.raises(ValueError, match=r"shape \(B, 5\); got \(3, 4\)"):
        moments.update(m, jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="mask must be bool"):
        moments.update(m, jnp.zeros((3, DIM)), jnp.ones(3))
    with pytest.raises(ValueError, match="dim must be at least 1"):
        moments.zeros(0)
