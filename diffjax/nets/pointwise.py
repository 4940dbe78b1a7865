r"""Gain, shift, activation and dropout of features in one pass forwards and one backwards.

Symbols: x is an image of features (B, H, W, C); g and s are a gain and a shift of each sample and
channel; a is the activation; m is 0 for a value that dropout erases and 1 / (1 - p) for the others.

    (1)  y  = m a(z),     z  = x g + s
    (2)  dz = m a'(z) dy
    (3)  dx = g dz,       dg = sum of x dz,       ds = sum of dz       over the pixels

For the backward pass x, g, s and m are kept; z and a' are computed again. In a normalisation g and
s depend on x, so the sums of (3) come before the gradient of x is complete and dz serves two passes
over the pixels. It is rounded to x's type in between: left in float32, as a compiler does that
deems a'(z) too dear for a second time, it is the largest array of the backward pass.

m is kept as a byte a value, and made of all 64 bits of a hash: 16 for each value.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.types import Array
from diffjax.nets.embed import Activation, Dtype

LEVELS = 65536  # of the 16 random bits that decide on a value


class Mask(NamedTuple):
    """What dropout keeps of (B, H, W, C). parts: booleans, the rows in equal pieces."""

    parts: tuple[Array, ...]
    scale: float

    def __call__(self, y: Array) -> Array:
        """Zero where a value is dropped, and the others rescaled."""
        keep = jnp.concatenate(self.parts, axis=1)[:, : y.shape[1]]
        return jnp.where(keep, y * self.scale, 0)


def dropout_mask(keys: Array, shape: tuple[int, ...], rate: float) -> Mask:
    """Drops each value of (H, W, C) = shape with probability `rate`, to the nearest 1/65536.

    keys: (B,), one a sample. Sixteen random bits decide on a value. They are the words of split
    keys: a hash of a key gives two, of which `jax.random.bits` returns one. The values of a hash
    lie in different rows: channels, cut in pieces, would not fill the lanes of a TPU.
    """
    dropped = min(round(rate * LEVELS), LEVELS - 1)
    per_key = 2 * jax.eval_shape(jax.random.key_data, keys).shape[-1]
    size = (-(-shape[0] // per_key), *shape[1:])
    split = jax.vmap(lambda key: jax.random.key_data(jax.random.split(key, size)))(keys)
    words = [split[..., i] for i in range(per_key // 2)]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    # The barrier keeps a compiler from hashing once for each piece.
    parts = jax.lax.optimization_barrier(tuple(half >= dropped for half in halves))
    return Mask(parts, LEVELS / (LEVELS - dropped))


def affine_act(
    x: Array,
    gain: Array,
    shift: Array,
    *,
    act: Activation | None,
    mask: Mask | None,
    dtype: Dtype,
) -> Array:
    """Eq. (1) in the type of gain and shift, (B, 1, 1, C), and then in `dtype`. act: None for z."""
    parts, scale = (None, 1.0) if mask is None else mask
    return _affine_act(functools.partial(_finish, act, scale, dtype), x, gain, shift, parts)


def _finish(
    act: Activation | None, scale: float, dtype: Dtype, z: Array, parts: tuple[Array, ...] | None
) -> Array:
    y = z if act is None else act(z)
    return (y if parts is None else Mask(parts, scale)(y)).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _affine_act(
    finish: Callable[..., Array],
    x: Array,
    gain: Array,
    shift: Array,
    parts: tuple[Array, ...] | None,
) -> Array:
    return finish(x.astype(gain.dtype) * gain + shift, parts)


@_affine_act.defjvp
def _tangent(
    finish: Callable[..., Array], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    x, gain, shift, parts = primals
    dx, dgain, dshift, _ = tangents

    @jax.checkpoint
    def along(x: Array, gain: Array, shift: Array, parts: Any, dz: Array) -> Array:
        z = x.astype(gain.dtype) * gain + shift
        return jax.jvp(lambda z: finish(z, parts), (z,), (dz.astype(z.dtype),))[1]

    dz = dx.astype(gain.dtype) * gain + x.astype(gain.dtype) * dgain + dshift
    # The barrier keeps a compiler from dropping the rounding, and with it the narrow array.
    dz = jax.lax.optimization_barrier(dz.astype(x.dtype))
    return _affine_act(finish, *primals), along(x, gain, shift, parts, dz)
