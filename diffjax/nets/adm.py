r"""ADM: the U-Net of "Diffusion Models Beat GANs", also EDM's DhariwalUNet.

Symbols: x is an image of features (B, H, W, C); temb the embedding of label, class and
augmentation; norm a group normalisation of min(C // 4, 32) groups with epsilon 1e-5.

    (1)  e    = [cos, sin](label) + a V                     a: augmentation labels
         temb = silu(Dense(silu(Dense(e))) + onehot(y) T)   y: class, T: a table (K, 4 nf)
    (2)  block: h = conv3x3(resize(silu(norm(x))));  (s, b) = Dense(temb)
                h = conv3x3(dropout(silu(norm(h) (1 + s) + b)))
                y = shortcut(resize(x)) + h                 1 x 1 convolution where widths differ
    (3)  attention: y = x + proj(softmax(q k^T / sqrt(d)) v),  (q, k, v) = qkv(norm(x)), d a head

    down   conv3x3(x); at each level num_res_blocks x (block, attention where the height is in
           attn_resolutions), each kept as a skip; then a block that halves
    middle block, attention, block
    up     at each level num_res_blocks + 1 x (block on [h, skip], attention); a block that doubles
    out    conv3x3(silu(norm(h)))

Unlike NCSN++, attention follows every block of the way up, the shortcut of a block that only
changes the size has no weights, and sums are not rescaled. Second convolutions, `proj`, `out_conv`
and `map_augment` start at exactly zero, the table at N(0, 1), all else as PyTorch's defaults.

Parameter order: qkv holds (q, k, v) first, heads within each, channels within a head. OpenAI's
released files store (head, q/k/v, channel), save the 64-pixel model, which is as here; EDM's store
(head, channel, q/k/v): an import permutes. Blocks and attentions are numbered in calling order.

OpenAI's code always has 32 groups: the same at every published width. Its four models are

    64 px    nf 192, ch_mult (1, 2, 3, 4), 3 blocks      128 px   256, (1, 1, 2, 3, 4), 2, 4 heads
    256 px   256, (1, 1, 2, 2, 4, 4), 2                  512 px   256, (.5, 1, 1, 2, 2, 4, 4), 2

each with out_channels 6: the second three channels are the learned variance.

References: Dhariwal, Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021,
https://arxiv.org/abs/2105.05233. Karras et al., "Elucidating the Design Space of Diffusion-Based
Generative Models", 2022, https://arxiv.org/abs/2206.00364.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array
from diffjax.nets import frame
from diffjax.nets.blocks import GroupNorm, Source, attend, downsample, upsample
from diffjax.nets.embed import Dtype, check_dtype, per_sample, wide
from diffjax.nets.inputs import augment_labels, class_labels, cosine_embedding
from diffjax.nets.linear import Conv, Dense

EPS = 1e-5


def _uniform(fan_in: int) -> Callable[..., Array]:
    """Uniform within 1 / sqrt(fan_in): PyTorch's default for kernels and biases."""

    def init(key: Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5

    return init


def _inits(fan_in: int, zero: bool) -> dict[str, Any]:
    init = nn.initializers.zeros if zero else _uniform(fan_in)
    return {"kernel_init": init, "bias_init": init}


def _conv(
    x: Array, features: int, size: int, dtype: Dtype, *, name: str, zero: bool = False
) -> Array:
    """A size x size convolution of x, zero-padded."""
    inits = _inits(size * size * x.shape[-1], zero)
    return Conv(features, (size, size), dtype=dtype, name=name, **inits)(x)


def _dense(x: Array, features: int, dtype: Dtype, *, name: str, zero: bool = False) -> Array:
    """A linear map of x."""
    return Dense(features, dtype=dtype, name=name, **_inits(x.shape[-1], zero))(x)


class ADMBlock(nn.Module):
    """The residual block, eq. (2). features: the width of the result; None keeps it."""

    dropout: float
    features: int | None = None
    resize: Literal["up", "down"] | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, source: Source, temb: Array) -> Array:
        """temb: (B, D), after its activation."""
        parts, keys = source
        x = jnp.concatenate(parts, axis=-1)
        features = self.features or x.shape[-1]
        h = GroupNorm(self.dtype, nn.silu, epsilon=EPS, name="norm0")(x)
        if self.resize is not None:
            change = upsample if self.resize == "up" else downsample
            h, x = (change(v, False, ()) for v in (h, x))
        h = _conv(h, features, 3, self.dtype, name="conv0")
        film = _dense(temb, 2 * features, wide(self.dtype), name="affine")
        scale, shift = jnp.split(film, 2, axis=-1)
        norm1 = GroupNorm(self.dtype, nn.silu, epsilon=EPS, name="norm1")
        h = norm1(h, (1 + scale, shift), keys, self.dropout)
        h = _conv(h, features, 3, self.dtype, name="conv1", zero=True)
        if x.shape[-1] != features:
            x = _conv(x, features, 1, self.dtype, name="skip")
        return x + h


class ADMAttention(nn.Module):
    """Self-attention over all pixels with several heads, eq. (3)."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: (B, H, W, C), kept in shape."""
        batch, height, width, channels = x.shape
        h = GroupNorm(self.dtype, epsilon=EPS, name="norm")(x).reshape(
            batch, height * width, channels
        )
        h = _dense(h, 3 * channels, self.dtype, name="qkv")
        q, k, v = jnp.moveaxis(h.reshape(batch, height * width, 3, self.heads, -1), 2, 0)
        h = jax.vmap(attend, in_axes=2, out_axes=2)(q, k, v).reshape(x.shape)
        return x + _dense(h, channels, self.dtype, name="proj", zero=True)


class ADM(nn.Module):
    """The U-Net: `net.apply(variables, x, label, cond=None, train=False, augment=None)`.

    Sizes:
      nf: unit of width; level l has int(nf * ch_mult[l]) channels, the embedding 4 nf.
      num_res_blocks: blocks of a level on the way down (one more on the way up).
      attn_resolutions: the image heights at which attention follows each block.
      channels_per_head: width of a head of attention.
      num_heads: number of heads instead, whatever the width; None goes by channels_per_head.
      out_channels: channels of the result, twice those of x with a learned variance; None for x's.

    Label and condition:
      num_classes: K for class labels 0..K-1 as `cond`, -1 standing for no class; None for none.
      label_dropout: probability of training a sample without its class (key "label_dropout").
      augment_dim: numbers a sample in `augment`, 0 for none; 9 for `diffjax.data.Augment`.

    Cost and regularisation:
      dropout: rate of zeros before the second convolution of a block, in training only.
      dtype: type of convolutions and linear maps; parameters stay float32, and so do normalisation,
        softmax and embeddings. The result is float32, or `dtype` where that is wider.
      remat: recomputes each block in the backward pass of training (reverse mode only).
    """

    nf: int = 192
    ch_mult: Sequence[float] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attn_resolutions: Sequence[int] = (32, 16, 8)
    channels_per_head: int = 64
    num_heads: int | None = None
    out_channels: int | None = None

    num_classes: int | None = None
    label_dropout: float = 0.0
    augment_dim: int = 0

    dropout: float = 0.1
    dtype: Dtype = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        """Checks the options that do not depend on the data; __call__ checks the rest."""
        for name in ("ch_mult", "attn_resolutions"):
            setattr(self, name, tuple(getattr(self, name)))
        _check_options(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Array,
        label: Array,
        cond: Array | None = None,
        train: bool = False,
        augment: Array | None = None,
    ) -> Array:
        """Maps images at some noise level to the network's raw output.

        x: (B, H, W, C), or (H, W, C) under `vmap`; H and W divisible by 2^(levels - 1).
        label: () or (B,), such as 0..999.  cond: classes, () or (B,), if and only if num_classes.
        augment: (B, augment_dim), or None for images as they are.
        train: turns dropout on, which needs keys "dropout" and, for the classes, "label_dropout".
        Returns x's shape with out_channels, in float32 or wider.
        """
        batched = x.ndim == 4
        x = frame.as_batch(x)
        frame.check_unet_image(x, self.ch_mult, self.attn_resolutions)
        channels = self.out_channels or x.shape[-1]
        label = per_sample("label", label, x.shape[:1]).astype(wide(self.dtype))
        rate = self.label_dropout if train else 0.0
        classes = class_labels(self, cond, self.num_classes, len(x), drop=rate)
        labels = augment_labels(augment, self.augment_dim, len(x), label.dtype)
        temb = self._embed(label, classes, labels)

        remat = self.remat and train
        keys = self._dropout_keys(len(x)) if train and self.dropout else None
        block = partial(self._block, temb=temb, keys=keys, remat=remat)
        attention = partial(self._attention, remat=remat)
        h = self._trunk(x.astype(self.dtype), block, attention)
        h = GroupNorm(self.dtype, nn.silu, epsilon=EPS, name="out_norm")(h)
        h = _conv(h, channels, 3, self.dtype, name="out_conv", zero=True).astype(wide(self.dtype))
        return h if batched else h[0]

    def _embed(self, label: Array, classes: Array | None, labels: Array | None) -> Array:
        """Eq. (1): (B, 4 nf), after the last activation."""
        dtype = label.dtype
        e = cosine_embedding(label, self.nf)
        if labels is not None:
            zero = nn.initializers.zeros
            augment = nn.Dense(
                self.nf, use_bias=False, dtype=dtype, kernel_init=zero, name="map_augment"
            )
            e = e + augment(labels)
        e = nn.silu(_dense(e, 4 * self.nf, dtype, name="map_layer0"))
        e = _dense(e, 4 * self.nf, dtype, name="map_layer1")
        if classes is not None and self.num_classes is not None:
            table = nn.Dense(
                4 * self.nf,
                use_bias=False,
                dtype=dtype,
                kernel_init=nn.initializers.normal(1.0),
                name="map_label",
            )
            e = e + table(jax.nn.one_hot(classes, self.num_classes, dtype=dtype))
        return nn.silu(e)

    def _trunk(
        self, x: Array, block: Callable[..., Array], attention: Callable[[Array], Array]
    ) -> Array:
        """The way down, the middle and the way up."""
        widths = [int(self.nf * mult) for mult in self.ch_mult]

        def attend_here(h: Array) -> Array:
            return attention(h) if h.shape[1] in self.attn_resolutions else h

        skips = [_conv(x, widths[0], 3, self.dtype, name="in_conv")]
        for level, features in enumerate(widths):
            if level != 0:
                skips.append(block([skips[-1]], resize="down"))
            for _ in range(self.num_res_blocks):
                skips.append(attend_here(block([skips[-1]], features=features)))
        h = block([attention(block([skips[-1]]))])
        for level, features in reversed(list(enumerate(widths))):
            for _ in range(self.num_res_blocks + 1):
                h = attend_here(block([h, skips.pop()], features=features))
            if level != 0:
                h = block([h], resize="up")
        return h

    def _block(
        self,
        parts: list[Array],
        features: int | None = None,
        resize: Literal["up", "down"] | None = None,
        *,
        temb: Array,
        keys: Iterator[Array] | None,
        remat: bool,
    ) -> Array:
        """A new residual block, applied to [h, skip]."""
        block = ADMBlock(self.dropout, features, resize, self.dtype)
        source = (parts, None if keys is None else next(keys))
        return frame.run(self, block, source, temb, remat=remat)

    def _attention(self, h: Array, *, remat: bool) -> Array:
        """A new attention block, applied to h."""
        heads = self.num_heads or max(h.shape[-1] // self.channels_per_head, 1)
        if h.shape[-1] % heads:
            raise ValueError(
                f"{h.shape[-1]} channels do not split into {heads} heads. Choose num_heads, or a "
                "channels_per_head that divides every width with attention."
            )
        return frame.run(self, ADMAttention(heads, self.dtype), h, remat=remat)

    def _dropout_keys(self, batch: int) -> Iterator[Array]:
        """Keys (B,) for each residual block in turn: levels, middle and changes of size."""
        levels = len(self.ch_mult)
        blocks = levels * (2 * self.num_res_blocks + 1) + 2 + 2 * (levels - 1)
        return frame.dropout_keys(self, batch, blocks)


def _check_options(net: ADM) -> None:
    """Raises ValueError or TypeError for options that cannot be used."""
    checks.at_least("nf", net.nf, 4)
    checks.at_least("num_res_blocks", net.num_res_blocks, 1)
    checks.at_least("len(ch_mult)", len(net.ch_mult), 1)
    checks.positive("ch_mult", np.asarray(net.ch_mult))
    checks.at_least("channels_per_head", net.channels_per_head, 1)
    checks.at_least("augment_dim", net.augment_dim, 0)
    for name in ("dropout", "label_dropout"):
        checks.in_range(name, getattr(net, name), 0.0, 1.0)
    checks.less("dropout", net.dropout, "one", 1.0)
    for name in ("num_heads", "out_channels", "num_classes"):
        if getattr(net, name) is not None:
            checks.at_least(name, getattr(net, name), 1)
    if net.label_dropout and net.num_classes is None:
        raise ValueError("label_dropout needs num_classes: there is no class to drop.")
    check_dtype(net.dtype)
