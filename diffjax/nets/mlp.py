r"""A multi-layer perceptron for vectors: the network of low-dimensional problems.

    (1)  h_0     = dense(x)
    (2)  h_{i+1} = h_i + dense(act(dense(act(norm(h_i))) + dense(act(temb))))
    (3)  out     = dense(act(norm(h)))

with the label's embedding temb of `embed`, layer normalisation, and last layers that start at
almost zero, as in `ncsnpp`. He et al., "Identity Mappings in Deep Residual Networks", 2016,
https://arxiv.org/abs/1603.05027.
"""

import jax.numpy as jnp
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array
from diffjax.nets.embed import (
    Activation,
    Dtype,
    EmbeddingType,
    check_dtype,
    default_init,
    embed_label,
    per_sample,
    wide,
)
from diffjax.nets.linear import Dense


class MLP(nn.Module):
    """Residual blocks on vectors: `net.apply(variables, x, label, cond=None, train=False)`.

    features, num_blocks: width and number of the residual blocks.
    out_features: width of the result; None for that of x.
    embed_dim: nf of the label's embedding, which is 4 nf wide.
    embedding_type, fourier_scale, nonlinearity, num_classes, init_scale, dtype: as in `NCSNpp`.
    """

    features: int = 128
    num_blocks: int = 3
    out_features: int | None = None
    embed_dim: int = 32
    embedding_type: EmbeddingType = "positional"
    fourier_scale: float = 16.0
    nonlinearity: Activation = nn.swish
    num_classes: int | None = None
    init_scale: float = 0.0
    dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        """Checks the options."""
        checks.at_least("features", self.features, 1)
        checks.at_least("num_blocks", self.num_blocks, 1)
        checks.at_least("embed_dim", self.embed_dim, 4)
        checks.one_of("embedding_type", self.embedding_type, ("fourier", "positional"))
        checks.positive("fourier_scale", self.fourier_scale)
        checks.non_negative("init_scale", self.init_scale)
        check_dtype(self.dtype)
        for name in ("out_features", "num_classes"):
            if getattr(self, name) is not None:
                checks.at_least(name, getattr(self, name), 1)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Array, label: Array, cond: Array | None = None, train: bool = False
    ) -> Array:
        """Maps vectors at some noise level to the network's raw output.

        x: (..., D).  label, cond: () or x.shape[:-1].  train: accepted for the networks' common
        signature; nothing here differs in training.
        Returns (..., out_features), in float32 or wider.
        """
        del train
        label = per_sample("label", label, x.shape[:-1]).astype(wide(self.dtype))
        temb = embed_label(
            label,
            cond,
            self.embed_dim,
            embedding_type=self.embedding_type,
            fourier_scale=self.fourier_scale,
            act=self.nonlinearity,
            num_classes=self.num_classes,
        )
        temb = self.nonlinearity(temb)
        h = self._dense(self.features)(x.astype(self.dtype))
        for _ in range(self.num_blocks):
            r = self._dense(self.features)(self._norm_act(h))
            r = r + self._dense(self.features)(temb).astype(r.dtype)
            h = h + self._dense(self.features, self.init_scale)(self.nonlinearity(r))
        out = self._dense(self.out_features or x.shape[-1], self.init_scale)(self._norm_act(h))
        return out.astype(wide(self.dtype))

    def _dense(self, features: int, init_scale: float = 1.0) -> Dense:
        return Dense(features, dtype=self.dtype, kernel_init=default_init(init_scale))

    def _norm_act(self, h: Array) -> Array:
        h = nn.LayerNorm(dtype=wide(self.dtype))(h)
        return self.nonlinearity(h).astype(self.dtype)
