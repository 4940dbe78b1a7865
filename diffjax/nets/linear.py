"""Convolutions and linear maps in half precision, with their sums in float32.

A bias is added to very many numbers, so its gradient is the sum of as many. Added in half
precision, that sum would run there too, and stop growing at 2^8 (bfloat16) or 2^11 (float16) times
its terms. So biases are added in float32 and the result is rounded:

    y = round(round(W x) + b),    db = sum of dy in float32.

In float32 these layers are flax's own.
"""

from typing import Any, cast

import jax
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from diffjax.core.types import Array
from diffjax.nets.embed import Dtype, wide


def plus(x: Array, shift: Array) -> Array:
    """x + shift, broadcast, summed in float32 at least and rounded to x's type."""
    precise = wide(x.dtype)
    return (x.astype(precise) + shift.astype(precise)).astype(x.dtype)


def _promote(x: Array, kernel: Array, bias: Array | None, *, dtype: Dtype, **_: Any) -> Any:
    """Arguments of a layer in `dtype`, the bias in float32 at least."""
    x, kernel = promote_dtype(x, kernel, dtype=dtype)
    return x, kernel, None if bias is None else bias.astype(wide(dtype))


class Conv(nn.Conv):
    """flax's convolution, the bias added in float32."""

    promote_dtype: Any = _promote

    def __call__(self, inputs: Any) -> jax.Array:
        """(B, H, W, C) -> (B, H', W', features) in `dtype`."""
        return cast(jax.Array, super().__call__(inputs).astype(self.dtype))


class Dense(nn.Dense):
    """flax's linear map, the bias added in float32."""

    promote_dtype: Any = _promote

    def __call__(self, inputs: Any) -> jax.Array:
        """(..., C) -> (..., features) in `dtype`."""
        return cast(jax.Array, super().__call__(inputs).astype(self.dtype))


class DenseGeneral(nn.DenseGeneral):
    """flax's linear map to several axes, the bias added in float32."""

    promote_dtype: Any = _promote

    def __call__(self, inputs: Any) -> jax.Array:
        """(..., C) -> (..., *features) in `dtype`."""
        return cast(jax.Array, super().__call__(inputs).astype(self.dtype))
