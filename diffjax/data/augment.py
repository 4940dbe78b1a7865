r"""Non-leaking augmentation: an image is flipped, scaled, turned, stretched or moved, and labelled.

A network that is told how each training image was changed learns the distribution of the images as
they are under the label zero, and the changed ones are only more to learn from. Each change happens
to a sample with probability min(1, p multiplier), and gives these of the nine labels:

    change              drawn                                   labels
    flip of columns     w in {0, 1}                             w                         (0)
    flip of rows        w in {0, 1}                             w                         (1)
    scale s = 2^{0.2 w} w ~ N(0, 1)                             w                         (2)
    turn                angle ~ U(-pi, pi)                      cos(angle) - 1, sin       (3, 4)
    stretch u = 2^{0.2 w} along an axis, 1 / u across           w cos(r), w sin(r)        (5, 6)
                        w ~ N(0, 1); r ~ U(-pi, pi) or 0, each with probability 1/2
    shift by w H / 8    w ~ N(0, 1) twice                       w_x, w_y                  (7, 8)

The result at the place o, as (column, row) from the centre of the image, is the image at G o:

    (1)  G o = S(1/s, 1/s) R(angle) R(-r) S(1/u, u) R(r) (o - shift),   R(a) = [cos a, -sin a;
                                                                               sin a,  cos a]

evaluated without aliasing: the image is mirrored outwards by its own size less one on each side,
upsampled by two with an orthogonal filter h of 12 taps (sym6), read off by linear interpolation
at half-pixel steps (zero beyond the mirrored part), filtered with h and thinned by two:

    (2)  up:    z[k] = sum over n of h[n] y[k + 5 - n],   y[2 i] = x[i], y[2 i + 1] = 0
    (3)  down:  x[j] = sum over m of h[m] z[2 j + m - 5]

(3) undoes (2) exactly, as the even shifts of h are orthonormal, so whole-pixel shifts are exact. h
is not quite symmetric: its centre of mass is at tap 5.1 instead of 5, so a turned image lies off by
up to 0.14 pixels, in the reference code as here.

Beside the reference code: the mirrored margin is the same for every batch, where it takes the
largest that the batch needs, so a sample here does not depend on its neighbours; and an image under
no change (1) is returned bit for bit. Stretches by (w, r) and (-w, r + pi) are inverse to each
other and carry equal labels (5, 6): a small ambiguity of the method, kept.

References: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
2022, https://arxiv.org/abs/2206.00364, appendix F.2. Karras et al., "Training Generative
Adversarial Networks with Limited Data", 2020, https://arxiv.org/abs/2006.06676, appendix B.
Daubechies, "Ten Lectures on Wavelets", 1992, section 8.1.1 (the filter).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffjax.core import checks
from diffjax.core.pytree import pytree, static
from diffjax.core.random import sample_keys, step_keys, tag
from diffjax.core.types import Array, Key

LABELS = 9

# sym6: the least asymmetric orthogonal filter with six vanishing moments; its sum is sqrt(2).
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
MARGIN = len(SYM6) // 4  # pixels beyond the image that the last filter reads


class Change(NamedTuple):
    """What is done to each sample, (B,) each: zeros mean an image as it is."""

    flip_columns: Array  # 0 or 1
    flip_rows: Array  # 0 or 1
    scale: Array  # w of the docstring's table, as for `stretch` and the shifts
    angle: Array
    stretch: Array
    axis: Array  # r
    shift_x: Array  # in columns, to the right
    shift_y: Array  # in rows, downwards

    def labels(self) -> Array:
        """The nine numbers that a network is told, (B, 9)."""
        columns = (
            *(self.flip_columns, self.flip_rows, self.scale),
            *(jnp.cos(self.angle) - 1, jnp.sin(self.angle)),
            *(self.stretch * jnp.cos(self.axis), self.stretch * jnp.sin(self.axis)),
            *(self.shift_x, self.shift_y),
        )
        return jnp.stack(columns, axis=-1)


@pytree
class Augment:
    """The pipeline: `images, labels = Augment(p=0.12)(keys, images)`.

    p: the probability of each change; EDM takes 0.12 for CIFAR-10 and 0.15 for the 64-pixel sets.
    The multipliers of p say which changes there are. Half of the flips are none: under the default
    1e8 every image is mirrored with probability 1/2, whatever p, which replaces `random_flip`.
    """

    p: float = static(default=0.12)
    flip_columns: float = static(default=1e8)
    flip_rows: float = static(default=1.0)
    scale: float = static(default=1.0)
    turn: float = static(default=1.0)
    stretch: float = static(default=1.0)
    shift: float = static(default=1.0)

    def __post_init__(self):
        checks.in_range("p", self.p, 0.0, 1.0)
        for name in ("flip_columns", "flip_rows", "scale", "turn", "stretch", "shift"):
            checks.non_negative(name, getattr(self, name))

    def __call__(self, key: Key, images: Array) -> tuple[Array, Array]:
        """Changed images, and their labels (B, 9) in float32.

        key: one key, or one a sample, (B,).  images: (B, H, W, C), reals.
        """
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                "images must be reals of shape (B, H, W, C), in the model's range; got "
                f"{images.dtype} {images.shape}."
            )
        keys = step_keys(sample_keys(key, images.shape[0]), tag("augment"))
        change = self.draw(keys)
        return apply(change, images), change.labels()

    def draw(self, keys: Key) -> Change:
        """What to do to each sample. keys: (B,)."""
        return jax.vmap(self._draw_one)(keys)

    def _draw_one(self, key: Key) -> Change:
        # A draw has its own key by name, so that leaving one out changes no other.
        def named(name: str) -> Key:
            return jax.random.fold_in(key, tag(name))

        def normal(name: str) -> Array:
            return jax.random.normal(named(name), (), jnp.float32)

        def angle(name: str) -> Array:
            return jax.random.uniform(named(name), (), jnp.float32, -math.pi, math.pi)

        def coin(name: str) -> Array:
            return jax.random.bernoulli(named(name)).astype(jnp.float32)

        def gate(name: str, multiplier: float) -> Array:
            rate = min(1.0, self.p * multiplier)
            return jax.random.bernoulli(named(name), rate).astype(jnp.float32)

        shift = gate("shift?", self.shift)
        return Change(
            flip_columns=coin("flip_columns") * gate("flip_columns?", self.flip_columns),
            flip_rows=coin("flip_rows") * gate("flip_rows?", self.flip_rows),
            scale=normal("scale") * gate("scale?", self.scale),
            angle=angle("turn") * gate("turn?", self.turn),
            stretch=normal("stretch") * gate("stretch?", self.stretch),
            axis=angle("axis") * coin("axis?"),
            shift_x=normal("shift_x") * shift,
            shift_y=normal("shift_y") * shift,
        )


def apply(change: Change, images: Array) -> Array:
    """The changed images, shaped like `images` (B, H, W, C), which are reals."""

    def where(flag: Array, a: Array, b: Array) -> Array:
        return jnp.where(flag[:, None, None, None], a, b)

    images = where(change.flip_columns > 0, images[:, :, ::-1], images)
    images = where(change.flip_rows > 0, images[:, ::-1], images)
    matrix, offset = source_map(change, *images.shape[1:3])
    moved = [change.scale, change.angle, change.stretch, change.shift_x, change.shift_y]
    touched = jnp.any(jnp.stack(moved) != 0, axis=0)
    return where(touched, jax.vmap(warp)(images, matrix, offset), images)


def source_map(change: Change, height: int, width: int) -> tuple[Array, Array]:
    """G of eq. (1) as o -> matrix o + offset: (B, 2, 2) and (B, 2), of (column, row) in pixels."""

    def rotation(angle: Array) -> Array:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)

    u = jnp.exp2(0.2 * change.stretch)
    diagonal = jnp.stack([1 / u, u], -1)
    stretch = rotation(-change.axis) @ (diagonal[..., None] * rotation(change.axis))
    scale = jnp.exp2(-0.2 * change.scale)[..., None, None]
    matrix = scale * (rotation(change.angle) @ stretch)
    shift = 0.125 * jnp.stack([change.shift_x * width, change.shift_y * height], -1)
    return matrix, -(matrix @ shift[..., None])[..., 0]


def warp(image: Array, matrix: Array, offset: Array) -> Array:
    """The image (H, W, C) at matrix o + offset for every pixel o, by eqs. (2) and (3)."""
    height, width, _ = image.shape
    pads = ((height - 1,) * 2, (width - 1,) * 2, (0, 0))
    mirrored = jnp.pad(image, pads, mode="reflect")
    fine = _upsample(_upsample(mirrored, 0), 1)

    # Places in half pixels: entry k of the result's finer grid lies k / 2 from its first pixel.
    rows = jnp.arange(2 * (height + 2 * MARGIN)) / 2 - (height - 1 + 2 * MARGIN) / 2
    columns = jnp.arange(2 * (width + 2 * MARGIN)) / 2 - (width - 1 + 2 * MARGIN) / 2
    rows, columns = jnp.meshgrid(
        rows.astype(matrix.dtype), columns.astype(matrix.dtype), indexing="ij"
    )
    source_x = matrix[0, 0] * columns + matrix[0, 1] * rows + offset[0]
    source_y = matrix[1, 0] * columns + matrix[1, 1] * rows + offset[1]
    places = (2 * source_y + mirrored.shape[0] - 1, 2 * source_x + mirrored.shape[1] - 1)
    read = jax.vmap(
        lambda channel: jax.scipy.ndimage.map_coordinates(channel, places, order=1, cval=0.0),
        in_axes=-1,
        out_axes=-1,
    )
    coarse = _downsample(_downsample(read(fine), 0), 1)
    return coarse[MARGIN:-MARGIN, MARGIN:-MARGIN]


def _filter(
    x: Array, axis: int, *, stride: int, dilation: int, pads: tuple[int, int], taps
) -> Array:
    """A one-dimensional correlation of (H, W, C) along an axis, each channel by itself."""
    lines = jnp.moveaxis(x, axis, -1)
    out = lax.conv_general_dilated(
        lines.reshape(-1, 1, lines.shape[-1]),
        jnp.asarray(taps, x.dtype)[None, None],
        window_strides=(stride,),
        padding=[pads],
        lhs_dilation=(dilation,),
        precision=lax.Precision.HIGHEST,
    )
    return jnp.moveaxis(out.reshape(*lines.shape[:-1], -1), -1, axis)


def _upsample(x: Array, axis: int) -> Array:
    """Eq. (2) along an axis, which doubles."""
    half = len(SYM6) // 2
    return _filter(x, axis, stride=1, dilation=2, pads=(half, half), taps=np.array(SYM6[::-1]))


def _downsample(x: Array, axis: int) -> Array:
    """Eq. (3) along an axis, which halves."""
    half = len(SYM6) // 2 - 1
    return _filter(x, axis, stride=2, dilation=1, pads=(half, half), taps=np.array(SYM6))
