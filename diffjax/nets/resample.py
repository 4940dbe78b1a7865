r"""Resampling of images by a factor of two: FIR filters as polyphase sums of shifted slices.

Symbols: x has shape (..., H, W, C); k is a filter of n taps, normalised to sum 1 and applied along
H and then along W (the two-dimensional filter is the outer product). Outside the image is zero.
With a = n - 2 the reference definitions along one axis are

    (1)  up:    insert a zero after each pixel, pad ((a + 1) // 2 + 1, a // 2), convolve with 2 k
    (2)  down:  pad ((a + 1) // 2, a // 2), convolve with k, keep every second sample from the first

and both are evaluated without the zeros and without the samples thrown away. Write u[i + o] for a
shift with zeros at the ends, kf for the flipped filter and p for the first padding; then

    (1') y[2 i + r] = sum over j = p - r (mod 2) of  2 kf[j] x[i + (r + j - p) / 2],   r = 0, 1
    (2') y[i]       = sum over j of  kf[j] x_q[i + (j - p - q) / 2],   q = (j - p) mod 2

where x_0 and x_1 are the even and the odd samples. Four taps cost four multiply-adds a pixel, and
XLA fuses the shifts; a dilated convolution of the same operator is tens of times slower on a CPU.
A constant image keeps its value inside; at each edge it shrinks, for k = (1, 3, 3, 1), to 0.75 (up)
and 0.875 (down).

References: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020,
https://arxiv.org/abs/1912.04958. Zhang, "Making Convolutional Networks Shift-Invariant Again",
2019, https://arxiv.org/abs/1904.11486. Song et al., "Score-Based Generative Modeling through
Stochastic Differential Equations", 2021, https://arxiv.org/abs/2011.13456, appendix H.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from diffjax.core.types import Array

H_AXIS, W_AXIS = -3, -2


def normalised(kernel: Sequence[float]) -> tuple[float, ...]:
    """The taps divided by their sum; raises ValueError unless that is positive."""
    total = float(sum(kernel))
    if not total > 0:
        raise ValueError(
            f"fir_kernel must have taps with a positive sum; got {tuple(kernel)}. "
            "The usual filter is (1, 3, 3, 1)."
        )
    return tuple(float(tap) / total for tap in kernel)


def fir_upsample(x: Array, kernel: Sequence[float]) -> Array:
    """Doubles H and W through the filter, eq. (1)."""
    taps = normalised(kernel)
    pad = (len(taps) - 1) // 2 + 1
    return _up_axis(_up_axis(x, taps, pad, H_AXIS), taps, pad, W_AXIS)


def fir_downsample(x: Array, kernel: Sequence[float]) -> Array:
    """Halves H and W through the filter, eq. (2). H and W must be even."""
    _require_even(x)
    taps = normalised(kernel)
    pad = (len(taps) - 1) // 2
    return _down_axis(_down_axis(x, taps, pad, W_AXIS), taps, pad, H_AXIS)


def nearest_upsample(x: Array) -> Array:
    """Doubles H and W by repeating each pixel; eq. (1) with k = (1, 1)."""
    return fir_upsample(x, (1, 1))


def mean_downsample(x: Array) -> Array:
    """Halves H and W by the mean of each 2 x 2 square; eq. (2) with k = (1, 1)."""
    return fir_downsample(x, (1, 1))


def conv_upsample(x: Array, weight: Array, kernel: Sequence[float]) -> Array:
    """Doubles H and W by a transposed k x k convolution followed by the filter.

    The zero-inserted image is padded by k - 1 and correlated with `weight` (k, k, C, C_out), then
    filtered; padding happens once, so the border differs from `fir_upsample` and a convolution.
    """
    size = weight.shape[0]
    x = lax.conv_general_dilated(
        x,
        weight,
        window_strides=(1, 1),
        padding=[(size - 1, size - 1)] * 2,
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    taps = tuple(2 * tap for tap in normalised(kernel))
    spare = len(taps) - 2 - (size - 1)
    return _filter(x, taps, (spare + 1) // 2 + 1, spare // 2 + 1)


def conv_downsample(x: Array, weight: Array, kernel: Sequence[float]) -> Array:
    """Halves H and W by the filter followed by a k x k convolution of stride 2.

    weight: (k, k, C, C_out). All the padding comes before the filter. H and W must be even.
    """
    _require_even(x)
    taps = normalised(kernel)
    spare = len(taps) - 2 + (weight.shape[0] - 1)
    return lax.conv_general_dilated(
        _filter(x, taps, (spare + 1) // 2, spare // 2),
        weight,
        window_strides=(2, 2),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _require_even(x: Array) -> None:
    height, width = x.shape[H_AXIS], x.shape[W_AXIS]
    if height % 2 or width % 2:
        raise ValueError(
            f"halving needs an even height and width; got {height} x {width}. "
            "Pad or crop the image."
        )


def _shift(x: Array, offset: int, axis: int) -> Array:
    """y[i] = x[i + offset] along the axis, zero where the index leaves the image."""
    return _pad(x, -offset, offset, axis)


def _pad(x: Array, low: int, high: int, axis: int) -> Array:
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (low, high, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def _up_axis(x: Array, taps: tuple[float, ...], pad: int, axis: int) -> Array:
    """Eq. (1') along one axis."""
    flipped = taps[::-1]
    phases = []
    for r in range(2):
        terms = [
            2 * flipped[j] * _shift(x, (r + j - pad) // 2, axis)
            for j in range(len(taps))
            if (r + j - pad) % 2 == 0
        ]
        phases.append(sum(terms) if terms else jnp.zeros_like(x))
    doubled = list(x.shape)
    doubled[axis] *= 2
    return jnp.stack(phases, axis=axis % x.ndim + 1).reshape(doubled)


def _down_axis(x: Array, taps: tuple[float, ...], pad: int, axis: int) -> Array:
    """Eq. (2') along one axis."""
    flipped = taps[::-1]
    phases = [lax.slice_in_dim(x, q, None, stride=2, axis=axis) for q in range(2)]
    terms = [
        flipped[j] * _shift(phases[(j - pad) % 2], (j - pad) // 2, axis) for j in range(len(taps))
    ]
    return sum(terms[1:], terms[0])


def _filter(x: Array, taps: tuple[float, ...], low: int, high: int) -> Array:
    """Pads both axes and convolves them with the taps, at full resolution."""
    for axis in (H_AXIS, W_AXIS):
        x = _pad(x, low, high, axis)
        size = x.shape[axis] - len(taps) + 1
        terms = [
            tap * lax.slice_in_dim(x, j, j + size, axis=axis) for j, tap in enumerate(taps[::-1])
        ]
        x = sum(terms[1:], terms[0])
    return x
