"""Sums of floats that keep their rounding errors.

A running sum of n floats loses digits as it grows: each new term is rounded to the size of the sum.
A `Pair` is the unevaluated sum hi + lo, where lo gathers the rounding errors of hi by the
error-free sum of two floats a and b,

    s = a + b,   z = s - a,   e = (a - (s - z)) + (b - z),   a + b = s + e exactly.         (1)

lo is a plain sum, of errors whose signs change. It is not folded back into hi by a second (1): XLA
may compute the middle sum twice, with and without a fused multiply-add, and would break the pair.

Reference: Knuth, "The Art of Computer Programming", volume 2, 4.2.2, theorem B (1).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array


class Pair(NamedTuple):
    """The unevaluated sum hi + lo of two floats, lo far below hi."""

    hi: Array
    lo: Array


def zero(shape: tuple[int, ...], dtype: Any = float) -> Pair:
    """The empty sum."""
    return Pair(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and the rounding error, eq. (1)."""
    s = a + b
    z = s - a
    return s, (a - (s - z)) + (b - z)


def add(pair: Pair, x: Array) -> Pair:
    """pair + x, the rounding error kept in lo."""
    hi, error = two_sum(pair.hi, x)
    return Pair(hi, pair.lo + error)


def join(a: Pair, b: Pair) -> Pair:
    """a + b, both halves of each."""
    hi, error = two_sum(a.hi, b.hi)
    return Pair(hi, a.lo + b.lo + error)


def value(pair: Pair) -> Array:
    """The sum, in the dtype of its halves."""
    return pair.hi + pair.lo


def float64(pair: Pair) -> np.ndarray:
    """The sum on the host in float64, which keeps both halves."""
    return np.asarray(pair.hi, np.float64) + np.asarray(pair.lo, np.float64)
