r"""Averages of any width after training, from stored ones of few widths.

Symbols: profile (T, g) is the share p(u; T, g) = (g + 1) u^g / T^(g + 1) on 0 < u < T that the
weights of update u have in a power-function average after T updates (`ema.PowerEMA`, eq. 6).
(T_i, g_i) are the stored averages, (T, g) the wanted one, x_i the weights of the combination.

    min over x  of  || sum_i x_i p(.; T_i, g_i) - p(.; T, g) ||^2   with  sum_i x_i = 1        (1)
    <p(.; S, g), p(.; T, h)> = (g + 1) (h + 1) / (g + h + 1) (S/T)^h / T,    S <= T           (2)

The norm is that of L2 over u > 0, so (1) is linear: A x = b - lambda 1 with the inner products (2)
in A and b. The paper leaves the condition out; with it weights that never moved are their own
average, whatever the fit. The profiles are near to dependent: everything here is in float64.

How good a fit is, is known before anything is combined: `Fit.error` is the root of (1) over the
norm of the wanted profile. It falls with more checkpoints and rises outside of the stored widths.

Reference: Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024,
https://arxiv.org/abs/2312.02696, section 3.2 and appendix C.2.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from diffjax.core.types import PyTree
from diffjax.train.ema import PowerEMA, power_gamma


class Profile(NamedTuple):
    """A power-function average after `step` >= 1 updates, of relative width `std`."""

    step: int
    std: float


class Fit(NamedTuple):
    """weights: one for each stored average, float64, summing to one. error: relative, in L2."""

    weights: np.ndarray
    error: float


def fit(stored: Sequence[Profile], wanted: Profile) -> Fit:
    """The combination of `stored` averages nearest to the `wanted` one, eq. (1).

    Raises ValueError for no averages, for steps below 1, for widths that no such average has and
    for an average given twice.
    """
    if not stored:
        raise ValueError("There is nothing to combine: give at least one stored average.")
    if len(set(stored)) < len(stored):
        raise ValueError(f"Each average may be given once; got {sorted(stored)}.")
    for profile in (*stored, wanted):
        PowerEMA(profile.std)  # checks the width
        if profile.step < 1:
            raise ValueError(f"step counts updates and must be at least 1; got {profile.step}.")
    steps = np.array([float(profile.step) for profile in (*stored, wanted)])
    gammas = power_gamma(np.array([profile.std for profile in (*stored, wanted)], np.float64))
    # In units of the wanted step, and each profile of norm one, for the sake of the condition.
    gram = inner_products(steps / wanted.step, np.asarray(gammas))
    norms = np.sqrt(np.diag(gram))
    cosines = gram / np.outer(norms, norms)
    a, b, ones = cosines[:-1, :-1], cosines[:-1, -1], norms[-1] / norms[:-1]
    n = len(stored)
    system = np.block([[a, ones[:, None]], [ones[None], np.zeros((1, 1))]])
    x = np.linalg.lstsq(system, np.append(b, 1.0), rcond=1e-14)[0][:n]
    error = np.sqrt(max(float(x @ a @ x - 2 * x @ b + 1), 0.0))
    weights = x * ones
    return Fit(weights / weights.sum(), error)


def inner_products(steps: np.ndarray, gammas: np.ndarray) -> np.ndarray:
    """Eq. (2) of every two of n profiles, (n, n) float64. steps, gammas: (n,)."""
    first = steps[:, None] <= steps[None]  # i is the shorter of (i, j)
    short, long = np.minimum(steps[:, None], steps[None]), np.maximum(steps[:, None], steps[None])
    g, h = gammas[:, None], gammas[None]
    exponent = np.where(first, h, g)  # that of the longer
    factor = (g + 1) * (h + 1) / (g + h + 1)
    return factor * (short / long) ** exponent / long


def combine(weights: np.ndarray, trees: Iterable[PyTree]) -> PyTree:
    """sum_i weights[i] trees[i], summed in float64 on the host; leaves keep their dtypes.

    trees: read one at a time, so that two of them are in memory whatever their number.
    """
    total: PyTree = None
    like: PyTree = None
    for weight, tree in zip(weights, trees, strict=True):
        terms = jax.tree.map(lambda leaf, w=weight: w * np.asarray(leaf, np.float64), tree)
        total = terms if total is None else jax.tree.map(np.add, total, terms)
        like = jax.tree.map(lambda leaf: leaf.dtype, tree) if like is None else like
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), total, like)
