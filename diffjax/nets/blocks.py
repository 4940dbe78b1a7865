r"""The blocks of DDPM++ and NCSN++: normalisation, attention, residual and resampling blocks.

Symbols: x is an image of features (B, H, W, C); temb is the embedding of the noise level (B, D).

    (1)  norm(x)   = (x - mean) / sqrt(var + 1e-6) * scale + bias,  over H, W and the channels of a
                     group, in min(C // 4, 32) groups (32 in the first DDPM)
    (2)  ddpm:       h = conv3x3(act(norm(x))) + dense(act(temb))
                     h = conv3x3(dropout(act(norm(h))))
                     y = join(x, h)                               join(x, h) = x + h, or
    (3)  biggan:     as (2), with act(norm(x)) and x both resampled            (x + h) / sqrt(2)
                     before the first convolution; x then meets a 1 x 1 convolution
    (4)  attention:  y = join(x, softmax(q k^T / sqrt(C)) v W),  q, k, v linear in norm(x), one head

Precision: parameters are float32. Convolutions and linear maps run in `dtype`; normalisation,
softmax and everything made from the label run in float32 (in `dtype` where that is wider).

Class and parameter names are those that flax gives the modules of the reference code, so that
importing its weights is a copy: renaming a class here breaks checkpoints.

References: Song et al., "Score-Based Generative Modeling through Stochastic Differential
Equations", 2021, https://arxiv.org/abs/2011.13456, section 4.4 and appendix H. Ho et al.,
"Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239, appendix B.
Brock et al., "Large Scale GAN Training for High Fidelity Natural Image Synthesis", 2019,
https://arxiv.org/abs/1809.11096, appendix B.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core.types import Array
from diffjax.nets import resample
from diffjax.nets.embed import Activation, Dtype, default_init, wide
from diffjax.nets.linear import Conv, plus
from diffjax.nets.pointwise import affine_act, dropout_mask

# What a residual block starts from: x in pieces, to be joined by channels, and keys (B,) for
# dropout or None.
Source = tuple[Sequence[Array], Array | None]


def conv3x3(features: int, dtype: Dtype, init_scale: float = 1.0, stride: int = 1) -> Conv:
    """A 3 x 3 convolution with zero padding (for stride 2 after the last pixel only)."""
    kernel_init = default_init(init_scale)
    return Conv(features, (3, 3), strides=stride, dtype=dtype, kernel_init=kernel_init)


def conv1x1(features: int, dtype: Dtype) -> Conv:
    """A linear map of the channels, as a convolution."""
    return Conv(features, (1, 1), dtype=dtype, kernel_init=default_init())


def dense(features: int, dtype: Dtype) -> nn.Dense:
    """A linear layer of the embedding, in float32 at least."""
    return nn.Dense(features, dtype=wide(dtype), kernel_init=default_init())


def join(x: Array, h: Array, rescale: bool) -> Array:
    """x + h, divided by sqrt(2) to keep the variance if `rescale`."""
    return (x + h) * math.sqrt(0.5) if rescale else x + h


class GroupNorm(nn.Module):
    """Group normalisation, eq. (1), and the activation that follows it.

    groups: how many; None for min(C // 4, 32).
    """

    dtype: Dtype = jnp.float32
    act: Activation | None = None
    groups: int | None = None
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self,
        x: Array,
        film: tuple[Array, Array] | None = None,
        keys: Array | None = None,
        rate: float = 0.0,
    ) -> Array:
        """x: (B, H, W, C). Raises ValueError where C does not split into groups.

        film: a further factor and shift before the activation, each (B, C). keys: (B,), one a
        sample, for dropout at `rate` after the activation; None for none.
        """
        channels = x.shape[-1]
        groups = min(channels // 4, 32) if self.groups is None else self.groups
        if groups == 0 or channels % groups:
            rule = f"min(C // 4, 32) = {groups}" if self.groups is None else str(groups)
            raise ValueError(
                f"{channels} channels do not split into {rule} equal groups. "
                "Choose nf and ch_mult so that every width, also of two joined, does: nf = 32 k."
            )
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)

        wide_x = x.astype(wide(self.dtype))
        gain, shift = _normaliser(wide_x, groups, self.epsilon, scale, bias)
        if film is not None:
            factor, more = (v[:, None, None, :].astype(gain.dtype) for v in film)
            gain, shift = gain * factor, shift * factor + more

        mask = None
        if keys is not None:
            mask = dropout_mask(keys, x.shape[1:], rate)
        return affine_act(x, gain, shift, act=self.act, mask=mask, dtype=self.dtype)


def _normaliser(
    x: Array, groups: int, epsilon: float, scale: Array, bias: Array
) -> tuple[Array, Array]:
    """The gain and shift, each (B, 1, 1, C), with norm(x) = x gain + shift."""
    batch, channels = x.shape[0], x.shape[-1]

    def group_mean(v: Array) -> Array:
        means = jnp.mean(v, axis=(1, 2)).reshape(batch, groups, -1).mean(-1)
        return jnp.repeat(means, channels // groups, axis=-1)

    mean = group_mean(x)
    var = jnp.maximum(group_mean(jnp.square(x)) - jnp.square(mean), 0)
    gain = jax.lax.rsqrt(var + epsilon) * scale[None].astype(x.dtype)
    shift = bias[None].astype(x.dtype) - mean * gain
    return gain[:, None, None, :], shift[:, None, None, :]


class NIN(nn.Module):
    """A linear map of the channels (a "network in network" layer)."""

    features: int
    init_scale: float = 0.1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(..., C) -> (..., features)."""
        shape = (x.shape[-1], self.features)
        weight = self.param("W", default_init(self.init_scale), shape, jnp.float32)
        bias = self.param("b", nn.initializers.zeros, (self.features,), jnp.float32)
        y = x.astype(self.dtype) @ weight.astype(self.dtype)
        return plus(y, jnp.expand_dims(bias, range(x.ndim - 1)))


class Conv2d(nn.Module):
    """A 3 x 3 convolution fused with a FIR filter and a change of size by two."""

    features: int
    fir_kernel: Sequence[float]
    direction: Literal["up", "down"]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) -> (B, 2 H, 2 W, features) or (B, H / 2, W / 2, features)."""
        shape = (3, 3, x.shape[-1], self.features)
        weight = self.param("weight", default_init(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, weight = x.astype(self.dtype), weight.astype(self.dtype)
        conv = resample.conv_upsample if self.direction == "up" else resample.conv_downsample
        return plus(conv(x, weight, self.fir_kernel), bias[None, None, None])


class Upsample(nn.Module):
    """Doubles H and W: FIR filter or nearest pixel, with or without a 3 x 3 convolution."""

    fir: bool
    fir_kernel: Sequence[float]
    with_conv: bool
    features: int | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """features: the width after the convolution; None keeps it."""
        features = self.features or x.shape[-1]
        if self.fir and self.with_conv:
            return Conv2d(features, self.fir_kernel, "up", self.dtype)(x)
        x = upsample(x, self.fir, self.fir_kernel)
        return conv3x3(features, self.dtype)(x) if self.with_conv else x


class Downsample(nn.Module):
    """Halves H and W: FIR filter or mean, with or without a 3 x 3 convolution."""

    fir: bool
    fir_kernel: Sequence[float]
    with_conv: bool
    features: int | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """features: the width after the convolution; None keeps it."""
        features = self.features or x.shape[-1]
        if not self.with_conv:
            return downsample(x, self.fir, self.fir_kernel)
        if self.fir:
            return Conv2d(features, self.fir_kernel, "down", self.dtype)(x)
        return conv3x3(features, self.dtype, stride=2)(x)


def upsample(x: Array, fir: bool, fir_kernel: Sequence[float]) -> Array:
    """Doubles H and W without parameters."""
    return resample.fir_upsample(x, fir_kernel) if fir else resample.nearest_upsample(x)


def downsample(x: Array, fir: bool, fir_kernel: Sequence[float]) -> Array:
    """Halves H and W without parameters."""
    return resample.fir_downsample(x, fir_kernel) if fir else resample.mean_downsample(x)


class Combine(nn.Module):
    """Brings a pyramid to the width of h by a 1 x 1 convolution, then adds or concatenates it."""

    method: Literal["sum", "cat"]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, pyramid: Array, h: Array) -> Array:
        """Joins the two; "cat" puts the pyramid first and doubles the width of h."""
        pyramid = conv1x1(h.shape[-1], self.dtype)(pyramid)
        if self.method == "cat":
            return jnp.concatenate([pyramid, h], axis=-1)
        return pyramid + h


def attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(C)) v for (B, N, C), one head, the softmax in float32 at least.

    The sum divides the result instead of the weights: only one (B, N, N) array is kept for the
    backward pass, where the usual order keeps three.
    """
    logits = _product("bqc,bkc->bqk", q * q.shape[-1] ** -0.5, k)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    values = _product("bqk,bkc->bqc", weights.astype(v.dtype), v)
    return (values / total).astype(v.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(spec: str, a: Array, b: Array) -> Array:
    """einsum(spec, a, b), in float32 at least. Its gradients are products in a's type.

    Those of an einsum with a float32 result would be products with a float32 gradient, at a
    fraction of the speed.
    """
    return jnp.einsum(spec, a, b, preferred_element_type=wide(a.dtype))


@_product.defjvp
def _product_tangent(
    spec: str, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (a, b), (da, db) = primals, tangents
    value = _product(spec, a, b)
    change = jnp.einsum(spec, da, b) + jnp.einsum(spec, a, db)
    return value, change.astype(value.dtype)


class AttnBlockpp(nn.Module):
    """Self-attention over all pixels, eq. (4).

    groups: of the normalisation, see `GroupNorm`.  nin_init_scale: that of q, k and v.
    """

    skip_rescale: bool
    init_scale: float
    dtype: Dtype = jnp.float32
    groups: int | None = None
    nin_init_scale: float = 0.1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: (B, H, W, C), kept in shape."""
        batch, height, width, channels = x.shape
        h = GroupNorm(self.dtype, groups=self.groups)(x).reshape(batch, height * width, channels)
        q, k, v = (NIN(channels, self.nin_init_scale, self.dtype)(h) for _ in range(3))
        h = attend(q, k, v).reshape(x.shape)
        h = NIN(channels, self.init_scale, self.dtype)(h)
        return join(x, h, self.skip_rescale)


class ResnetBlockDDPMpp(nn.Module):
    """The residual block of DDPM, eq. (2).

    features: the width of the result; None keeps it.  groups: of the normalisation, see
    `GroupNorm`.  nin_init_scale: that of the shortcut where the width changes.
    """

    act: Activation
    dropout: float
    skip_rescale: bool
    init_scale: float
    features: int | None = None
    dtype: Dtype = jnp.float32
    groups: int | None = None
    nin_init_scale: float = 0.1

    @nn.compact
    def __call__(self, source: Source, temb: Array | None) -> Array:
        """temb: (B, D)."""
        parts, keys = source
        x = jnp.concatenate(parts, axis=-1)
        features = self.features or x.shape[-1]
        h = GroupNorm(self.dtype, self.act, self.groups)(x)
        h = _body(self, h, temb, keys, features, self.groups)
        if x.shape[-1] != features:
            x = NIN(features, self.nin_init_scale, self.dtype)(x)
        return join(x, h, self.skip_rescale)


class ResnetBlockBigGANpp(nn.Module):
    """The residual block of BigGAN, eq. (3), which may also change the size.

    features: the width of the result; None keeps it.
    """

    act: Activation
    dropout: float
    skip_rescale: bool
    init_scale: float
    fir: bool
    fir_kernel: Sequence[float]
    features: int | None = None
    resize: Literal["up", "down"] | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, source: Source, temb: Array | None) -> Array:
        """temb: (B, D)."""
        parts, keys = source
        x = jnp.concatenate(parts, axis=-1)
        features = self.features or x.shape[-1]
        h = GroupNorm(self.dtype, self.act)(x)
        if self.resize is not None:
            change = upsample if self.resize == "up" else downsample
            h, x = (change(v, self.fir, self.fir_kernel) for v in (h, x))
        h = _body(self, h, temb, keys, features)
        if x.shape[-1] != features or self.resize is not None:
            x = conv1x1(features, self.dtype)(x)
        return join(x, h, self.skip_rescale)


def _body(
    block: ResnetBlockDDPMpp | ResnetBlockBigGANpp,
    h: Array,
    temb: Array | None,
    keys: Array | None,
    features: int,
    groups: int | None = None,
) -> Array:
    """What both residual blocks do between their resampling and their sum, within their scope."""
    h = conv3x3(features, block.dtype)(h)
    if temb is not None:
        shift = dense(features, block.dtype)(block.act(temb))
        h = plus(h, shift[:, None, None])
    h = GroupNorm(block.dtype, block.act, groups)(h, keys=keys, rate=block.dropout)
    return conv3x3(features, block.dtype, block.init_scale)(h)
