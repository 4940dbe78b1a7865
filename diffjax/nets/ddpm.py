r"""DDPM: the first U-Net of diffusion models on images.

    temb = dense(act(dense(positional(label)))) [+ dense(one-hot class)]
    down   h = conv3x3(x); at each level `num_res_blocks` x (block, attention where the height is in
           attn_resolutions), each result kept as a skip; then halve
    middle block, attention, block at the last level's size
    up     at each level num_res_blocks + 1 blocks on [h, skip], and attention; then double
    out    conv3x3(act(norm(h)))

The blocks are those of `blocks`, eqs. (2) and (4), with sums that are not rescaled and with 32
groups whatever the width. Two codes of the same name differ [1, 2]:

    option            [1]       [2] (default)
    up_attention      "block"   "level"     attention after each block on the way up, or once
    nin_init_scale    1.0       0.1         variance scale of q, k, v and the linear shortcuts

so that the network for CIFAR-10 has 35,746,307 parameters in [1] and 35,218,947 in [2].

References:
[1] Ho et al., "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239,
    appendix B, and its code, https://github.com/hojonathanho/diffusion.
[2] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, and its code, https://github.com/yang-song/score_sde.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array
from diffjax.nets import frame
from diffjax.nets.blocks import (
    AttnBlockpp,
    Downsample,
    GroupNorm,
    ResnetBlockDDPMpp,
    Upsample,
    conv3x3,
)
from diffjax.nets.embed import Activation, Dtype, embed_label, per_sample, wide

GROUPS = 32


class ResnetBlockDDPM(ResnetBlockDDPMpp):
    """The residual block under the name that its parameters have in checkpoints."""


class AttnBlock(AttnBlockpp):
    """The attention block under the name that its parameters have in checkpoints."""


class DDPM(nn.Module):
    """The U-Net: `net.apply(variables, x, label, cond=None, train=False, rngs={"dropout": key})`.

    Sizes:
      nf: width of the first level; level l has nf * ch_mult[l] channels, a multiple of 32.
      num_res_blocks: blocks of a level on the way down (one more on the way up).
      attn_resolutions: the image heights at which attention follows the blocks.
      out_channels: channels of the result; None for those of x.

    Blocks:
      up_attention: attention on the way up "level": once a level, or "block": after each block.
      nin_init_scale: variance scale of q, k, v and of shortcuts that change the width.
      resamp_with_conv: whether changes of size carry a convolution.
      nonlinearity: the activation, a function of arrays.
      dropout: rate of zeros before the second convolution of a block, in training only.

    Label and condition:
      conditional: whether the network sees the label (of the order of 0 to 1000) at all.
      num_classes: K for class labels 0..K-1 as `cond`, -1 standing for no class; None for none.
      centered: x lies in [-1, 1]; False maps x in [0, 1] to 2 x - 1 first.
      scale_by_sigma: divides the result by level number `label` of num_scales geometric ones from
        sigma_max (label 0) down to sigma_min.

    Cost: dtype and remat, as in `NCSNpp`.
    """

    nf: int = 128
    ch_mult: Sequence[int] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attn_resolutions: Sequence[int] = (16,)
    out_channels: int | None = None

    up_attention: Literal["level", "block"] = "level"
    nin_init_scale: float = 0.1
    resamp_with_conv: bool = True
    nonlinearity: Activation = nn.swish
    dropout: float = 0.1

    conditional: bool = True
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
        for name in ("ch_mult", "attn_resolutions"):
            setattr(self, name, tuple(getattr(self, name)))
        frame.check_unet(self)
        frame.check_scales(self)
        checks.one_of("up_attention", self.up_attention, ("level", "block"))
        checks.non_negative("nin_init_scale", self.nin_init_scale)
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
        frame.check_index(label, self)
        label = per_sample("label", label, x.shape[:1]).astype(wide(self.dtype))
        temb = None
        if self.conditional:
            temb = embed_label(
                label,
                cond,
                self.nf,
                embedding_type="positional",
                act=self.nonlinearity,
                num_classes=self.num_classes,
            )
        x = x.astype(self.dtype)
        x = x if self.centered else 2 * x - 1

        remat = self.remat and train
        block = partial(self._block, temb=temb, keys=self._dropout_keys(x, train), remat=remat)
        attention = partial(self._attention, remat=remat)
        skips = self._encode(x, block, attention)
        h = block([skips[-1]])
        h = attention(h)
        h = block([h])
        h = self._decode(h, skips, block, attention)
        h = GroupNorm(self.dtype, self.nonlinearity, GROUPS)(h)
        h = conv3x3(self.out_channels or x.shape[-1], self.dtype, init_scale=0.0)(h)

        h = h.astype(wide(self.dtype))
        if self.scale_by_sigma:
            h = frame.divide(h, frame.index_sigma(label, self))
        return h if batched else h[0]

    def _encode(
        self, x: Array, block: Callable[..., Array], attention: Callable[[Array], Array]
    ) -> list[Array]:
        """The way down: every result that the way up will join, the deepest last."""
        skips = [conv3x3(self.nf, self.dtype)(x)]
        for level, mult in enumerate(self.ch_mult):
            if level != 0:
                halve = Downsample(False, (), self.resamp_with_conv, dtype=self.dtype)
                skips.append(halve(skips[-1]))
            for _ in range(self.num_res_blocks):
                h = block([skips[-1]], features=self.nf * mult)
                if h.shape[1] in self.attn_resolutions:
                    h = attention(h)
                skips.append(h)
        return skips

    def _decode(
        self,
        h: Array,
        skips: list[Array],
        block: Callable[..., Array],
        attention: Callable[[Array], Array],
    ) -> Array:
        """The way up: consumes the skips from the deepest on."""
        for level in reversed(range(len(self.ch_mult))):
            for i in reversed(range(self.num_res_blocks + 1)):
                h = block([h, skips.pop()], features=self.nf * self.ch_mult[level])
                here = self.up_attention == "block" or i == 0
                if here and h.shape[1] in self.attn_resolutions:
                    h = attention(h)
            if level != 0:
                h = Upsample(False, (), self.resamp_with_conv, dtype=self.dtype)(h)
        return h

    def _block(
        self,
        parts: list[Array],
        features: int | None = None,
        *,
        temb: Array | None,
        keys: Iterator[Array] | None,
        remat: bool,
    ) -> Array:
        """A new residual block, applied to [h, skip]."""
        block = ResnetBlockDDPM(
            act=self.nonlinearity,
            dropout=self.dropout,
            skip_rescale=False,
            init_scale=0.0,
            features=features,
            dtype=self.dtype,
            groups=GROUPS,
            nin_init_scale=self.nin_init_scale,
        )
        x = (parts, None if keys is None else next(keys))
        return frame.run(self, block, x, temb, remat=remat)

    def _attention(self, h: Array, *, remat: bool) -> Array:
        """A new attention block, applied to h."""
        block = AttnBlock(
            skip_rescale=False,
            init_scale=0.0,
            dtype=self.dtype,
            groups=GROUPS,
            nin_init_scale=self.nin_init_scale,
        )
        return frame.run(self, block, h, remat=remat)

    def _dropout_keys(self, x: Array, train: bool) -> Iterator[Array] | None:
        """Keys (B,) for each residual block in turn, or None where nothing is dropped."""
        if not train or self.dropout == 0:
            return None
        blocks = len(self.ch_mult) * (2 * self.num_res_blocks + 1) + 2
        return frame.dropout_keys(self, x.shape[0], blocks)
