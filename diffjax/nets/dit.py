r"""DiT and SiT: transformers on patches, conditioned by adaptive normalisation.

Symbols: x is an image or latent (B, H, W, C); p the patch's side; tokens z (B, T, D) with
T = H W / p^2, row by row; c (B, D) the condition; LN a normalisation over D without weights,
epsilon 1e-6.

    (1)  z = patches(x) W + b + P                     P: fixed sinusoids of the place, frozen
    (2)  c = Dense(silu(Dense([cos, sin](label)))) + E[y]         256 sinusoids, E: (K + 1, D)
    (3)  (b1, s1, g1, b2, s2, g2) = Dense(silu(c))    each (B, D), zero at the start
         z += g1 attention(LN(z) (1 + s1) + b1)
         z += g2 mlp(LN(z) (1 + s2) + b2)             mlp = Dense(gelu(Dense(.))), 4 D wide
    (4)  out = patches^-1(Dense(LN(z) (1 + s) + b)),  (b, s) = Dense(silu(c))

Every gate g and the last Dense start at zero, so a new network returns exactly zero and its blocks
are the identity. The place (row r, column k) of a patch has P = [sin(k w), cos(k w), sin(r w),
cos(r w)], w_j = 10000^{-j / (D / 4)}: the column first.

Row K of E is the class of no class: `cond` is -1 or K there, and in training a class is dropped to
it with probability `label_dropout`. The label is DiT's time step 0..999 or SiT's t in [0, 1] as it
is: the preconditioning says which.

learn_sigma doubles the channels of the result; the second half is the learned variance. SiT keeps
those channels in its weights and does not return them: return_sigma=False.

P is a parameter that no gradient reaches, so that it travels with a checkpoint; the reference
counts it too. qkv's kernel is (D, 3, D), for q, k and v in this order: heads are runs of channels
of each, so that devices can share a layer head by head.

The weights of block i lie under "block_{i}", or with scan=True, all blocks' stacked along a first
axis (depth, ...), under "stack"; `stacked` and `unstacked` make one of the other.

References: Peebles, Xie, "Scalable Diffusion Models with Transformers", 2023,
https://arxiv.org/abs/2212.09748. Ma et al., "SiT: Exploring Flow and Diffusion-based Generative
Models with Scalable Interpolant Transformers", 2024, https://arxiv.org/abs/2401.08740.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffjax.core import checks
from diffjax.core.types import Array, PyTree
from diffjax.nets import frame
from diffjax.nets.embed import Dtype, check_dtype, per_sample, wide
from diffjax.nets.inputs import class_labels, cosine_embedding
from diffjax.nets.linear import Dense, DenseGeneral
from diffjax.nets.recompute import recompute

FREQUENCIES = 256  # width of the sinusoids of eq. (2)

# (depth, width, num_heads) of the published sizes.
SIZES: Mapping[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}

BlockFn = Callable[[PyTree, Array, Array], Array]
STACK = "stack"  # all blocks' weights with scan=True, `diffjax.train.sharding` knows it by name

# What a loop keeps for the backward one. Left to itself JAX keeps every value in between, which the
# compiler cannot make again from others as it does without a loop.
_PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

_xavier = nn.initializers.xavier_uniform()
_small = nn.initializers.normal(0.02)
_zero = nn.initializers.zeros


def _dense(features: int, dtype: Dtype, name: str, init: Any = _xavier) -> Dense:
    return Dense(features, dtype=dtype, kernel_init=init, name=name)


def _layer_norm(z: Array) -> Array:
    """LN over the last axis, without weights."""
    centred = z - jnp.mean(z, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)


def _modulate(z: Array, shift: Array, scale: Array, dtype: Dtype) -> Array:
    """LN(z) (1 + scale) + shift in `dtype`; shift, scale: (B, D)."""
    return (_layer_norm(z) * (1 + scale[:, None]) + shift[:, None]).astype(dtype)


def place_embedding(height: int, width: int, features: int) -> np.ndarray:
    """The sinusoids P of a height x width grid of patches: (height * width, features), float64."""
    quarter = features // 4
    frequencies = 10000.0 ** (-np.arange(quarter) / quarter)
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    phases = [axis.reshape(-1, 1) * frequencies for axis in (column, row)]
    return np.concatenate([f(phase) for phase in phases for f in (np.sin, np.cos)], axis=1)


class DiTBlock(nn.Module):
    """Attention and a perceptron, each under adaptive normalisation and a gate, eq. (3)."""

    num_heads: int
    mlp_ratio: float
    implementation: Literal["xla", "cudnn"] | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Array, c: Array) -> Array:
        """z: (B, T, D), kept in shape; c: (B, D), after its activation."""
        batch, tokens, features = z.shape
        modulation = _dense(6 * features, c.dtype, "adaLN", _zero)(c)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)

        qkv = DenseGeneral((3, features), dtype=self.dtype, kernel_init=_xavier, name="qkv")
        h = qkv(_modulate(z, shift1, scale1, self.dtype))
        q, k, v = jnp.moveaxis(h.reshape(batch, tokens, 3, self.num_heads, -1), 2, 0)
        h = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)
        h = _dense(features, self.dtype, "proj")(h.reshape(z.shape))
        z = z + gate1[:, None] * h.astype(z.dtype)

        h = _modulate(z, shift2, scale2, self.dtype)
        h = nn.gelu(_dense(round(features * self.mlp_ratio), self.dtype, "fc1")(h))
        h = _dense(features, self.dtype, "fc2")(h)
        return z + gate2[:, None] * h.astype(z.dtype)


class DiT(nn.Module):
    """The transformer: `net.apply(variables, x, label, cond=None, train=False)`.

    `DiT.named("XL/2")` gives the published sizes, `DiT.sit("XL/2")` SiT's.

    Sizes:
      depth, width, num_heads: blocks, D and heads; D divisible by 4 and by num_heads.
      patch_size: p, which divides the height and width of x.
      mlp_ratio: the perceptron's hidden width over D.
      out_channels: channels of the result without the variance; None for those of x.
      learn_sigma: twice the channels, of which the second half is the learned variance.
      return_sigma: False leaves the second half out of the result.

    Condition:
      num_classes: K for class labels 0..K-1 as `cond`, -1 or K standing for no class; None for a
        network without classes.
      label_dropout: probability of training a sample without its class (key "label_dropout").

    Cost:
      implementation: of `jax.nn.dot_product_attention`; None lets JAX choose.
      dtype: type of the linear maps and attention; parameters stay float32, and so do the sums
        along depth, normalisation, softmax and conditions. The result is float32 or wider.
      remat: recomputes each block in the backward pass of training (reverse mode only).
      scan: the blocks are one loop over their stacked weights, so that a program's size and the
        time to compile it do not grow with depth.
      around: with scan, what wraps the function (weights, z, c) -> z of one block inside the loop,
        such as one that fetches the weights from other devices (`train.sharding.around_layer`).
    """

    depth: int = 28
    width: int = 1152
    num_heads: int = 16
    patch_size: int = 2
    mlp_ratio: float = 4.0
    out_channels: int | None = None
    learn_sigma: bool = True
    return_sigma: bool = True

    num_classes: int | None = 1000
    label_dropout: float = 0.1

    implementation: Literal["xla", "cudnn"] | None = None
    dtype: Dtype = jnp.float32
    remat: bool = False
    scan: bool = False
    around: Callable[[BlockFn], BlockFn] | None = None

    def __post_init__(self) -> None:
        """Checks the options that do not depend on the data; __call__ checks the rest."""
        _check_options(self)
        super().__post_init__()

    @classmethod
    def named(cls, size: str = "XL/2", **options: Any) -> Self:
        """The published size "S", "B", "L" or "XL", a slash and the patch's side 2, 4 or 8.

        options: fields to change. Raises ValueError for another size.
        """
        letter, _, patch = size.partition("/")
        if letter not in SIZES or not (patch.isascii() and patch.isdigit()):
            raise ValueError(
                f"size must be one of {', '.join(SIZES)}, a slash and the patch's side, such as "
                f"'XL/2'; got {size!r}. Or give depth, width, num_heads and patch_size to DiT."
            )
        depth, width, num_heads = SIZES[letter]
        fields = {
            "depth": depth,
            "width": width,
            "num_heads": num_heads,
            "patch_size": int(patch),
        }
        return cls(**{**fields, **options})

    @classmethod
    def sit(cls, size: str = "XL/2", **options: Any) -> Self:
        """SiT's network of this size: DiT's, whose variance channels are not returned."""
        return cls.named(size, **{"return_sigma": False, **options})

    @nn.compact
    def __call__(
        self, x: Array, label: Array, cond: Array | None = None, train: bool = False
    ) -> Array:
        """Maps latents at some time to the network's raw output, eqs. (1) to (4).

        x: (B, H, W, C), or (H, W, C) under `vmap`; H and W divisible by patch_size, and those of
        initialisation.  label: () or (B,).  cond: classes, () or (B,), if num_classes is set.
        train: drops classes, which needs a key "label_dropout" where label_dropout is not 0.
        Returns (B, H, W, out_channels), twice that with the variance, in float32 or wider.
        """
        batched = x.ndim == 4
        x = frame.as_batch(x)
        z, grid = self._patches(x)
        c = nn.silu(self._condition(label, cond, len(x), train))
        z = self._blocks(z, c, remat=self.remat and train)
        channels = self.out_channels or x.shape[-1]
        total = 2 * channels if self.learn_sigma else channels
        shift, scale = jnp.split(_dense(2 * self.width, c.dtype, "final_adaLN", _zero)(c), 2, -1)
        z = _modulate(z, shift, scale, self.dtype)
        z = _dense(self.patch_size**2 * total, self.dtype, "final_linear", _zero)(z)
        out = self._image(z, grid).astype(wide(self.dtype))
        out = out if self.return_sigma else out[..., :channels]
        return out if batched else out[0]

    def _blocks(self, z: Array, c: Array, *, remat: bool) -> Array:
        """Eq. (3) for each block in turn, one after another or in a loop."""
        _check_layout(self)
        options = (self.num_heads, self.mlp_ratio, self.implementation, self.dtype)
        if not self.scan:
            for i in range(self.depth):
                z = frame.run(self, DiTBlock(*options, name=f"block_{i}"), z, c, remat=remat)
            return z
        block = DiTBlock(*options, parent=None)

        def create(key: Array) -> PyTree:
            keys = jax.random.split(key, self.depth)
            return jax.vmap(lambda key: block.init(key, z[:1], c[:1])["params"])(keys)

        def apply(weights: PyTree, z: Array, c: Array) -> Array:
            return cast(Array, block.apply({"params": weights}, z, c))

        if self.around is None:
            one = jax.checkpoint(apply, policy=_PRODUCTS, prevent_cse=False)
        else:
            one = self.around(apply)

        def step(z: Array, weights: PyTree) -> tuple[Array, None]:
            if remat:
                return recompute(lambda z, weights, c: one(weights, z, c))(z, weights, c), None
            return one(weights, z, c), None

        return jax.lax.scan(step, z, self.param(STACK, create))[0]

    def _patches(self, x: Array) -> tuple[Array, tuple[int, int]]:
        """Eq. (1): tokens (B, T, D) in float32 or wider, and the grid of patches."""
        batch, height, width, channels = x.shape
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(
                f"patch_size={p} must divide the height and width; got {height} x {width}."
            )
        grid = (height // p, width // p)
        patches = x.reshape(batch, grid[0], p, grid[1], p, channels)
        patches = jnp.transpose(patches, (0, 1, 3, 2, 4, 5)).reshape(batch, grid[0] * grid[1], -1)
        z = _dense(self.width, self.dtype, "x_embedder")(patches.astype(self.dtype))
        z = z.astype(wide(self.dtype))

        def place(_: Array) -> Array:
            return jnp.asarray(place_embedding(*grid, self.width), jnp.float32)

        frozen = jax.lax.stop_gradient(self.param("pos_embed", place))
        return z + frozen[None].astype(z.dtype), grid

    def _image(self, z: Array, grid: tuple[int, int]) -> Array:
        """Tokens (B, T, p p C) to an image: a token holds its rows, columns, channels."""
        p = self.patch_size
        patches = z.reshape(z.shape[0], *grid, p, p, -1)
        image = jnp.transpose(patches, (0, 1, 3, 2, 4, 5))
        return image.reshape(z.shape[0], grid[0] * p, grid[1] * p, -1)

    def _condition(self, label: Array, cond: Array | None, batch: int, train: bool) -> Array:
        """Eq. (2): (B, D), in float32 or wider."""
        dtype = wide(self.dtype)
        label = per_sample("label", label, (batch,)).astype(dtype)
        c = _dense(self.width, dtype, "t_embedder_0", _small)(cosine_embedding(label, FREQUENCIES))
        c = _dense(self.width, dtype, "t_embedder_1", _small)(nn.silu(c))
        rate = self.label_dropout if train else 0.0
        known = self.num_classes
        classes = class_labels(self, cond, known, batch, drop=rate, highest=known)
        if classes is None or known is None:
            return c
        rows = nn.Embed(known + 1, self.width, dtype, embedding_init=_small, name="y_embedder")
        return c + rows(jnp.where(classes < 0, known, classes))


def stacked(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The weights of a network with scan=True from those with scan=False.

    params: its parameters, or a tree like them. Raises ValueError where it has no blocks.
    """
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
    blocks = [params[f"block_{i}"] for i in range(len(params) - len(rest))]
    if not blocks:
        raise ValueError(f"no block_0 to stack among {', '.join(params)}: is it stacked already?")
    return {**rest, STACK: jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstacked(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The weights of a network with scan=False from those with scan=True.

    params: its parameters, or a tree like them. Raises ValueError where nothing is stacked.
    """
    if STACK not in params:
        raise ValueError(f"no {STACK!r} among {', '.join(params)}: is it unstacked already?")
    rest, pile = {name: leaf for name, leaf in params.items() if name != STACK}, params[STACK]
    depth = len(jax.tree.leaves(pile)[0])
    return rest | {f"block_{i}": jax.tree.map(lambda w, i=i: w[i], pile) for i in range(depth)}


def _check_layout(net: DiT) -> None:
    """Raises ValueError for the weights of a network with the other value of scan."""
    other, way = ("block_0", "stacked") if net.scan else (STACK, "unstacked")
    if not net.is_initializing() and net.has_variable("params", other):
        raise ValueError(
            f"scan={net.scan}, and the weights, which have {other!r}, are of a network with "
            f"scan={not net.scan}. Set it so, or give diffjax.nets.dit.{way}(params)."
        )


def _check_options(net: DiT) -> None:
    """Raises ValueError or TypeError for options that cannot be used."""
    for name in ("depth", "width", "num_heads", "patch_size"):
        checks.at_least(name, getattr(net, name), 1)
    for name in ("out_channels", "num_classes"):
        if getattr(net, name) is not None:
            checks.at_least(name, getattr(net, name), 1)
    checks.positive("mlp_ratio", net.mlp_ratio)
    checks.in_range("label_dropout", net.label_dropout, 0.0, 1.0)
    if net.around is not None and not net.scan:
        raise ValueError("around acts in the loop over the blocks: set scan=True, or leave it out.")
    checks.one_of("implementation", net.implementation, (None, "xla", "cudnn"))
    check_dtype(net.dtype)
    if net.width % 4 or net.width % net.num_heads:
        raise ValueError(
            f"width must be divisible by 4, for the sines and cosines of two axes, and by "
            f"num_heads={net.num_heads}; got {net.width}."
        )
