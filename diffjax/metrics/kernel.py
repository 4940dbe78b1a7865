"""The kernel distance between two sets of features: KID, in the features of Inception.

Symbols: x_1 .. x_m and y_1 .. y_n are features of F numbers, k a kernel. The unbiased estimate of
the squared maximum mean discrepancy is

    d = sum_{i != j} k(x_i, x_j) / (m(m-1)) + sum_{i != j} k(y_i, y_j) / (n(n-1))
        - 2 sum_{i, j} k(x_i, y_j) / (mn),                                                  (1)

with expectation 0 for sets of one distribution, whatever m and n (so it may be negative), and

    k(x, y) = (gamma <x, y> + c)^p,    gamma = 1/F, c = 1, p = 3                            (2)

in every published KID. Three ways to the number:

- `mmd`: (1) over all pairs, by blocks of rows;
- `in_subsets`: the mean of (1) over random subsets (100 of 1,000, as KID's authors do);
- `in_blocks`: the mean over consecutive blocks that use each feature once, with its standard error
  (at most 1,024 a block, as the code of Song et al. 2021 does). The features must be in random
  order.

A constant added to k drops out of (1). It is used to keep digits: k is taken less its mean over the
pairs (x, y), so what is summed is small.

References: Binkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", 2018,
https://arxiv.org/abs/1801.01401; Gretton et al., "A kernel two-sample test", 2012,
https://jmlr.org/papers/v13/gretton12a.html, lemma 6 (1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.checks import at_least
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, Key, Number
from diffjax.metrics import sums


@pytree
class Polynomial:
    """Eq. (2). degree: p. offset: c. gamma: None for 1/F."""

    offset: Number = 1.0
    gamma: Number | None = None
    degree: int = static(default=3)

    def __call__(self, x: Array, y: Array) -> Array:
        """k of every pair, (m, n). x: (m, F). y: (n, F)."""
        gamma = 1 / x.shape[1] if self.gamma is None else self.gamma
        inner = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
        return (gamma * inner + self.offset) ** self.degree


class KernelDistance(NamedTuple):
    """The mean of eq. (1) over `parts` (K,), their standard deviation, and the mean's error, ().

    The standard error is sqrt(s^2 / K), of parts that share no feature; parts drawn again and again
    from one set are not independent, and there it only says how many draws were enough.
    """

    mean: Array
    std: Array
    stderr: Array
    parts: Array


def mmd(x: Array, y: Array, *, kernel: Polynomial = Polynomial(), block: int = 1024) -> Array:
    """d of eq. (1) over all pairs, (). x: (m, F), y: (n, F), both of at least two rows.

    block: rows whose kernels with a whole set are held at once.
    """
    x, y = _features(x, y)
    at_least("block", block, 1)
    shift = jnp.mean(kernel(x[:block], y[:block]))
    within = [_sum_over_pairs(a, a, kernel, shift, block) for a in (x, y)]
    between = _sum_over_pairs(x, y, kernel, shift, block)
    # The pairs (i, i), which are no pairs, are summed on their own; few of them carry the digits.
    own = [_sum_of_diagonal(a, kernel, shift, block) for a in (x, y)]
    m, n = len(x), len(y)
    terms = [
        (total - diagonal) / size / (size - 1)
        for total, diagonal, size in zip(within, own, (m, n), strict=True)
    ]
    return terms[0] + terms[1] - 2 * between / m / n


def in_subsets(
    key: Key,
    x: Array,
    y: Array,
    *,
    subsets: int = 100,
    size: int = 1000,
    kernel: Polynomial = Polynomial(),
) -> KernelDistance:
    """The mean of (1) over random subsets of `size` rows of each, drawn without replacement.

    Raises ValueError where a set has fewer rows.
    """
    x, y = _features(x, y)
    at_least("subsets", subsets, 1)
    at_least("size", size, 2)
    if size > min(len(x), len(y)):
        raise ValueError(
            f"Subsets of {size} need as many features; got {len(x)} and {len(y)}. Take a smaller "
            "size."
        )
    all_rows = jnp.ones(size, bool)

    def one(index):
        kx, ky = jax.random.split(jax.random.fold_in(key, index))
        chosen = [jax.random.permutation(k, len(a))[:size] for k, a in ((kx, x), (ky, y))]
        return _small(x[chosen[0]], y[chosen[1]], all_rows, all_rows, kernel)

    return _summary(jax.lax.map(one, jnp.arange(subsets)))


def in_blocks(
    x: Array, y: Array, *, max_size: int = 1024, kernel: Polynomial = Polynomial()
) -> KernelDistance:
    """The mean of (1) over ceil(max(m, n) / max_size) consecutive blocks of almost equal sizes.

    Each block is a run of x against a run of y; the later blocks have the rows that do not divide.
    The standard error is NaN for a single block. Raises ValueError where a block would have fewer
    than two rows of a set.
    """
    x, y = _features(x, y)
    at_least("max_size", max_size, 2)
    count = -(-max(len(x), len(y)) // max_size)
    if min(len(x), len(y)) // count < 2:
        raise ValueError(
            f"{count} blocks of {min(len(x), len(y))} features have fewer than two each; take a "
            "larger max_size, or sets of like sizes."
        )
    rows = [_runs(len(a), count) for a in (x, y)]

    def one(places):
        (ix, mask_x), (iy, mask_y) = places
        return _small(x[ix], y[iy], mask_x, mask_y, kernel)

    return _summary(jax.lax.map(one, tuple(rows)))


def _runs(n: int, count: int) -> tuple[Array, Array]:
    """Indices (count, ceil(n / count)) of consecutive runs, and which of them count."""
    short, longer = n // count, n % count
    sizes = jnp.asarray([short] * (count - longer) + [short + 1] * longer)
    offsets = jnp.arange(short + (longer > 0))
    starts = jnp.cumsum(sizes) - sizes
    index = jnp.minimum(starts[:, None] + offsets[None], n - 1)
    return index, offsets[None] < sizes[:, None]


def _small(x: Array, y: Array, mask_x: Array, mask_y: Array, kernel: Polynomial) -> Array:
    """d of eq. (1) by whole matrices, over the rows whose mask is True."""
    wx, wy = mask_x.astype(x.dtype), mask_y.astype(x.dtype)
    m, n = jnp.sum(wx), jnp.sum(wy)
    cross_weights = wx[:, None] * wy[None]
    cross = kernel(x, y)
    shift = jnp.sum(cross_weights * cross) / (m * n)

    def within(a, w):
        weights = w[:, None] * w[None] * (1 - jnp.eye(len(w), dtype=w.dtype))
        size = jnp.sum(w)
        return jnp.sum(weights * (kernel(a, a) - shift)) / (size * (size - 1))

    between = jnp.sum(cross_weights * (cross - shift)) / (m * n)
    return within(x, wx) + within(y, wy) - 2 * between


def _sum_over_pairs(a: Array, b: Array, kernel: Polynomial, shift: Array, block: int) -> Array:
    """sum_{i, j} (k(a_i, b_j) - shift), (), by blocks of rows of a."""

    def of(rows, mask):
        return jnp.sum(jnp.where(mask[:, None], kernel(rows, b) - shift, 0), axis=1)

    return _sum_of_rows(of, a, block)


def _sum_of_diagonal(a: Array, kernel: Polynomial, shift: Array, block: int) -> Array:
    """sum_i (k(a_i, a_i) - shift), ()."""

    def of(rows, mask):
        own = jax.vmap(lambda row: kernel(row[None], row[None])[0, 0])(rows)
        return jnp.where(mask, own - shift, 0)

    return _sum_of_rows(of, a, block)


def _sum_of_rows(of, a: Array, block: int) -> Array:
    """The compensated sum of of(rows, mask) (block,) over blocks of rows of a."""
    block = min(block, len(a))
    count = -(-len(a) // block)
    padded = jnp.pad(a, ((0, count * block - len(a)), (0, 0)))
    mask = jnp.arange(count * block) < len(a)

    def add(total, rows_and_mask):
        return sums.add(total, jnp.sum(of(*rows_and_mask))), None

    blocks = padded.reshape(count, block, -1), mask.reshape(count, block)
    total, _ = jax.lax.scan(add, sums.zero((), a.dtype), blocks)
    return sums.value(total)


def _summary(parts: Array) -> KernelDistance:
    """Mean, deviation and error of the parts."""
    mean = jnp.mean(parts)
    freedom = jnp.asarray(len(parts) - 1, parts.dtype)  # 0 / 0 is NaN
    std = jnp.sqrt(jnp.sum((parts - mean) ** 2) / freedom)
    return KernelDistance(mean, std, std / jnp.sqrt(jnp.asarray(len(parts), parts.dtype)), parts)


def _features(x: Array, y: Array) -> tuple[Array, Array]:
    """Two sets of at least two features of one length, as floats of at least 32 bits."""
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"Two sets of features need shapes (m, F) and (n, F), m and n at least 2; got "
            f"{x.shape} and {y.shape}."
        )
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    return x.astype(dtype), y.astype(dtype)
