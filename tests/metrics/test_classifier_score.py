"""The Inception Score's sums against NumPy on all probabilities at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import log_softmax, rel_entr, softmax

from diffjax.metrics import classifier_score as cs

CLASSES = 11
update = jax.jit(cs.update)


def by_numpy(logits, splits):
    """exp of the mean divergence from the marginal, a split; SciPy's p ln(p/m)."""
    scores = []
    for part in np.array_split(softmax(logits.astype(np.float64), axis=1), splits):
        scores.append(np.exp(rel_entr(part, part.mean(axis=0)[None]).sum(axis=1).mean()))
    return np.asarray(scores)


def stream(logits, sizes, splits, total=None):
    """Feeds the logits in batches whose sizes repeat; contiguous splits."""
    sums, start, i = cs.zeros(CLASSES, splits), 0, 0
    while start < len(logits):
        size = sizes[i % len(sizes)]
        part = logits[start : start + size]
        index = start + np.arange(len(part))
        sums = update(sums, part, cs.contiguous(index, total or len(logits), splits))
        start, i = start + size, i + 1
    return sums


@pytest.mark.parametrize(("splits", "sizes"), [(1, (500,)), (1, (7, 64, 1)), (10, (33, 100))])
def test_against_numpy(rng, splits, sizes):
    logits = 3 * rng.normal(size=(500, CLASSES)).astype(np.float32)
    got, want = cs.score(stream(logits, sizes, splits)), by_numpy(logits, splits)
    np.testing.assert_allclose(got.splits, want, rtol=2e-6)
    np.testing.assert_allclose([got.mean, got.std], [want.mean(), want.std()], rtol=1e-5, atol=1e-6)


def test_ends_of_the_scale():
    """Sure and even over K classes: K. All alike: 1. Logits of -inf are probabilities of 0."""
    sure = np.where(np.eye(CLASSES, dtype=bool), 0.0, -np.inf).astype(np.float32)
    np.testing.assert_allclose(cs.score(update(cs.zeros(CLASSES), sure)).mean, CLASSES, rtol=1e-6)
    alike = np.tile(np.arange(CLASSES, dtype=np.float32), (9, 1))
    np.testing.assert_allclose(cs.score(update(cs.zeros(CLASSES), alike)).mean, 1.0, rtol=1e-6)


def test_splits_are_equal_runs():
    """Of 50,000 in 10 and of 7 in 3, as cut points of i * n // S; no overflow in 32 bits."""
    index = np.arange(50_000)
    split = np.asarray(cs.contiguous(index, 50_000, 10))
    np.testing.assert_array_equal(split, index // 5_000)
    np.testing.assert_array_equal(cs.contiguous(np.arange(8), 7, 3), [0, 0, 1, 1, 2, 2, 2, 2])
    far = np.asarray([0, 999_999_999, 1_000_000_000, 1_999_999_999])
    np.testing.assert_array_equal(cs.contiguous(far, 2_000_000_000, 2), [0, 0, 1, 1])


def test_merge_over_shards_is_the_whole(rng):
    logits = rng.normal(size=(300, CLASSES)).astype(np.float32)
    whole = stream(logits, (300,), 3)
    parts = []
    for start in (0, 100, 200):
        index = start + np.arange(100)
        parts.append(update(cs.zeros(CLASSES, 3), logits[index], cs.contiguous(index, 300, 3)))
    for order in ((0, 1, 2), (2, 0, 1)):
        a, b, c = (parts[i] for i in order)
        merged = cs.merge(a, cs.merge(b, c))
        np.testing.assert_array_equal(merged.count, whole.count)
        np.testing.assert_allclose(cs.score(merged).splits, cs.score(whole).splits, rtol=1e-6)


def test_sharded_is_unsharded(rng):
    logits = rng.normal(size=(64, CLASSES)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data")))
    got = cs.score(update(cs.zeros(CLASSES), split)).mean
    np.testing.assert_allclose(got, by_numpy(logits, 1)[0], rtol=1e-6)


def test_masked_rows_do_not_count(rng):
    logits = rng.normal(size=(40, CLASSES)).astype(np.float32)
    mask = rng.random(40) < 0.5
    padded = np.where(mask[:, None], logits, np.nan)
    got = cs.score(update(cs.zeros(CLASSES), padded, None, mask)).mean
    np.testing.assert_allclose(got, by_numpy(logits[mask], 1)[0], rtol=1e-6)


def test_long_streams_do_not_drift(rng):
    """40,000 batches of 4: plain float32 sums lose a hundred times the tolerance."""
    logits = rng.normal(size=(40_000, 4, 3)).astype(np.float32)

    def scan(x):
        return jax.lax.scan(lambda s, part: (cs.update(s, part), None), cs.zeros(3), x)[0]

    sums = jax.jit(scan)(logits)
    log_p = log_softmax(logits.reshape(-1, 3).astype(np.float64), axis=1)
    terms = np.sum(np.exp(log_p) * log_p, axis=1)
    got = np.float64(sums.plogp.hi[0]) + np.float64(sums.plogp.lo[0])
    assert abs(got / terms.sum() - 1) < 1e-7
    naive = np.add.accumulate(terms.reshape(-1, 4).sum(axis=1).astype(np.float32))[-1]
    assert abs(naive / terms.sum() - 1) > 5e-6


def test_bad_input():
    sums = cs.zeros(CLASSES, 2)
    with pytest.raises(ValueError, match=r"shape \(B, 11\); got \(3, 4\)"):
        cs.update(sums, jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="mask must have shape"):
        cs.update(sums, jnp.zeros((3, CLASSES)), None, jnp.ones(2, bool))
    with pytest.raises(ValueError, match=r"Every split needs a sample; the splits hold \[0, 0\]"):
        cs.score(sums)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        cs.zeros(1)
