"""The Inception Score of a stream of logits: are samples clear, and of many classes?

Symbols: p_i(y) = softmax(l_i)_y, the class probabilities of sample i from its logits l_i, over K
classes; n samples in a split; m(y) their mean probability. The score of a split is

    m(y) = 1/n sum_i p_i(y),                                                                (1)
    ln IS = 1/n sum_i sum_y p_i(y) ln p_i(y)  -  sum_y m(y) ln m(y),                        (2)

between 1 and K: the mean divergence of p_i from m. Both terms are sums over samples, so (2) is
exact from a stream, whatever its batches. Sums are kept with their rounding errors
(`metrics.sums`), for each of S splits; the reported figure is the mean of the splits' scores and
their standard deviation (over S, as first published).

The number depends on S and on n: few samples a split lower it. Salimans et al. use 50,000 samples
in S = 10 splits; the code of Song et al. 2021 uses S = 1, the default here.

    sums = zeros(1008, splits=10)
    for index, logits in stream:
        sums = update(sums, logits, contiguous(index, total=50_000, splits=10))
    mean, std, _ = score(sums)

The name "Inception Score" belongs to the logits of the published Inception network; of any other
classifier it is a classifier score.

Reference: Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, "Improved techniques for training
GANs", 2016, https://arxiv.org/abs/1606.03498, section 4.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.checks import at_least
from diffjax.core.pytree import pytree
from diffjax.core.types import Array
from diffjax.metrics import sums as exact
from diffjax.metrics.sums import Pair


@pytree
class ScoreSums:
    """The sums of eqs. (1) and (2), a split a row.

    count: (S,) int32. plogp: sum of p ln p, a Pair of (S,). marginal: sum of p, a Pair of (S, K).
    """

    count: Array
    plogp: Pair
    marginal: Pair


class Score(NamedTuple):
    """Mean and standard deviation over the splits, and each split's score, (S,)."""

    mean: float
    std: float
    splits: np.ndarray


def zeros(num_classes: int, splits: int = 1, dtype: Any = float) -> ScoreSums:
    """The sums of no samples. num_classes: K. splits: S. dtype: of the sums."""
    at_least("num_classes", num_classes, 2)
    at_least("splits", splits, 1)
    return ScoreSums(
        jnp.zeros(splits, jnp.int32),
        exact.zero((splits,), dtype),
        exact.zero((splits, num_classes), dtype),
    )


def contiguous(index: Array, total: int, splits: int) -> Array:
    """The split of each sample when `total` of them are cut into `splits` equal runs, (B,).

    index: (B,), the samples' places in the stream. Beyond the total it is the last split.
    """
    at_least("splits", splits, 1)
    at_least("total", total, splits)
    # Split s ends where index * splits / total reaches s + 1; written to stay within 32 bits.
    ends = jnp.asarray(np.arange(1, splits, dtype=np.int64) * total // splits, jnp.int32)
    return jnp.searchsorted(ends, jnp.asarray(index, jnp.int32), side="right")


def update(
    sums: ScoreSums, logits: Array, split: Array | None = None, mask: Array | None = None
) -> ScoreSums:
    """The sums with one more batch in them.

    logits: (B, K). split: (B,) ints in [0, S - 1], each row's split; None is split 0. mask: (B,)
    bool, True where a row counts; None counts all.
    """
    splits, classes = sums.marginal.hi.shape
    logits = jnp.asarray(logits)
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise ValueError(f"logits must have shape (B, {classes}); got {logits.shape}.")
    split = jnp.zeros(logits.shape[0], jnp.int32) if split is None else jnp.asarray(split)
    mask = jnp.ones(logits.shape[0], bool) if mask is None else jnp.asarray(mask)
    for name, rows in (("split", split), ("mask", mask)):
        if rows.shape != logits.shape[:1]:
            raise ValueError(f"{name} must have shape ({logits.shape[0]},); got {rows.shape}.")
    logits = jnp.where(mask[:, None], logits, 0).astype(sums.plogp.hi.dtype)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    member = jax.nn.one_hot(split, splits, axis=0, dtype=p.dtype) * mask[None]  # (S, B)

    def total(rows):
        return jnp.matmul(member, rows, precision=jax.lax.Precision.HIGHEST)

    # An infinite negative logit is p = 0, and p ln p is 0 there.
    plogp = jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=1)
    return ScoreSums(
        sums.count + jnp.sum(member, axis=1).astype(jnp.int32),
        exact.add(sums.plogp, total(plogp)),
        exact.add(sums.marginal, total(p)),
    )


def merge(a: ScoreSums, b: ScoreSums) -> ScoreSums:
    """The sums over two disjoint sets of samples: of two hosts, say."""
    return ScoreSums(
        a.count + b.count, exact.join(a.plogp, b.plogp), exact.join(a.marginal, b.marginal)
    )


def score(sums: ScoreSums) -> Score:
    """The score of eq. (2), in float64 on the host. Raises ValueError for an empty split."""
    count = np.asarray(sums.count)
    if (count < 1).any():
        raise ValueError(f"Every split needs a sample; the splits hold {count.tolist()}.")
    m = exact.float64(sums.marginal) / count[:, None]
    mlogm = np.sum(m * np.log(np.where(m > 0, m, 1)), axis=1)
    scores = np.exp(exact.float64(sums.plogp) / count - mlogm)
    return Score(float(scores.mean()), float(scores.std()), scores)
