r"""Embeddings of the time label: sinusoids at fixed or at random frequencies.

Symbols: label is a scalar per sample; d is the width of the embedding, half = d // 2.

    (1)  positional:  [sin(label w), cos(label w)],   w_j = 10000^{-j / (half - 1)},  j < half
    (2)  fourier:     [sin(2 pi u W), cos(2 pi u W)], u = log(label),  W ~ N(0, scale^2) of n values

(1) expects labels of the order of 0 to 1000 (such as 999 t); (2) expects noise levels sigma > 0.

They become the vector that every block sees, with a class c of K (c = -1 adds nothing):

    (3)  temb = dense(act(dense(embedding))) + sqrt(K) onehot(c) V

W is stored with the parameters, so that it travels with a checkpoint, but is never trained.

References: Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762.
Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional
Domains", 2020, https://arxiv.org/abs/2006.10739.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array

Activation = Callable[[Array], Array]
Dtype = Any
EmbeddingType = Literal["fourier", "positional"]


def default_init(scale: float = 1.0) -> Callable[..., Array]:
    """Uniform with variance scale / ((fan_in + fan_out) / 2); scale 0 stands for 1e-10.

    1e-10 makes the last layer of a block nearly, not exactly, zero: its gradient flows at once.
    """
    return nn.initializers.variance_scaling(scale or 1e-10, "fan_avg", "uniform")


def wide(dtype: Dtype) -> Dtype:
    """The type of what needs care: float32, or `dtype` where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def check_dtype(dtype: Dtype) -> None:
    """Raises ValueError unless `dtype` is a real floating type."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating type such as jnp.bfloat16; got {dtype}.")


def per_sample(name: str, value: Array, shape: tuple[int, ...]) -> Array:
    """Broadcasts a scalar to one value a sample; raises ValueError for any other mismatch."""
    value = jnp.asarray(value)
    if value.shape not in ((), shape):
        raise ValueError(f"{name} must have shape () or {shape}, one a sample; got {value.shape}.")
    return jnp.broadcast_to(value, shape)


def check_condition(cond: Array | None, num_classes: int | None) -> None:
    """Raises ValueError unless classes are given to a network with classes, and to no other."""
    if (num_classes is None) != (cond is None):
        raise ValueError(
            f"cond must be given if and only if num_classes is set; got num_classes={num_classes} "
            f"and cond {'absent' if cond is None else 'present'}. The label -1 stands for no class."
        )


def positional_embedding(label: Array, width: int) -> Array:
    """Sinusoids at fixed frequencies, eq. (1): shape (..., width); an odd width ends in a zero."""
    half = width // 2
    if half < 2:
        raise ValueError(f"a positional embedding needs a width of at least 4; got {width}.")
    frequencies = jnp.exp(jnp.arange(half, dtype=label.dtype) * (-math.log(10000.0) / (half - 1)))
    phase = label[..., None] * jnp.expand_dims(frequencies, range(label.ndim))
    waves = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
    return jnp.pad(waves, [(0, 0)] * label.ndim + [(0, width % 2)])


class GaussianFourierProjection(nn.Module):
    """Sinusoids at random frequencies of its input, eq. (2): shape (..., 2 * embedding_size)."""

    embedding_size: int
    scale: float

    @nn.compact
    def __call__(self, u: Array) -> Array:
        """Maps u = log(sigma), any shape."""
        init = nn.initializers.normal(self.scale)
        frequencies = self.param("W", init, (self.embedding_size,), jnp.float32)
        frequencies = jax.lax.stop_gradient(frequencies).astype(u.dtype)
        phase = 2 * math.pi * u[..., None] * jnp.expand_dims(frequencies, range(u.ndim))
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


def embed_label(
    label: Array,
    cond: Array | None,
    nf: int,
    *,
    embedding_type: EmbeddingType,
    fourier_scale: float = 16.0,
    act: Activation,
    num_classes: int | None,
) -> Array:
    """The embedding of label and class, eq. (3): shape (..., 4 nf), in the label's type.

    label: any shape; cond: integers () or like label, if and only if num_classes is set. To be
    called in the compact method of a module, which then owns the parameters.
    """
    if embedding_type == "fourier":
        features = GaussianFourierProjection(nf, fourier_scale)(jnp.log(label))
    else:
        features = positional_embedding(label, nf)
    temb = nn.Dense(4 * nf, dtype=label.dtype, kernel_init=default_init())(features)
    temb = nn.Dense(4 * nf, dtype=label.dtype, kernel_init=default_init())(act(temb))
    check_condition(cond, num_classes)
    if num_classes is None or cond is None:
        return temb
    checks.in_range("cond", cond, -1, num_classes - 1)
    one_hot = jax.nn.one_hot(per_sample("cond", cond, label.shape), num_classes, dtype=label.dtype)
    classes = nn.Dense(
        4 * nf, use_bias=False, dtype=label.dtype, kernel_init=default_init(), name="ClassDense"
    )
    return temb + classes(math.sqrt(num_classes) * one_hot)
