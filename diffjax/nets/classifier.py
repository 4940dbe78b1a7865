r"""A wide residual network that classifies noisy images, told the noise level.

Symbols: x is an image of n = H W C values; sigma is its noise level; B, K are samples and classes.

    (1)  x    <- (x - mean(x)) / max(std(x), 1/sqrt(n)),   mean and std of each image
    (2)  temb  = dense(swish(dense(fourier(log sigma))))
    (3)  block:  h = conv3x3(relu(norm(x))) + dense(swish(temb))
                 y = x + conv3x3(relu(norm(h)))
         the first block of a group may halve the size; x then meets a mean over the halved pixels.
         Where the width grows, x is filled up with zeros. In the very first block x is replaced by
         relu(norm(x)) in the sum too.
    (4)  logits = dense(mean over pixels of relu(norm(h))) of conv3x3 and three groups of blocks

The widths are 16 channel_multiplier (1, 2, 4); 4 blocks a group and a multiplier of 10 make
WRN-28-10. norm has min(C // 4, 32) groups, in the place of batch statistics: a sample does not
depend on its neighbours. Names of classes and parameters are those of the reference code.

References: Zagoruyko, Komodakis, "Wide Residual Networks", 2016, https://arxiv.org/abs/1605.07146.
Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
https://arxiv.org/abs/2011.13456, appendix I.1, and https://github.com/yang-song/score_sde.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array
from diffjax.nets import frame
from diffjax.nets.blocks import GroupNorm
from diffjax.nets.embed import (
    Dtype,
    GaussianFourierProjection,
    check_dtype,
    per_sample,
    wide,
)
from diffjax.nets.linear import Conv, plus


def _norm_relu(x: Array, name: str, dtype: Dtype) -> Array:
    return GroupNorm(dtype, nn.relu, epsilon=1e-5, name=name)(x)


def _conv(features: int, name: str, dtype: Dtype, stride: int = 1) -> Conv:
    """A 3 x 3 convolution without bias, normal weights of variance 2 / fan_out."""
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return Conv(
        features,
        (3, 3),
        strides=stride,
        use_bias=False,
        dtype=dtype,
        kernel_init=init,
        name=name,
    )


def _head_init(key: Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Array:
    """U(-b, b) with b = 1 / sqrt(classes)."""
    bound = 1 / math.sqrt(shape[-1])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class WideResnetBlock(nn.Module):
    """Eq. (3). first: of the whole network."""

    features: int
    stride: int
    first: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, temb: Array) -> Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, features).  temb: (B, D)."""
        h = _norm_relu(x, "init_bn", self.dtype)
        x = h if self.first else x
        h = _conv(self.features, "conv1", self.dtype, self.stride)(h)
        shift = nn.Dense(self.features, dtype=wide(self.dtype))(nn.swish(temb))
        h = plus(h, shift[:, None, None])
        h = _norm_relu(h, "bn_2", self.dtype)
        h = _conv(self.features, "conv2", self.dtype)(h)
        if self.stride > 1:
            window = (self.stride, self.stride)
            x = nn.avg_pool(x.astype(wide(self.dtype)), window, window).astype(self.dtype)
        return h + jnp.pad(x, [(0, 0)] * 3 + [(0, self.features - x.shape[-1])])


class WideResnetGroup(nn.Module):
    """Blocks of one width, of which the first has the stride. first: of the whole network."""

    blocks: int
    features: int
    stride: int
    first: bool
    remat: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, temb: Array) -> Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, features).  temb: (B, D)."""
        for i in range(self.blocks):
            stride, first = (self.stride, self.first) if i == 0 else (1, False)
            block = WideResnetBlock(self.features, stride, first, self.dtype)
            x = frame.run(self, block, x, temb, remat=self.remat)
        return x


class WideResNet(nn.Module):
    """The classifier: `net.apply(variables, x, label)` gives logits (B, K).

    num_outputs: K, the number of classes.
    blocks_per_group, channel_multiplier: depth and width; (4, 10) is WRN-28-10.
    fourier_scale: standard deviation of the random frequencies.
    channel_mean, channel_std: taken off and divided by, channel by channel, before eq. (1); None
      leaves x. The reference code does it outside of the network, on x = x0 + sigma z with x0 in
      [0, 1], with the mean and the standard deviation of CIFAR-10's training images, (0.49139968,
      0.48215841, 0.44653091) and (0.24703223, 0.24348513, 0.26158784). The units are those of x:
      for x0 in [-1, 1] they are 2 mean - 1 and 2 std.
    dtype, remat: as in `NCSNpp`.
    """

    num_outputs: int = 10
    blocks_per_group: int = 4
    channel_multiplier: int = 10
    fourier_scale: float = 16.0
    channel_mean: Sequence[float] | None = None
    channel_std: Sequence[float] | None = None

    dtype: Dtype = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        """Checks the options that do not depend on the data; __call__ checks the rest."""
        for name in ("channel_mean", "channel_std"):
            if getattr(self, name) is not None:
                setattr(self, name, tuple(getattr(self, name)))
        for name in ("num_outputs", "blocks_per_group", "channel_multiplier"):
            checks.at_least(name, getattr(self, name), 1)
        checks.positive("fourier_scale", self.fourier_scale)
        if self.channel_std is not None:
            checks.positive("channel_std", np.asarray(self.channel_std))
        check_dtype(self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, label: Array, train: bool = False) -> Array:
        """The logits of noisy images: softmax gives p(class | x_t).

        x: x0 + sigma z, not scaled by sigma, (B, H, W, C) with H and W divisible by 4, or (H, W, C)
        under `vmap`.  label: sigma > 0, in the units of x, () or (B,).  train: has no effect but
        that of `remat`; there is no dropout.  Returns (B, K), or (K,), in float32 or wider.
        """
        batched = x.ndim == 4
        x = frame.as_batch(x)
        frame.check_size(x, 2, "crop them")
        checks.positive("label", label)
        precise = wide(self.dtype)
        label = per_sample("label", label, x.shape[:1]).astype(precise)
        x = _standardised(self._channels_normalised(x.astype(precise))).astype(self.dtype)

        temb = GaussianFourierProjection(128, self.fourier_scale)(jnp.log(label))
        temb = nn.Dense(512, dtype=precise)(temb)
        temb = nn.Dense(512, dtype=precise)(nn.swish(temb))

        h = _conv(16, "init_conv", self.dtype)(x)
        shared: dict[str, Any] = {"remat": self.remat and train, "dtype": self.dtype}
        for i, (mult, stride) in enumerate(((1, 1), (2, 2), (4, 2))):
            width = 16 * self.channel_multiplier * mult
            h = WideResnetGroup(self.blocks_per_group, width, stride, i == 0, **shared)(h, temb)
        h = _norm_relu(h, "pre-pool-bn", self.dtype).astype(precise)
        logits = nn.Dense(self.num_outputs, dtype=precise, kernel_init=_head_init)(
            jnp.mean(h, axis=(1, 2))
        )
        return logits if batched else logits[0]

    def _channels_normalised(self, x: Array) -> Array:
        """x in units of the data's channels."""
        for name in ("channel_mean", "channel_std"):
            values = getattr(self, name)
            if values is not None and len(values) != x.shape[-1]:
                raise ValueError(
                    f"{name} must have one value a channel of x, {x.shape[-1]}; got {values}."
                )
        if self.channel_mean is not None:
            x = x - jnp.asarray(self.channel_mean, x.dtype)[None, None, None]
        if self.channel_std is not None:
            x = x / jnp.asarray(self.channel_std, x.dtype)[None, None, None]
        return x


def _standardised(x: Array) -> Array:
    """Eq. (1)."""
    mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
    # The floor inside the root: the gradient of std at a constant image would not be finite.
    floor = 1 / math.prod(x.shape[1:])
    var = jnp.mean(jnp.square(x - mean), axis=(1, 2, 3), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.maximum(var, floor))
