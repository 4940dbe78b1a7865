r"""DDPM++ and NCSN++: the U-Nets of score-based models on images.

One class with the options of the reference code, under its names. NCSN++ is biggan blocks, FIR
resampling and a residual input pyramid; DDPM++ is the same without FIR and pyramid.

    temb = dense(act(dense(embedding(label)))) [+ dense(one-hot class)]
    down   h = conv3x3(x); at each level `num_res_blocks` x (block, attention where the height is in
           attn_resolutions), each result kept as a skip; then halve, joining the input pyramid
    middle block, attention, block at the last level's size
    up     at each level num_res_blocks + 1 blocks on [h, skip], attention, the output pyramid; then
           double
    out    conv3x3(act(norm(h))), or the output pyramid where `progressive` is "output_skip"

The input pyramid brings the image itself, halved level by level, to every level: as a sum or
concatenation after a 1 x 1 convolution ("input_skip"), or by strided convolutions along a path that
replaces h ("residual"). The output pyramid mirrors it.

Reference: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
2021, https://arxiv.org/abs/2011.13456, section 4.4 and appendix H.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array
from diffjax.nets import frame, resample
from diffjax.nets.blocks import (
    AttnBlockpp,
    Combine,
    Downsample,
    GroupNorm,
    ResnetBlockBigGANpp,
    ResnetBlockDDPMpp,
    Upsample,
    conv3x3,
    join,
)
from diffjax.nets.embed import (
    Activation,
    Dtype,
    EmbeddingType,
    embed_label,
    per_sample,
    wide,
)

Block = Callable[..., Array]
Attention = Callable[[Array], Array]


class NCSNpp(nn.Module):
    """The U-Net: `net.apply(variables, x, label, cond=None, train=False, rngs={"dropout": key})`.

    Sizes:
      nf: width of the first level; level l has nf * ch_mult[l] channels.
      num_res_blocks: blocks of a level on the way down (one more on the way up).
      attn_resolutions: the image heights at which attention follows the blocks.
      out_channels: channels of the result; None for those of x.

    Blocks:
      resblock_type: "ddpm", or "biggan" whose blocks also change the size.
      resamp_with_conv: whether "ddpm" changes of size carry a convolution.
      nonlinearity: the activation, a function of arrays.
      dropout: rate of zeros before the second convolution of a block, in training only.
      skip_rescale: divides every sum of two branches by sqrt(2).
      init_scale: variance scale of the last layer of each block and of the heads; 0 means 1e-10.
      fir, fir_kernel: resampling through this filter, or nearest pixel and 2 x 2 mean.

    Pyramids:
      progressive: how the output is gathered: "none", "output_skip" or "residual".
      progressive_input: how the input reaches each level: "none", "input_skip" or "residual".
      progressive_combine: "input_skip" joins by "sum" or "cat".

    Label and condition:
      conditional: whether the network sees the label at all.
      embedding_type: "fourier" (label is sigma > 0; the network takes its logarithm) or
        "positional" (label of the order of 0 to 1000, such as 999 t), or "given": the label is temb
        itself, (B, D), which another module made (see `songunet`).
      fourier_scale: standard deviation of the random frequencies.
      num_classes: K for class labels 0..K-1 as `cond`, -1 standing for no class; None for none.
      centered: x lies in [-1, 1]; False maps x in [0, 1] to 2 x - 1 first.
      scale_by_sigma: divides the result by sigma: the label of a "fourier" network; of a
        "positional" one, level number `label` of num_scales geometric ones from sigma_max (label 0)
        down to sigma_min.

    Cost:
      dtype: type of the convolutions; parameters stay float32, and so do normalisation, softmax and
        embeddings (see `blocks`). The result is float32, or `dtype` where that is wider.
      remat: recomputes each block in the backward pass of training (train=True, which then has
        reverse mode only): a third of the memory for about a third more time.
    """

    nf: int = 128
    ch_mult: Sequence[int] = (1, 2, 2, 2)
    num_res_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    out_channels: int | None = None

    resblock_type: Literal["ddpm", "biggan"] = "biggan"
    resamp_with_conv: bool = True
    nonlinearity: Activation = nn.swish
    dropout: float = 0.1
    skip_rescale: bool = True
    init_scale: float = 0.0
    fir: bool = True
    fir_kernel: Sequence[float] = (1, 3, 3, 1)

    progressive: Literal["none", "output_skip", "residual"] = "none"
    progressive_input: Literal["none", "input_skip", "residual"] = "residual"
    progressive_combine: Literal["sum", "cat"] = "sum"

    conditional: bool = True
    embedding_type: EmbeddingType | Literal["given"] = "fourier"
    fourier_scale: float = 16.0
    num_classes: int | None = None
    centered: bool = True
    scale_by_sigma: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    num_scales: int | None = None

    dtype: Dtype = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        """Checks the options that do not depend on the data; __call__ checks the rest."""
        for name in ("ch_mult", "attn_resolutions", "fir_kernel"):
            setattr(self, name, tuple(getattr(self, name)))
        _check_options(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Array, label: Array, cond: Array | None = None, train: bool = False
    ) -> Array:
        """Maps images at some noise level to the network's raw output.

        x: (B, H, W, C), or (H, W, C) under `vmap`; H and W divisible by 2^(levels - 1).
        label: () or (B,).  cond: class labels, () or (B,), if and only if num_classes is set.
        train: turns dropout on, which then needs a key named "dropout".
        Returns x's shape with out_channels, in float32 or wider.
        """
        batched = x.ndim == 4
        x = frame.as_batch(x)
        frame.check_unet_image(x, self.ch_mult, self.attn_resolutions)
        temb: Array | None = None
        if self.embedding_type == "given":
            temb = _check_embedding(label, len(x)).astype(wide(self.dtype))
        else:
            if self.embedding_type == "positional":
                frame.check_index(label, self)
            label = per_sample("label", label, x.shape[:1]).astype(wide(self.dtype))
        if self.embedding_type != "given" and self.conditional:
            temb = embed_label(
                label,
                cond,
                self.nf,
                embedding_type=self.embedding_type,
                fourier_scale=self.fourier_scale,
                act=self.nonlinearity,
                num_classes=self.num_classes,
            )
        x = x.astype(self.dtype)
        x = x if self.centered else 2 * x - 1

        block = partial(self._block, temb=temb, keys=self._dropout_keys(x, train), train=train)
        attention = partial(self._attention, train=train)
        skips = self._encode(x, block, attention)
        h = block([skips[-1]])
        h = attention(h)
        h = block([h])
        h = self._decode(h, skips, block, attention, self.out_channels or x.shape[-1])

        h = h.astype(wide(self.dtype))
        if self.scale_by_sigma:
            fourier = self.embedding_type == "fourier"
            h = frame.divide(h, label if fourier else frame.index_sigma(label, self))
        return h if batched else h[0]

    def _encode(self, x: Array, block: Block, attention: Attention) -> list[Array]:
        """The way down: every result that the way up will join, the deepest last."""
        pyramid = x
        skips = [conv3x3(self.nf, self.dtype)(x)]
        last = len(self.ch_mult) - 1
        for level, mult in enumerate(self.ch_mult):
            for _ in range(self.num_res_blocks):
                h = block([skips[-1]], features=self.nf * mult)
                if h.shape[1] in self.attn_resolutions:
                    h = attention(h)
                skips.append(h)
            if level != last:
                h = self._halve(skips[-1], block)
                h, pyramid = self._join_input(h, pyramid)
                skips.append(h)
        return skips

    def _join_input(self, h: Array, pyramid: Array) -> tuple[Array, Array]:
        """Halves the input pyramid and brings it to h: the new h and pyramid."""
        if self.progressive_input == "input_skip":
            pyramid = Downsample(self.fir, self.fir_kernel, with_conv=False)(pyramid)
            return Combine(self.progressive_combine, self.dtype)(pyramid, h), pyramid
        if self.progressive_input == "residual":
            halve = Downsample(self.fir, self.fir_kernel, True, h.shape[-1], self.dtype)
            h = join(halve(pyramid), h, self.skip_rescale)
            return h, h
        return h, pyramid

    def _decode(
        self, h: Array, skips: list[Array], block: Block, attention: Attention, channels: int
    ) -> Array:
        """The way up and out: consumes the skips from the deepest on."""
        pyramid: Array | None = None
        for level in reversed(range(len(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                h = block([h, skips.pop()], features=self.nf * self.ch_mult[level])
            if h.shape[1] in self.attn_resolutions:
                h = attention(h)
            h, pyramid = self._join_output(h, pyramid, channels)
            if level != 0:
                h = self._double(h, block)
        if pyramid is not None and self.progressive == "output_skip":
            return pyramid
        return self._head(h, channels)

    def _join_output(
        self, h: Array, pyramid: Array | None, channels: int
    ) -> tuple[Array, Array | None]:
        """Doubles the output pyramid and joins h: the new h and pyramid."""
        if self.progressive == "output_skip":
            if pyramid is not None:
                pyramid = Upsample(self.fir, self.fir_kernel, with_conv=False)(pyramid)
            out = self._head(h, channels)
            return h, out if pyramid is None else pyramid + out
        if self.progressive == "residual":
            if pyramid is None:
                return h, self._head(h, h.shape[-1], init_scale=1.0)
            double = Upsample(self.fir, self.fir_kernel, True, h.shape[-1], self.dtype)
            h = join(double(pyramid), h, self.skip_rescale)
            return h, h
        return h, None

    def _head(self, h: Array, channels: int, init_scale: float | None = None) -> Array:
        scale = self.init_scale if init_scale is None else init_scale
        h = GroupNorm(self.dtype, self.nonlinearity)(h)
        return conv3x3(channels, self.dtype, scale)(h)

    def _halve(self, h: Array, block: Block) -> Array:
        if self.resblock_type == "biggan":
            return block([h], resize="down")
        return Downsample(self.fir, self.fir_kernel, self.resamp_with_conv, dtype=self.dtype)(h)

    def _double(self, h: Array, block: Block) -> Array:
        if self.resblock_type == "biggan":
            return block([h], resize="up")
        return Upsample(self.fir, self.fir_kernel, self.resamp_with_conv, dtype=self.dtype)(h)

    def _block(
        self,
        parts: list[Array],
        features: int | None = None,
        resize: Literal["up", "down"] | None = None,
        *,
        temb: Array | None,
        keys: Iterator[Array] | None,
        train: bool,
    ) -> Array:
        """A new residual block of the chosen type, applied to [h, skip]."""
        block: nn.Module
        shared: dict[str, Any] = {
            "act": self.nonlinearity,
            "dropout": self.dropout,
            "skip_rescale": self.skip_rescale,
            "init_scale": self.init_scale,
            "features": features,
            "dtype": self.dtype,
        }
        if self.resblock_type == "biggan":
            block = ResnetBlockBigGANpp(
                fir=self.fir, fir_kernel=self.fir_kernel, resize=resize, **shared
            )
        else:
            block = ResnetBlockDDPMpp(**shared)
        x = (parts, None if keys is None else next(keys))
        return frame.run(self, block, x, temb, remat=self.remat and train)

    def _attention(self, h: Array, *, train: bool) -> Array:
        """A new attention block, applied to h."""
        block = AttnBlockpp(self.skip_rescale, self.init_scale, self.dtype)
        return frame.run(self, block, h, remat=self.remat and train)

    def _dropout_keys(self, x: Array, train: bool) -> Iterator[Array] | None:
        """Keys (B,) for each residual block in turn, or None where nothing is dropped."""
        if not train or self.dropout == 0:
            return None
        levels = len(self.ch_mult)
        resizes = 2 * (levels - 1) if self.resblock_type == "biggan" else 0
        blocks = levels * (2 * self.num_res_blocks + 1) + resizes + 2
        return frame.dropout_keys(self, x.shape[0], blocks)


def _check_embedding(temb: Array, batch: int) -> Array:
    """temb if it is (batch, D); raises ValueError for any other shape."""
    if temb.ndim != 2 or temb.shape[0] != batch:
        raise ValueError(
            f"an embedding that is given must have shape ({batch}, D); got {temb.shape}."
        )
    return temb


def _check_options(net: NCSNpp) -> None:
    """Raises ValueError or TypeError for options that cannot be used."""
    frame.check_unet(net)
    checks.non_negative("init_scale", net.init_scale)
    checks.positive("fourier_scale", net.fourier_scale)
    checks.one_of("resblock_type", net.resblock_type, ("ddpm", "biggan"))
    checks.one_of("progressive", net.progressive, ("none", "output_skip", "residual"))
    checks.one_of("progressive_input", net.progressive_input, ("none", "input_skip", "residual"))
    checks.one_of("progressive_combine", net.progressive_combine, ("sum", "cat"))
    checks.one_of("embedding_type", net.embedding_type, ("fourier", "positional", "given"))
    if net.embedding_type == "given" and (
        net.num_classes is not None or net.scale_by_sigma or not net.conditional
    ):
        raise ValueError(
            "embedding_type='given' leaves label and class to the caller: num_classes, "
            "scale_by_sigma and conditional=False have no meaning. Leave them at their defaults."
        )
    resample.normalised(net.fir_kernel)
    if net.resblock_type == "biggan" and not net.resamp_with_conv:
        raise ValueError(
            "resamp_with_conv=False has no meaning for resblock_type='biggan', whose blocks change "
            "the size themselves. Choose resblock_type='ddpm', or leave it True."
        )
    if net.progressive_combine == "cat" and net.progressive_input != "input_skip":
        raise ValueError(
            "progressive_combine='cat' is used by progressive_input='input_skip' only; got "
            f"progressive_input={net.progressive_input!r}."
        )
    if net.embedding_type == "positional":
        frame.check_scales(net)
    elif not (net.sigma_min is net.sigma_max is net.num_scales is None):
        raise ValueError(
            "sigma_min, sigma_max and num_scales belong to embedding_type='positional'; the label "
            "of a 'fourier' network is sigma itself. Leave them None."
        )
