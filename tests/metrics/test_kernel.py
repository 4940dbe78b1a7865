"""The kernel distance against a double loop over pairs."""

import jax
import numpy as np
import pytest

from diffjax.metrics import kernel
from diffjax.metrics.kernel import Polynomial


def by_loops(x, y, gamma=None, offset=1.0, degree=3):
    """Eq. (1) pair by pair, float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    gamma = 1 / x.shape[1] if gamma is None else gamma

    def k(a, b):
        return (gamma * sum(p * q for p, q in zip(a, b, strict=True)) + offset) ** degree

    def within(a):
        pairs = [k(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j]
        return sum(pairs) / len(pairs)

    between = [k(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(between) / len(between)


def sets(rng, m=31, n=23, dim=5, shift=0.3):
    return (
        rng.normal(size=(m, dim)).astype(np.float32) + 1,
        rng.normal(size=(n, dim)).astype(np.float32) + 1 + np.float32(shift),
    )


@pytest.mark.parametrize("block", [4, 31, 1000])
def test_all_pairs_against_loops(rng, block):
    x, y = sets(rng)
    got = jax.jit(kernel.mmd, static_argnames="block")(x, y, block=block)
    np.testing.assert_allclose(got, by_loops(x, y), rtol=2e-5)


def test_other_kernels(rng):
    x, y = sets(rng)
    got = kernel.mmd(x, y, kernel=Polynomial(offset=0.5, gamma=0.7, degree=2))
    np.testing.assert_allclose(got, by_loops(x, y, 0.7, 0.5, 2), rtol=2e-5)
    # Of degree 1 it is the distance of the means, less its bias: a closed form.
    got = kernel.mmd(x, y, kernel=Polynomial(gamma=1.0, degree=1))
    x, y = x.astype(np.float64), y.astype(np.float64)
    bias = np.trace(np.cov(x.T)) / len(x) + np.trace(np.cov(y.T)) / len(y)
    np.testing.assert_allclose(got, np.sum((x.mean(0) - y.mean(0)) ** 2) - bias, rtol=1e-5)


@pytest.mark.parametrize(("m", "n", "size"), [(31, 23, 10), (20, 20, 10), (9, 9, 10)])
def test_blocks_are_runs_that_use_each_feature_once(rng, m, n, size):
    """As cut by hand: the first blocks are the shorter ones."""
    x, y = sets(rng, m, n)
    got = jax.jit(kernel.in_blocks, static_argnames="max_size")(x, y, max_size=size)
    count = -(-max(m, n) // size)

    def cut(a):
        sizes = [len(a) // count + (b >= count - len(a) % count) for b in range(count)]
        assert sum(sizes) == len(a)
        return np.split(a, np.cumsum(sizes)[:-1])

    want = np.asarray([by_loops(p, q) for p, q in zip(cut(x), cut(y), strict=True)])
    np.testing.assert_allclose(got.parts, want, rtol=1e-4)
    np.testing.assert_allclose(got.mean, want.mean(), rtol=1e-4)
    if count > 1:
        np.testing.assert_allclose(got.stderr, want.std(ddof=1) / np.sqrt(count), rtol=1e-4)
    else:
        assert np.isnan(got.stderr)


def test_subsets_are_without_replacement(key, rng):
    """Subsets of everything are the whole set; smaller ones scatter about it."""
    x, y = sets(rng, 40, 40)
    whole = kernel.in_subsets(key, x, y, subsets=2, size=40)
    np.testing.assert_allclose(whole.parts, by_loops(x, y), rtol=1e-4)
    some = kernel.in_subsets(key, x, y, subsets=400, size=10)
    assert abs(some.mean - by_loops(x, y)) < 4 * some.stderr
    assert len(np.unique(some.parts)) == 400


def test_equal_distributions_are_at_zero_on_average(key, rng):
    """Unbiased: the biased estimate, with the pairs (i, i), would be off by 20 errors."""
    x, y = sets(rng, 2000, 2000, dim=8, shift=0.0)
    found = kernel.in_blocks(x, y, max_size=20)
    assert abs(found.mean) < 4 * found.stderr
    own = np.mean(np.asarray(jax.vmap(lambda a: Polynomial()(a[None], a[None])[0, 0])(x)))
    assert 2 * (own - 8) / 20 > 5 * found.stderr


def test_digits_survive_a_large_constant(rng):
    """k near 5e5 and a distance of order 1: float32 within 2 % of float64."""
    x, y = (rng.normal(size=(200, 6)).astype(np.float32) + 8 for _ in range(2))
    y = y + np.float32(0.05)
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    k = {name: (a @ b.T / 6 + 1) ** 3 for name, a, b in
         (("xx", x64, x64), ("yy", y64, y64), ("xy", x64, y64))}  # fmt: skip
    off = 1 - np.eye(200)
    pairs = 200 * 199
    want = (k["xx"] * off).sum() / pairs + (k["yy"] * off).sum() / pairs - 2 * k["xy"].mean()
    assert k["xy"].mean() > 1e5
    np.testing.assert_allclose(kernel.mmd(x, y, block=64), want, rtol=0.02)


def test_bad_input(key, rng):
    x, y = sets(rng)
    with pytest.raises(ValueError, match=r"shapes \(m, F\) and \(n, F\)"):
        kernel.mmd(x, y[:, :3])
    with pytest.raises(ValueError, match="Subsets of 24 need as many features; got 31 and 23"):
        kernel.in_subsets(key, x, y, size=24)
    with pytest.raises(ValueError, match="8 blocks of 9 features have fewer than two each"):
        kernel.in_blocks(x, y[:9], max_size=4)
