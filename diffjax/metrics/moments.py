"""Mean and covariance of a stream of features, as exact in float32 as one float64 pass.

Symbols: f_1 .. f_n are feature vectors of F numbers, n their count, m their mean, and
S = sum_i (f_i - m)(f_i - m)^T their scatter, so that the unbiased covariance is

    C = S / (n - 1).                                                                        (1)

Two disjoint sets a and b, with d = m_b - m_a and n = n_a + n_b, merge by

    m = m_a + d n_b / n,        S = S_a + S_b + d d^T n_a n_b / n.                          (2)

A batch is summarised about its own mean and merged by (2), so every term of S is positive
semi-definite and nothing cancels, however far the features lie from zero. Long streams lose digits
by rounding the running sums instead; so m and S are `sums.Pair`s, which keep the rounding errors.
What remains is the rounding inside one batch, so the result does not depend on how the stream was
cut. Measured against float64 on features of mean 1e4 and standard deviations near 1: 1e-8 standard
deviations in m, and 3e-7 s_i s_j in C_ij, also after 40,000 batches.

    moments = zeros(64)
    for batch in stream:
        moments = update(moments, features(batch))     # jit, scan and shard it as you like
    m, C = mean(moments), cov(moments)

References: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979, http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf (2).
"""

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.core.checks import at_least
from diffjax.core.pytree import pytree
from diffjax.core.types import Array
from diffjax.metrics.sums import Pair, add, two_sum, value, zero


@pytree
class Moments:
    """The sufficient statistics of a set of feature vectors, eqs. (1) and (2).

    count: () int32, n. mean: m, a Pair of (F,). scatter: S, a Pair of (F, F).
    """

    count: Array
    mean: Pair
    scatter: Pair


def zeros(dim: int, dtype: Any = float) -> Moments:
    """The moments of no features at all. dim: F >= 1. dtype: of the sums (JAX's default float)."""
    at_least("dim", dim, 1)
    return Moments(jnp.zeros((), jnp.int32), zero((dim,), dtype), zero((dim, dim), dtype))


def update(moments: Moments, features: Array, mask: Array | None = None) -> Moments:
    """The moments with one more batch in them.

    features: (B, F), cast to the dtype of the sums. mask: (B,) bool, True where a row counts; the
    content of the other rows (padding) is of no matter. None counts every row.
    """
    dim = moments.mean.hi.shape[-1]
    features = jnp.asarray(features)
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"features must have shape (B, {dim}); got {features.shape}.")
    if mask is None:
        mask = jnp.ones(features.shape[0], bool)
    if mask.shape != features.shape[:1] or mask.dtype != bool:
        raise ValueError(
            f"mask must be bool of shape ({features.shape[0]},); got {mask.dtype} {mask.shape}."
        )
    return merge(moments, _of_batch(features.astype(moments.mean.hi.dtype), mask))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the union of two disjoint sets, eq. (2): of two hosts, say."""
    dtype = a.mean.hi.dtype
    count = a.count + b.count
    share = b.count.astype(dtype) / jnp.maximum(count, 1).astype(dtype)
    d, d_error = two_sum(b.mean.hi, -a.mean.hi)
    d_error = d_error + (b.mean.lo - a.mean.lo)
    mean = add(add(a.mean, d * share), d_error * share)
    between = jnp.outer(d + d_error, d + d_error) * (a.count.astype(dtype) * share)
    scatter = add(add(a.scatter, b.scatter.hi), between + b.scatter.lo)
    return Moments(count, mean, scatter)


def mean(moments: Moments) -> Array:
    """m, (F,); zeros where nothing has been counted."""
    return value(moments.mean)


def cov(moments: Moments) -> Array:
    """C, (F, F), the unbiased covariance of eq. (1); NaN below two features."""
    scatter = value(moments.scatter)
    freedom = (moments.count - 1).astype(scatter.dtype)
    return jnp.where(freedom > 0, scatter / jnp.maximum(freedom, 1), jnp.nan)


def _of_batch(features: Array, mask: Array) -> Moments:
    """The moments of one batch, in two passes: about a rough mean, then about the corrected one."""
    count = jnp.sum(mask, dtype=jnp.int32)
    n = jnp.maximum(count, 1).astype(features.dtype)
    keep = mask[:, None]
    rough = jnp.sum(jnp.where(keep, features, 0), axis=0) / n
    # Neighbouring floats subtract exactly, so these residuals are as good as the features are.
    residuals = jnp.where(keep, features - rough[None], 0)
    correction = jnp.sum(residuals, axis=0) / n
    residuals = jnp.where(keep, residuals - correction[None], 0)
    # Accelerators round the factors of a default matmul to 10 bits or fewer.
    scatter = jnp.matmul(residuals.T, residuals, precision=jax.lax.Precision.HIGHEST)
    return Moments(count, Pair(*two_sum(rough, correction)), Pair(scatter, jnp.zeros_like(scatter)))
