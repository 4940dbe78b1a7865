r"""Levels and the reals: the one map between stored pixels and the model's range.

A stored pixel is an integer level k in {0, ..., L - 1}: L = 256 for photographs, 17 for the digits.
The model's range [low, high], of width w = high - low, is cut into L bins of equal width,

    bin k = low + w [k, k + 1) / L,                                                           (1)

and every map here is coherent with (1). A level becomes a real number in one of three ways:

    ends         x = low + w k / (L - 1)             0 and L - 1 meet the ends of the range   (2)
    centres      x = low + w (k + 1/2) / L           the middle of the bin                    (3)
    dequantised  x = low + w (k + u) / L             u uniform on [0, 1): anywhere in the bin (4)

The way back has to fit the way there. After (2) the nearest of the L points is the answer, which
rounds; after (3) or (4) it is the bin that holds x, which truncates:

    ends                     k = floor((L - 1) (x - low) / w + 1/2), clipped to 0 ... L - 1   (5)
    centres and dequantised  k = floor(L (x - low) / w), clipped to 0 ... L - 1               (6)

(2) is `x / 255 * 2 - 1`, on which the published models were trained. Since k / (L - 1) lies in the
closed bin k, (6) also undoes (2), but from the bin's edge: (5) leaves half a level of room on
either side, (6) as little as 1 / (L (L - 1)). With few levels the bins are wide and (2) fills the
range unevenly, so train on (4) with `placement="centres"` there.

Likelihood. Whatever the training used, bits/dim are those of the integers under (4), where the
model density p integrated over a bin gives the probability of a level. By Jensen's inequality
E_u log2 p(x) + log2(bin volume) <= log2 P(level), hence per dimension

    bits/dim = -log2 p(x) / D - log2(w / L).                                                  (7)

The last term is 7 for 256 levels on [-1, 1], 8 on [0, 1], and log2(17) - 1 for the digits.

References: Theis, van den Oord, Bethge, A note on the evaluation of generative models, 2016,
https://arxiv.org/abs/1511.01844, section 3.1 (dequantisation); Song et al., Score-based generative
modeling through stochastic differential equations, 2021, https://arxiv.org/abs/2011.13456.
"""

import jax.numpy as jnp

from diffjax.core.checks import at_least, in_range, less, one_of
from diffjax.core.numerics import at_least_float32
from diffjax.core.pytree import pytree, static
from diffjax.core.random import sample_keys, uniform_like
from diffjax.core.types import Array, Key, Number

# Draws of (4) keep this far, in bins, from the two edges of a bin, so that rounding in float32
# never carries a pixel into its neighbour. The mean stays, the variance in a bin falls by 0.05%.
_MARGIN = 2.0**-13


@pytree
class Quantisation:
    """L levels on the model's range [low, high]; see the module's docstring.

    levels: L, 2 to 256. low, high: the ends of the range ((-1, 1), or (0, 1) for the published VE
    models). placement: "ends" for (2) and (5), "centres" for (3) and (6).
    """

    levels: int = static(default=256)
    low: Number = -1.0
    high: Number = 1.0
    placement: str = static(default="ends")

    def __post_init__(self):
        at_least("levels", self.levels, 2)
        in_range("levels", self.levels, 2, 256)
        less("low", self.low, "high", self.high)
        one_of("placement", self.placement, ("ends", "centres"))

    def to_model(self, images: Array) -> Array:
        """Levels to the model's range by (2) or (3). images: integers of any shape."""
        if self.placement == "centres":
            return self.within(images, 0.5)
        return self._scaled(_real(images) / (self.levels - 1))

    def within(self, images: Array, u: Array | float) -> Array:
        """The point at the fraction u of each pixel's bin, (4). u: () or like images."""
        return self._scaled((_real(images) + u) / self.levels)

    def dequantise(self, key: Key, images: Array) -> Array:
        """A uniform draw in each pixel's bin, (4). images: (B, ...); key: one, or one a sample."""
        x = _real(images)
        u = uniform_like(sample_keys(key, x.shape[0]), "dequantise", x)
        return self.within(images, _MARGIN + (1 - 2 * _MARGIN) * u)

    def from_model(self, x: Array) -> Array:
        """The model's range to levels, uint8, by (5) or (6); what lies outside is clipped."""
        x = at_least_float32(x)
        low, high = jnp.asarray(self.low, x.dtype), jnp.asarray(self.high, x.dtype)
        y = (x - low) / (high - low)
        if self.placement == "centres":
            k = jnp.floor(self.levels * y)
        else:
            k = jnp.floor((self.levels - 1) * y + 0.5)
        return jnp.clip(k, 0, self.levels - 1).astype(jnp.uint8)

    def log2_bin_width(self) -> Array:
        """log2(w / L): minus this is the offset of bits/dim in (7)."""
        width = jnp.asarray(self.high, float) - jnp.asarray(self.low, float)
        return jnp.log2(width / self.levels)

    def _scaled(self, y: Array) -> Array:
        """[0, 1] to [low, high]."""
        low, high = jnp.asarray(self.low, y.dtype), jnp.asarray(self.high, y.dtype)
        return low + (high - low) * y


def _real(images: Array) -> Array:
    """Levels as reals of JAX's default width. Raises TypeError for what was already scaled."""
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.integer):
        raise TypeError(
            f"Images must hold integer levels (uint8); got {images.dtype}. Real-valued images are "
            "in the model's range already, or need from_model first."
        )
    return images.astype(float)
