r"""RefineNet: the encoder, the decoder and the normalisation of NCSN and NCSNv2.

Symbols: x is an image of features (B, H, W, C); mu_c and var_c are mean and variance of channel c
over H and W; m and v are mean and variance of the mu_c over c; k is the number of the noise level.

    (1)  norm(x)_c = gamma_c ((x - mu_c) / sqrt(var_c + 1e-5)
                              + alpha_c (mu_c - m) / sqrt(v + 1e-5)) + beta_c
         "InstanceNorm++": what plain instance normalisation forgets, the mean, alpha brings back
    (2)  residual:  h = conv(act(norm(x))); y = x + conv(act(norm(h)))
         coarser:   h = conv(act(norm(x))); y = pool(x) + pool(act(norm(h))), where a pool is a
                    convolution and a 2 x 2 mean or, to keep the size, a dilated convolution
    (3)  refine:    y = rcu(crp(msf(rcu(x_1), rcu(x_2), ...)))
           rcu      residual units of [act, conv] twice
           msf      sum over i of resize(conv(x_i)), to the size of x_1
           crp      x = act(x); x + conv(pool5(x)) + conv(pool5(conv(pool5(x))))

    network:  h = conv(x); encoder levels (2), of which the last two are dilated and keep their
              size; refine from the coarsest level to the finest; conv(act(norm(h)))

In a network conditional on k (NCSN), gamma, alpha and beta are rows k of a table, a norm (1) stands
before every convolution of (3), and pool5 is a mean over 5 x 5 pixels (zeros outside count);
otherwise (NCSNv2) it is a maximum.

The authors published these networks twice, and the two do not compute the same [3, 4]:

    variant                     "jax" [4]       "torch" [2, 3]
    resize in msf               half-pixel      aligned corners
    v in (1), over C channels   divided by C    by C - 1
    third refine of the         2 nf            nf
      smallest network

Names of classes and parameters are those of [4]. Parameters are float32; convolutions run in
`dtype`, normalisation in float32 at least.

References:
[1] Lin et al., "RefineNet: Multi-Path Refinement Networks for High-Resolution Semantic
    Segmentation", 2017, https://arxiv.org/abs/1611.06612.
[2] Song, Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", 2019,
    https://arxiv.org/abs/1907.05600, appendix A, and https://github.com/ermongroup/ncsn.
[3] Song, Ermon, "Improved Techniques for Training Score-Based Generative Models", 2020,
    https://arxiv.org/abs/2006.09011, and https://github.com/ermongroup/ncsnv2.
[4] https://github.com/yang-song/score_sde.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array
from diffjax.nets import frame, resample
from diffjax.nets.embed import Activation, Dtype, check_dtype, wide
from diffjax.nets.linear import Conv

Variant = Literal["jax", "torch"]


class Style(NamedTuple):
    """What all blocks of a network share. levels: of the label, None for unconditional blocks."""

    act: Activation
    levels: int | None
    variant: Variant
    dtype: Dtype


class Plan(NamedTuple):
    """Sizes of a network, the widths in multiples of nf.

    widths, dilations: of the encoder's levels, the finest first; a dilated level keeps the size,
    another halves it, but for the first.  refine: widths of the decoder, the coarsest first.
    """

    widths: tuple[int, ...]
    dilations: tuple[int, ...]
    refine: tuple[int, ...]

    @property
    def halvings(self) -> int:
        """How often the size is halved."""
        return self.dilations.count(1) - 1


def small_plan(variant: Variant) -> Plan:
    """The network for images of 28 to 64 pixels, of NCSN and NCSNv2."""
    third = 2 if variant == "jax" else 1
    return Plan((1, 2, 2, 2), (1, 1, 2, 4), (2, 2, third, 1))


def conv(x: Array, features: int, dtype: Dtype, *, bias: bool = True, dilation: int = 1) -> Array:
    """A 3 x 3 convolution that keeps the size; weights and bias U(-b, b), b = fan_in^{-1/2}."""
    bound = 1 / math.sqrt(9 * x.shape[-1])

    def init(key: Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    layer = Conv(
        features,
        (3, 3),
        kernel_dilation=dilation,
        use_bias=bias,
        dtype=dtype,
        kernel_init=init,
        bias_init=init,
    )
    return layer(x)


def resize(x: Array, shape: Sequence[int], variant: Variant) -> Array:
    """Linear interpolation to (H, W) = shape; the corners of pixels or their centres aligned."""
    sizes = list(zip(x.shape[1:3], shape, strict=True))
    if all(old == new for old, new in sizes):
        return x
    full = (x.shape[0], *shape, x.shape[-1])
    if variant == "jax":
        return jax.image.resize(x, full, "linear")
    # New pixel i lies at i / scale, which the library writes (i + 1/2 - shift) / scale - 1/2.
    # One old pixel alone is spread over all.
    scales = [(new - 1) / (old - 1) if old > 1 else new for old, new in sizes]
    shifts = [(1 - s) / 2 if old > 1 else 0 for s, (old, _) in zip(scales, sizes, strict=True)]
    scale, shift = (jnp.asarray(v, wide(x.dtype)) for v in (scales, shifts))
    return jax.image.scale_and_translate(x, full, (1, 2), scale, shift, "linear", antialias=False)


def _near_one(key: Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Array:
    """N(1, 0.02^2)."""
    return 1 + 0.02 * jax.random.normal(key, shape, dtype)


def _normalised(x: Array, variant: Variant) -> tuple[Array, Array]:
    """The two fractions of eq. (1): (B, H, W, C) and (B, 1, 1, C)."""
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    var = jnp.var(x, axis=(1, 2), keepdims=True)
    ddof = 0 if variant == "jax" else 1
    v = jnp.var(mean, axis=-1, keepdims=True, ddof=ddof)
    means = (mean - jnp.mean(mean, axis=-1, keepdims=True)) * jax.lax.rsqrt(v + 1e-5)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5), means


class InstanceNorm2dPlus(nn.Module):
    """Eq. (1) with one alpha, gamma and beta for all noise levels."""

    variant: Variant = "jax"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: (B, H, W, C), kept in shape."""
        shape = (1, 1, 1, x.shape[-1])
        alpha = self.param("alpha", _near_one, shape, jnp.float32)
        gamma = self.param("gamma", _near_one, shape, jnp.float32)
        beta = self.param("beta", nn.initializers.zeros, shape, jnp.float32)
        h, means = _normalised(x.astype(wide(self.dtype)), self.variant)
        return (gamma * (h + alpha * means) + beta).astype(self.dtype)


class ConditionalInstanceNorm2dPlus(nn.Module):
    """Eq. (1) with a row [gamma, alpha, beta] of a table for each of `levels` noise levels."""

    levels: int
    variant: Variant = "jax"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, level: Array) -> Array:
        """x: (B, H, W, C), kept in shape.  level: (B,), integers below `levels`."""
        channels = x.shape[-1]

        def init(key: Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Array:
            near_one = _near_one(key, (shape[0], 2 * channels), dtype)
            return jnp.concatenate([near_one, jnp.zeros((shape[0], channels), dtype)], axis=-1)

        precise = wide(self.dtype)
        table = nn.Embed(self.levels, 3 * channels, embedding_init=init, dtype=precise)
        gamma, alpha, beta = jnp.split(table(level)[:, None, None], 3, axis=-1)
        h, means = _normalised(x.astype(precise), self.variant)
        return (gamma * (h + alpha * means) + beta).astype(self.dtype)


def norm(x: Array, level: Array | None, style: Style) -> Array:
    """A new normalisation of the style's kind, applied to x, in the module that calls."""
    if style.levels is None or level is None:
        return InstanceNorm2dPlus(style.variant, style.dtype)(x)
    return ConditionalInstanceNorm2dPlus(style.levels, style.variant, style.dtype)(x, level)


def _norm_if_conditional(x: Array, level: Array | None, style: Style) -> Array:
    return x if style.levels is None else norm(x, level, style)


class ConvMeanPool(nn.Module):
    """A convolution and a 2 x 2 mean."""

    features: int
    kernel_size: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) -> (B, H / 2, W / 2, features)."""
        x = Conv(self.features, (self.kernel_size, self.kernel_size), dtype=self.dtype)(x)
        return resample.mean_downsample(x)


class ResidualBlock(nn.Module):
    """Eq. (2). coarser: the second form, to `features` channels; the first keeps the width."""

    features: int
    coarser: bool
    dilation: int
    style: Style

    @nn.compact
    def __call__(self, x: Array, level: Array | None) -> Array:
        """x: (B, H, W, C).  level: (B,) or None."""
        style = self.style

        def convolve(h: Array, features: int) -> Array:
            return conv(h, features, style.dtype, dilation=self.dilation)

        h = style.act(norm(x, level, style))
        h = convolve(h, x.shape[-1])
        h = style.act(norm(h, level, style))
        if not self.coarser:
            return x + convolve(h, self.features)
        if self.dilation > 1:
            h = convolve(h, self.features)
            return h + convolve(x, self.features)
        h = ConvMeanPool(self.features, 3, style.dtype)(h)
        return h + ConvMeanPool(self.features, 1, style.dtype)(x)


class RCUBlock(nn.Module):
    """Residual convolution units."""

    units: int
    style: Style

    @nn.compact
    def __call__(self, x: Array, level: Array | None) -> Array:
        """x: (B, H, W, C), kept in shape."""
        style = self.style
        for _ in range(self.units):
            h = x
            for _ in range(2):
                h = style.act(_norm_if_conditional(h, level, style))
                h = conv(h, x.shape[-1], style.dtype, bias=False)
            x = x + h
        return x


class MSFBlock(nn.Module):
    """Multi-scale fusion: the sum of all inputs at the size of the first."""

    features: int
    style: Style

    @nn.compact
    def __call__(self, xs: Sequence[Array], level: Array | None) -> Array:
        """xs: arrays (B, H_i, W_i, C_i) -> (B, H_0, W_0, features)."""
        style, shape = self.style, xs[0].shape[1:3]
        hs = [_norm_if_conditional(x, level, style) for x in xs]
        hs = [conv(h, self.features, style.dtype) for h in hs]
        return sum((resize(h, shape, style.variant) for h in hs[1:]), hs[0])


class CRPBlock(nn.Module):
    """Chained residual pooling."""

    style: Style

    @nn.compact
    def __call__(self, x: Array, level: Array | None) -> Array:
        """x: (B, H, W, C), kept in shape."""
        style = self.style
        pool: Callable[..., Array] = nn.max_pool if style.levels is None else nn.avg_pool
        x = h = style.act(x)
        for _ in range(2):
            h = _norm_if_conditional(h, level, style)
            precise = h.astype(wide(style.dtype))
            h = pool(precise, (5, 5), strides=(1, 1), padding="SAME").astype(style.dtype)
            h = conv(h, x.shape[-1], style.dtype, bias=False)
            x = x + h
        return x


class RefineBlock(nn.Module):
    """Eq. (3). end: of the decoder, with three units at last instead of one."""

    features: int
    end: bool
    style: Style

    @nn.compact
    def __call__(self, xs: Sequence[Array], level: Array | None) -> Array:
        """xs: arrays (B, H_i, W_i, C_i); one alone, of the width `features`, meets no fusion."""
        style = self.style
        prefix = "" if style.levels is None else "Cond"
        hs = [RCUBlock(2, style, name=f"{prefix}RCUBlock_{i}")(x, level) for i, x in enumerate(xs)]
        h = hs[0]
        if len(hs) > 1:
            h = MSFBlock(self.features, style, name=f"{prefix}MSFBlock_0")(hs, level)
        h = CRPBlock(style, name=f"{prefix}CRPBlock_0")(h, level)
        units = 3 if self.end else 1
        return RCUBlock(units, style, name=f"{prefix}RCUBlock_{len(hs)}")(h, level)


def refine_net(
    net: nn.Module, x: Array, level: Array | None, nf: int, plan: Plan, style: Style, remat: bool
) -> Array:
    """The whole network, within the compact method of `net`: x of shape (B, H, W, C), kept."""
    kind = "Residual" if style.levels is None else "ConditionalResidual"
    h = conv(x, nf, style.dtype)
    skips: list[Array] = []
    for i, (width, dilation) in enumerate(zip(plan.widths, plan.dilations, strict=True)):
        for j, coarser in enumerate((i > 0, False)):
            name = f"{kind}Block_{2 * i + j}"
            block = ResidualBlock(width * nf, coarser, dilation, style, name=name)
            h = frame.run(net, block, h, level, remat=remat)
        skips.append(h)

    xs: list[Array] = []
    prefix = "" if style.levels is None else "Cond"
    for i, width in enumerate(plan.refine):
        end = i == len(plan.refine) - 1
        refine = RefineBlock(width * nf, end, style, name=f"{prefix}RefineBlock_{i}")
        xs = [frame.run(net, refine, [skips.pop(), *xs], level, remat=remat)]
    h = style.act(norm(xs[0], level, style))
    return conv(h, x.shape[-1], style.dtype)


def check_options(net: Any) -> None:
    """Raises ValueError or TypeError for options of NCSN or NCSNv2 that cannot be used."""
    checks.at_least("nf", net.nf, 1)
    checks.one_of("variant", net.variant, ("jax", "torch"))
    check_dtype(net.dtype)
