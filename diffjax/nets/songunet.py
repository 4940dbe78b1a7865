r"""SongUNet: DDPM++ and NCSN++ as EDM trains them, with class and augmentation labels.

Symbols: c_noise is the label of the noise level, e its embedding of width n = nf embedding_mult;
y the class of K as one-hot, a the augmentation labels.

    (1)  e    = sinusoids(c_noise)                          sines first
         e   += Dense(sqrt(K) onehot(y)) + a V              where there are classes, labels
         temb = Dense(silu(Dense(e)))                       width 4 nf
    (2)  out  = unet(x, temb)                               the trunk of `ncsnpp.NCSNpp`

The embedding is the difference from `NCSNpp`: classes enter before the two layers, with a bias, and
a "fourier" network takes its label as it is (EDM gives ln(sigma) / 4, the VE preconditioning
ln(sigma / 2)), where `NCSNpp` takes sigma and its logarithm. The image is used as given and the
result is not divided by sigma: that is the work of the preconditioning.

    SongUNet.ddpmpp()   positional embedding, filter (1, 1)
    SongUNet.ncsnpp()   Fourier embedding twice as wide, filter (1, 3, 3, 1), residual input pyramid

Names of the parameters: map_label, map_augment, map_layer0, map_layer1 for (1), as in EDM's code,
and below "unet" those of `NCSNpp`. The Fourier frequencies are a buffer there and a frozen
parameter here, so the counts differ by n / 2.

References: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
2022, https://arxiv.org/abs/2206.00364, and its code, https://github.com/NVlabs/edm. Song et al.,
"Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
https://arxiv.org/abs/2011.13456.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array
from diffjax.nets import frame, resample
from diffjax.nets.embed import (
    Dtype,
    EmbeddingType,
    GaussianFourierProjection,
    check_dtype,
    default_init,
    per_sample,
    positional_embedding,
    wide,
)
from diffjax.nets.inputs import augment_labels, class_labels
from diffjax.nets.ncsnpp import NCSNpp


class SongUNet(nn.Module):
    """EDM's U-Net: `net.apply(variables, x, label, cond=None, train=False, augment=None)`.

    Sizes (nf, ch_mult, num_res_blocks, attn_resolutions, out_channels), dropout, dtype and remat
    are those of `NCSNpp`. Beside them:

      embedding_type: "positional" or "fourier"; neither takes a logarithm of the label.
      embedding_mult: the embedding's width is nf * embedding_mult.
      fourier_scale: standard deviation of the random frequencies.
      num_classes: K for class labels 0..K-1 as `cond`, -1 standing for no class; None for none.
      label_dropout: probability of training a sample without its class (key "label_dropout").
      augment_dim: numbers a sample in `augment`, 0 for none; 9 for `diffjax.data.Augment`.
      progressive, progressive_input: pyramids, as in `NCSNpp`.
      fir_kernel: the resampling filter; (1, 1) is the nearest pixel and the 2 x 2 mean.
    """

    nf: int = 128
    ch_mult: Sequence[int] = (2, 2, 2)
    num_res_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    out_channels: int | None = None
    dropout: float = 0.1

    embedding_type: EmbeddingType = "positional"
    embedding_mult: int = 1
    fourier_scale: float = 16.0
    num_classes: int | None = None
    label_dropout: float = 0.0
    augment_dim: int = 0

    progressive: Literal["none", "output_skip"] = "none"
    progressive_input: Literal["none", "input_skip", "residual"] = "none"
    fir_kernel: Sequence[float] = (1, 1)

    dtype: Dtype = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        """Checks the options that the trunk does not check."""
        for name in ("ch_mult", "attn_resolutions", "fir_kernel"):
            setattr(self, name, tuple(getattr(self, name)))
        _check_options(self)
        super().__post_init__()

    @classmethod
    def ddpmpp(cls, **options: Any) -> Self:
        """The DDPM++ of EDM's table 7, for 32 pixels: the defaults."""
        return cls(**options)

    @classmethod
    def ncsnpp(cls, **options: Any) -> Self:
        """The NCSN++ of EDM's table 7, for 32 pixels."""
        variant: dict[str, Any] = {
            "embedding_type": "fourier",
            "embedding_mult": 2,
            "progressive_input": "residual",
            "fir_kernel": (1, 3, 3, 1),
        }
        return cls(**{**variant, **options})

    @nn.compact
    def __call__(
        self,
        x: Array,
        label: Array,
        cond: Array | None = None,
        train: bool = False,
        augment: Array | None = None,
    ) -> Array:
        """Maps images at some noise level to the network's raw output, eqs. (1) and (2).

        x: (B, H, W, C), or (H, W, C) under `vmap`; H and W divisible by 2^(levels - 1).
        label: () or (B,).  cond: classes, () or (B,), if and only if num_classes is set.
        augment: (B, augment_dim), or None for images as they are.
        train: turns dropout on, which needs keys "dropout" and, for the classes, "label_dropout".
        Returns x's shape with out_channels, in float32 or wider.
        """
        batched = x.ndim == 4
        x = frame.as_batch(x)
        label = per_sample("label", label, x.shape[:1]).astype(wide(self.dtype))
        rate = self.label_dropout if train else 0.0
        classes = class_labels(self, cond, self.num_classes, len(x), drop=rate)
        labels = augment_labels(augment, self.augment_dim, len(x), label.dtype)
        out = self._unet()(x, self._embed(label, classes, labels), train=train)
        return out if batched else out[0]

    def _embed(self, label: Array, classes: Array | None, labels: Array | None) -> Array:
        """Eq. (1): (B, 4 nf)."""
        width, dtype = self.nf * self.embedding_mult, label.dtype

        def dense(features: int, name: str, use_bias: bool = True) -> nn.Dense:
            init = default_init()
            return nn.Dense(features, use_bias, dtype=dtype, kernel_init=init, name=name)

        if self.embedding_type == "fourier":
            e = GaussianFourierProjection(width // 2, self.fourier_scale)(label)
        else:
            e = positional_embedding(label, width)
        if classes is not None and self.num_classes is not None:
            one_hot = jax.nn.one_hot(classes, self.num_classes, dtype=dtype)
            e = e + dense(width, "map_label")(math.sqrt(self.num_classes) * one_hot)
        if labels is not None:
            e = e + dense(width, "map_augment", use_bias=False)(labels)
        e = nn.silu(dense(4 * self.nf, "map_layer0")(e))
        return dense(4 * self.nf, "map_layer1")(e)

    def _unet(self) -> NCSNpp:
        """The trunk, eq. (2)."""
        return NCSNpp(
            nf=self.nf,
            ch_mult=self.ch_mult,
            num_res_blocks=self.num_res_blocks,
            attn_resolutions=self.attn_resolutions,
            out_channels=self.out_channels,
            dropout=self.dropout,
            fir_kernel=self.fir_kernel,
            progressive=self.progressive,
            progressive_input=self.progressive_input,
            embedding_type="given",
            dtype=self.dtype,
            remat=self.remat,
            name="unet",
        )


def _check_options(net: SongUNet) -> None:
    """Raises ValueError or TypeError for options that cannot be used."""
    checks.at_least("nf", net.nf, 4)
    checks.at_least("num_res_blocks", net.num_res_blocks, 1)
    checks.at_least("len(ch_mult)", len(net.ch_mult), 1)
    for mult in net.ch_mult:
        checks.at_least("ch_mult", mult, 1)
    checks.at_least("embedding_mult", net.embedding_mult, 1)
    checks.at_least("augment_dim", net.augment_dim, 0)
    checks.one_of("embedding_type", net.embedding_type, ("fourier", "positional"))
    checks.one_of("progressive", net.progressive, ("none", "output_skip"))
    checks.one_of("progressive_input", net.progressive_input, ("none", "input_skip", "residual"))
    checks.positive("fourier_scale", net.fourier_scale)
    for name in ("dropout", "label_dropout"):
        checks.in_range(name, getattr(net, name), 0.0, 1.0)
    checks.less("dropout", net.dropout, "one", 1.0)
    for name in ("out_channels", "num_classes"):
        if getattr(net, name) is not None:
            checks.at_least(name, getattr(net, name), 1)
    if net.label_dropout and net.num_classes is None:
        raise ValueError("label_dropout needs num_classes: there is no class to drop.")
    resample.normalised(net.fir_kernel)
    check_dtype(net.dtype)
