r"""What a network is given beside the noise level, and the checks of it: classes, augmentations.

Symbols: label is a scalar a sample; K the number of classes; d the width of an embedding, half =
d // 2; B the batch.

    (1)  cosines first:  [cos(label w), sin(label w)],   w_j = 10000^{-j / half},  j < half

(1) is the embedding of ADM and DiT; `embed.positional_embedding` is that of DDPM, whose order and
last frequency differ: there sines come first and the slowest frequency is exactly 1 / 10000.

Classes are integers 0..K-1 and -1 stands for no class. In training a class is dropped to -1 with
some probability, so that one network learns the conditional and the unconditional score [1].
Augmentation labels are A numbers a sample that say how an image was changed, zero for an image as
it is; see `diffjax.data.augment`.

References:
[1] Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022, https://arxiv.org/abs/2207.12598.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array
from diffjax.nets.embed import Dtype, check_condition, per_sample
from diffjax.nets.frame import stream


def cosine_embedding(label: Array, width: int) -> Array:
    """Sinusoids at fixed frequencies, eq. (1): shape (..., width); an odd width ends in a zero."""
    half = width // 2
    if half < 1:
        raise ValueError(f"an embedding needs a width of at least 2; got {width}.")
    frequencies = jnp.exp(jnp.arange(half, dtype=label.dtype) * (-math.log(10000.0) / half))
    phase = label[..., None] * jnp.expand_dims(frequencies, range(label.ndim))
    waves = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)
    return jnp.pad(waves, [(0, 0)] * label.ndim + [(0, width % 2)])


def class_labels(
    module: nn.Module,
    cond: Array | None,
    num_classes: int | None,
    batch: int,
    *,
    drop: float,
    highest: int | None = None,
) -> Array | None:
    """The classes of a batch, (B,), -1 for none; None for a network without classes.

    cond: integers () or (B,), if and only if num_classes is set, up to `highest` (default K - 1).
    drop: the probability with which a class becomes -1, by the stream "label_dropout" of keys
      (`frame.stream`); 0 asks for no key.
    """
    check_condition(cond, num_classes)
    if num_classes is None or cond is None:
        return None
    checks.in_range("cond", cond, -1, num_classes - 1 if highest is None else highest)
    cond = per_sample("cond", cond, (batch,))
    if drop == 0:
        return cond
    keys = stream(module, "label_dropout", batch)
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, drop))(keys)
    return jnp.where(dropped, -1, cond)


def augment_labels(augment: Array | None, dim: int, batch: int, dtype: Dtype) -> Array | None:
    """The augmentation labels (B, dim), zeros where none are given; None where dim is 0.

    augment: (B, dim), or (dim,) for one image. Raises ValueError for any other shape.
    """
    if dim == 0:
        if augment is not None:
            raise ValueError(
                "augment was given to a network that takes no augmentation labels. Set its "
                "augment_dim (9 for diffjax.data.Augment), or leave augment out."
            )
        return None
    if augment is None:
        return jnp.zeros((batch, dim), dtype)
    augment = jnp.asarray(augment)
    if augment.shape == (dim,) and batch == 1:
        augment = augment[None]
    if augment.shape != (batch, dim):
        raise ValueError(f"augment must have shape {(batch, dim)}; got {augment.shape}.")
    return augment.astype(dtype)
