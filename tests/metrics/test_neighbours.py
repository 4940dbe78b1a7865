"""Precision, recall, density and coverage against every distance, pair by pair."""

import functools

import jax
import numpy as np
import pytest

from diffjax.metrics import neighbours as room

neighbours = jax.jit(room.compare, static_argnames=("k", "k_density", "block"))


def distance(a, b):
    return np.sqrt(np.sum((a.astype(np.float64) - b.astype(np.float64)) ** 2))


def radius(points, i, k):
    """The k-th smallest distance from a point to the others."""
    return sorted(distance(points[i], q) for j, q in enumerate(points) if j != i)[k - 1]


def brute_force(real, drawn, k, k_density):
    """The definitions, by loops."""
    near, far = ([radius(real, i, kk) for i in range(len(real))] for kk in (k, k_density))
    own = [radius(drawn, j, k) for j in range(len(drawn))]
    d = np.asarray([[distance(x, y) for y in drawn] for x in real])
    inside = d <= np.asarray(far)[:, None]
    return {
        "precision": np.mean([any(d[i, j] <= near[i] for i in range(len(real)))
                              for j in range(len(drawn))]),
        "recall": np.mean([any(d[i, j] <= own[j] for j in range(len(drawn)))
                           for i in range(len(real))]),
        "density": inside.sum() / (k_density * len(drawn)),
        "coverage": inside.any(axis=1).mean(),
    }  # fmt: skip


def sets(rng, m=60, n=45, dim=3, offset=0.0):
    """Two overlapping clouds of unlike widths, so that the four figures differ."""
    return (
        (offset + rng.normal(size=(m, dim))).astype(np.float32),
        (offset + 0.4 + 0.7 * rng.normal(size=(n, dim))).astype(np.float32),
    )


@pytest.mark.parametrize("block", [7, 45, 500])
@pytest.mark.parametrize(("k", "k_density"), [(3, 5), (1, 2)])
def test_against_brute_force(rng, block, k, k_density):
    real, drawn = sets(rng)
    got = neighbours(real, drawn, k=k, k_density=k_density, block=block)
    want = brute_force(real, drawn, k, k_density)
    assert len(set(want.values())) == 4  # else the test could not tell them apart
    np.testing.assert_allclose(got, [want[name] for name in got._fields], rtol=1e-6)


def test_far_from_zero(rng):
    """Distances come from a difference of squares; taken about the mean it keeps its digits."""
    real, drawn = sets(rng, offset=1e3)
    got, want = neighbours(real, drawn), brute_force(real, drawn, 3, 5)
    np.testing.assert_allclose(got, [want[name] for name in got._fields], rtol=1e-6)


def test_radii_leave_the_point_itself_out(rng):
    x = rng.normal(size=(20, 2)).astype(np.float32)
    x[7] = x[3]  # a duplicate is another point, at distance 0
    got = np.sqrt(np.asarray(room.squared_radii(x, (1, 4), block=6)))
    for row, k in zip(got, (1, 4), strict=True):
        np.testing.assert_allclose(row, [radius(x, i, k) for i in range(20)], atol=1e-3)
    assert got[0, 3] < 1e-3 < got[0, 0]


def test_disjoint_and_equal_sets(rng):
    real, _ = sets(rng)
    np.testing.assert_array_equal(neighbours(real, real + 100), [0, 0, 0, 0])
    same = neighbours(real, real)
    np.testing.assert_array_equal([same.precision, same.recall, same.coverage], [1, 1, 1])
    # Each ball holds its own centre and k others.
    np.testing.assert_allclose(same.density, 6 / 5, rtol=0.05)


def test_expectations_for_one_distribution(key):
    """Density 1 and the published coverage, over 60 pairs of sets, within 4 standard errors."""
    m, n, k = 40, 30, 5

    def one(key):
        x, y = jax.random.normal(key, (2, m, 2))
        return room.compare(x, y[:n], k_density=k)

    found = jax.jit(functools.partial(jax.lax.map, one))(jax.random.split(key, 60))
    i = np.arange(k)
    coverage = 1 - np.prod((m - 1 - i) / (m - 1 + n - i))
    for values, want in ((found.density, 1.0), (found.coverage, coverage)):
        values = np.asarray(values)
        error = values.std(ddof=1) / np.sqrt(60)
        assert abs(values.mean() - want) < 4 * error < 0.1


def test_bad_input(rng):
    real, drawn = sets(rng)
    with pytest.raises(ValueError, match=r"shapes \(M, F\) and \(N, F\)"):
        room.compare(real, drawn[:, :2])
    with pytest.raises(ValueError, match="number of real features must be at least 6; got 5"):
        room.compare(real[:5], drawn)
    with pytest.raises(ValueError, match="number of generated features must be at least 4; got 3"):
        room.compare(real, drawn[:3])
