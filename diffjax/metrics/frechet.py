"""The Fréchet distance between two sets of features, each taken as a Gaussian.

Symbols: m_a, C_a and m_b, C_b are the means and covariances of two sets of F-dimensional features.
The squared 2-Wasserstein distance between the two Gaussians, which is what every published "FID"
reports (no root is taken), is

    d^2 = ||m_a - m_b||^2 + Tr C_a + Tr C_b - 2 Tr (C_a^{1/2} C_b C_a^{1/2})^{1/2}.         (1)

The last trace is the sum of the singular values of a product of symmetric roots,

    Tr (C_a^{1/2} C_b C_a^{1/2})^{1/2} = || C_a^{1/2} C_b^{1/2} ||_*,                       (2)

and (2) is how it is computed: the roots by symmetric eigenvalues and nothing squared in between, so
no complex root of a non-symmetric product appears and singular covariances need no jitter.

Three things to know before quoting a number:
- The estimate is biased upwards by about a term in 1/n, so compare equal counts only, and hold the
  number against `split_reference`, which is the same bias between two sets of real data.
- With n <= F the covariance is singular. (1) is then still exact for the given covariances, but the
  bias is of the order of the distance: take fewer features or more images.
- Only features of the published Inception network give a FID; any other is a Fréchet distance in
  the features of that network.

References: Dowson, Landau, "The Fréchet distance between multivariate normal distributions", 1982,
https://doi.org/10.1016/0047-259X(82)90077-X (1); Heusel, Ramsauer, Unterthiner, Nessler,
Hochreiter, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium",
2017, https://arxiv.org/abs/1706.08500.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.checks import at_least
from diffjax.core.types import Array, Key
from diffjax.metrics.moments import Moments, update, zeros
from diffjax.metrics.sums import float64


class SplitReference(NamedTuple):
    """Distances between halves of one data set: their mean and standard deviation over splits."""

    mean: float
    std: float


def frechet_distance(a: Moments, b: Moments) -> float:
    """d^2 of eq. (1) between two sets, from their streamed moments, in float64 on the host.

    Raises ValueError for fewer than two features in a set.
    """
    return gaussian_distance(*gaussian("a", a), *gaussian("b", b))


def gaussian_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """d^2 of eq. (1) between two Gaussians; never below 0.

    mean_a, mean_b: (F,). cov_a, cov_b: (F, F), symmetric and positive semi-definite; singular ones
    are exact, negative eigenvalues within rounding of float32 sums count as 0. Raises ValueError
    for other shapes, for numbers that are not finite and for matrices that are no covariance.
    """
    mean_a, mean_b = np.asarray(mean_a, np.float64), np.asarray(mean_b, np.float64)
    cov_a, cov_b = np.asarray(cov_a, np.float64), np.asarray(cov_b, np.float64)
    shapes = [x.shape for x in (mean_a, cov_a, mean_b, cov_b)]
    if mean_a.ndim != 1 or shapes != [mean_a.shape, 2 * mean_a.shape] * 2:
        raise ValueError(f"Two Gaussians need shapes (F,), (F, F), (F,), (F, F); got {shapes}.")
    overlap = np.linalg.svd(_root("cov_a", cov_a) @ _root("cov_b", cov_b), compute_uv=False).sum()
    between = np.sum((mean_a - mean_b) ** 2)
    return float(max(between + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap, 0.0))


def split_reference(key: Key, features: Array, n: int, splits: int = 10) -> SplitReference:
    """The distance between real and real: the yardstick for a distance from n samples to n images.

    Each split draws 2n of the features without replacement and measures one half against the other.

    features: (N, F), real, N >= 2n; all of one kind (the images that trained the feature network
    and others that did not are two kinds). n: features a half. splits: at least 2.
    """
    at_least("n", n, 2)
    at_least("splits", splits, 2)
    total, dim = features.shape
    if 2 * n > total:
        raise ValueError(f"Two halves of {n} need {2 * n} features; got {total}. Take a smaller n.")

    def halves(split):
        order = jax.random.permutation(jax.random.fold_in(key, split), total)[: 2 * n]
        sides = jnp.asarray(features)[order.reshape(2, n)]
        return jax.vmap(lambda half: update(zeros(dim), half))(sides)

    moments = jax.device_get(jax.jit(lambda: jax.lax.map(halves, jnp.arange(splits)))())
    a, b = (jax.tree.map(lambda leaf, side=side: leaf[:, side], moments) for side in (0, 1))
    distances = [
        frechet_distance(*(jax.tree.map(lambda leaf, i=i: leaf[i], half) for half in (a, b)))
        for i in range(splits)
    ]
    return SplitReference(float(np.mean(distances)), float(np.std(distances, ddof=1)))


def gaussian(name: str, moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Mean (F,) and unbiased covariance (F, F) in float64, which keeps both halves of a Pair.

    Raises ValueError, naming the moments, for fewer than two features.
    """
    count = int(moments.count)
    if count < 2:
        raise ValueError(f"A covariance needs at least 2 features; moments {name} hold {count}.")
    return float64(moments.mean), float64(moments.scatter) / (count - 1)


def _root(name: str, cov: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance; what is within rounding of no variance gets 0."""
    if not np.all(np.isfinite(cov)):
        raise ValueError(f"{name} must be finite; it holds NaN or infinity.")
    values, vectors = np.linalg.eigh(0.5 * (cov + cov.T))
    scale = np.abs(values).max(initial=0.0)
    asymmetry = np.abs(cov - cov.T).max(initial=0.0)
    if max(-values[0], asymmetry) > 1e-4 * scale:
        raise ValueError(
            f"{name} must be symmetric and positive semi-definite; its lowest eigenvalue is "
            f"{values[0]:.3g}, its largest {scale:.3g}, its asymmetry {asymmetry:.3g}."
        )
    floor = len(values) * np.finfo(np.float64).eps * scale
    roots = np.sqrt(np.where(values > floor, values, 0.0))
    return (vectors * roots) @ vectors.T
