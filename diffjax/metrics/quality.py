"""Plain figures that say whether samples are good, and the baselines a likelihood has to beat.

A Fréchet distance does not say what is wrong. These do: are the samples recognisable
(`recognised_share`), of every class (`class_shares`), and new (`nearest_distance`)? And bits per
dimension mean something only beside simpler models: log2(L) for L levels, which is the uniform
one, and a histogram for each pixel (`histogram_bits_per_dim`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.checks import at_least, in_range, non_negative
from diffjax.core.types import Array


class BitsPerDim(NamedTuple):
    """A mean over images and its standard error, in bits per dimension."""

    mean: float
    standard_error: float


def recognised_share(probabilities: Array, threshold: float = 0.8) -> Array:
    """The share of images whose most probable class has more than `threshold`, () in [0, 1].

    probabilities: (N, K), a classifier's. The class itself need not be right: a sample has none.
    """
    in_range("threshold", threshold, 0.0, 1.0)
    return jnp.mean(jnp.max(probabilities, axis=1) > threshold)


def class_shares(probabilities: Array) -> Array:
    """The share of images that each class wins, (K,), summing to 1. probabilities: (N, K)."""
    return jnp.mean(jax.nn.one_hot(jnp.argmax(probabilities, 1), probabilities.shape[1]), axis=0)


def nearest_distance(samples: Array, train: Array, block: int = 256) -> Array:
    """The mean Euclidean distance from a sample to its nearest training image, ().

    Beside the same figure of held-out images it shows memorising: samples lie closer than new data.

    samples: (N, *data). train: (M, *data), in the same units; integers are read as numbers.
    block: samples compared at once; the largest temporary holds block * M numbers.
    """
    at_least("block", block, 1)
    if samples.shape[1:] != train.shape[1:]:
        raise ValueError(
            f"samples and train must be images of one shape; got {samples.shape} and {train.shape}."
        )
    flat_samples = jnp.asarray(samples).reshape(len(samples), -1).astype(float)
    flat_train = jnp.asarray(train).reshape(len(train), -1).astype(float)
    centre = jnp.mean(flat_train, axis=0)
    flat_samples, flat_train = flat_samples - centre[None], flat_train - centre[None]
    squares = jnp.sum(flat_train**2, axis=1)

    def distance(x):
        # |x - y|^2 = |x|^2 + |y|^2 - 2 x.y ranks the neighbours by one matmul, but loses the small
        # distances, which are the ones that matter: the winner's is taken from the difference.
        inner = jnp.matmul(flat_train, x, precision=jax.lax.Precision.HIGHEST)
        return jnp.linalg.norm(flat_train[jnp.argmin(squares - 2 * inner)] - x)

    return jnp.mean(jax.lax.map(distance, flat_samples, batch_size=block))


def histogram_bits_per_dim(
    train: np.ndarray, heldout: np.ndarray, levels: int, smoothing: float = 1.0
) -> BitsPerDim:
    """Bits per dimension of held-out images under one independent histogram for each pixel.

    With c_d(v) of the M training images showing level v at pixel d, L levels and smoothing a,

        p_d(v) = (c_d(v) + a) / (M + a L).                                                  (1)

    train, heldout: (M, *data) and (N, *data) integers in [0, L - 1], N >= 2. smoothing: a >= 0; at
    0 a level never seen at its pixel costs infinitely many bits. The standard error is over images.
    """
    at_least("levels", levels, 2)
    non_negative("smoothing", smoothing)
    train, heldout = _levels("train", train, levels), _levels("heldout", heldout, levels)
    if train.shape[1] != heldout.shape[1]:
        raise ValueError(
            f"train and heldout must have as many pixels; got {train.shape[1]} and "
            f"{heldout.shape[1]}."
        )
    at_least("the number of held-out images", len(heldout), 2)
    pixels = np.arange(train.shape[1])
    flat = (train + pixels * levels).reshape(-1)
    counts = np.bincount(flat, minlength=train.shape[1] * levels).reshape(-1, levels)
    with np.errstate(divide="ignore"):
        bits = -np.log2((counts + smoothing) / (len(train) + smoothing * levels))
    per_image = bits[pixels, heldout].mean(axis=1)
    if not np.all(np.isfinite(per_image)):
        return BitsPerDim(np.inf, np.inf)
    return BitsPerDim(
        float(per_image.mean()), float(per_image.std(ddof=1) / np.sqrt(len(per_image)))
    )


def _levels(name: str, images: np.ndarray, levels: int) -> np.ndarray:
    """Images of integer levels as (N, D) int64."""
    images = np.asarray(images)
    if not np.issubdtype(images.dtype, np.integer):
        raise TypeError(f"{name} must hold integer levels 0 to {levels - 1}; got {images.dtype}.")
    in_range(f"the lowest level of {name}", images.min(), 0, levels - 1)
    in_range(f"the highest level of {name}", images.max(), 0, levels - 1)
    return images.reshape(len(images), -1).astype(np.int64)
