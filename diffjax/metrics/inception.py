"""The Inception network of FID: its graph, its input, and its published weights.

FID is the Fréchet distance in the 2048 pooled features of one network: the Inception of the archive
`inception-2015-12-05` of TensorFlow, and of no other. Its graph is the "Inception v3" of [1] but
for these traits, which the published PyTorch port [2] keeps and which are kept here:

- average pools over 3x3 leave the padding out of the mean (blocks A, C and the first E),
- the last block E takes a maximum over 3x3 where the paper has an average,
- batch normalisation adds 1e-3 to the variance, and has a scale,
- there are 1008 logits; no auxiliary head.

Counted by the layers: 21,751,136 weights of 94 convolutions without bias, 2 x 17,216 scales and
offsets, 2,065,392 of the last layer: 23,850,960 that were trained. With the 2 x 17,216 means and
variances of the normalisation the file holds 23,885,392 numbers.

An axis of s pixels is resized to 299 by bilinear interpolation without antialiasing. Ports differ,
and so do their FIDs by some hundredths, so both sides must come from one of them, by name:

    name          pixel i reads at               levels v in [0, 255] become    used by
    pytorch_fid   (i + 1/2) s/299 - 1/2          v / 127.5 - 1                  [2]; the default
    tfgan         i s/299                        v / 127.5 - 1                  the reference [3]
    tf2015        i s/299                        (v - 128) / 128                FID's authors [4]

The weights are not part of diffjax: see `HOW_TO_GET` and `from_torch`.

References:
[1] Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception architecture for computer
    vision", 2016, https://arxiv.org/abs/1512.00567.
[2] Seitzer, pytorch-fid, https://github.com/mseitzer/pytorch-fid (its weights' file and names).
[3] Song et al., https://github.com/yang-song/score_sde, through TensorFlow-GAN.
[4] Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs trained by a two time-scale update
    rule converge to a local Nash equilibrium", 2017, https://arxiv.org/abs/1706.08500.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.checks import one_of
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, PyTree

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256_START = "6726825d"  # of the published file, as its name says
HOW_TO_GET = (
    f"The weights of FID's Inception network are published and not part of diffjax. Get {URL} "
    "(92 MB), and give its path by --inception=PATH or the environment variable DIFFJAX_INCEPTION."
)
FEATURES, LOGITS = 2048, 1008
INPUTS = ("pytorch_fid", "tfgan", "tf2015")


class Outputs(NamedTuple):
    """features: (B, 2048), what FID, KID and neighbours use. logits: (B, 1008), what IS uses."""

    features: Array
    logits: Array


class _Conv(nn.Module):
    """Convolution without bias, batch normalisation with stored statistics, ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    same: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        padding = [(k // 2, k // 2) if self.same else (0, 0) for k in self.kernel]
        x = nn.Conv(
            self.features,
            self.kernel,
            (self.stride, self.stride),
            padding=padding,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


def _average(x: Array) -> Array:
    """Means over 3x3; the padding is left out."""
    return nn.avg_pool(x, (3, 3), (1, 1), padding="SAME", count_include_pad=False)


def _maximum(x: Array) -> Array:
    """Maxima over 3x3; the padding never wins."""
    return nn.max_pool(x, (3, 3), (1, 1), padding="SAME")


def _halve(x: Array) -> Array:
    """Maxima over 3x3 at every other place, no padding."""
    return nn.max_pool(x, (3, 3), (2, 2), padding="VALID")


def _chain(x: Array, *convs: nn.Module) -> Array:
    for conv in convs:
        x = conv(x)
    return x


class BlockA(nn.Module):
    """1x1, 5x5, two 3x3 and a pooled 1x1 side by side. pooled: channels of the last."""

    pooled: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one, three = (1, 1), (3, 3)
        branches = [
            _Conv(64, one, name="branch1x1")(x),
            _chain(x, _Conv(48, one, name="branch5x5_1"), _Conv(64, (5, 5), name="branch5x5_2")),
            _chain(
                x,
                _Conv(64, one, name="branch3x3dbl_1"),
                _Conv(96, three, name="branch3x3dbl_2"),
                _Conv(96, three, name="branch3x3dbl_3"),
            ),
            _Conv(self.pooled, one, name="branch_pool")(_average(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(nn.Module):
    """Halves the size: 3x3, two 3x3, and a maximum."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = (3, 3)
        branches = [
            _Conv(384, three, 2, same=False, name="branch3x3")(x),
            _chain(
                x,
                _Conv(64, (1, 1), name="branch3x3dbl_1"),
                _Conv(96, three, name="branch3x3dbl_2"),
                _Conv(96, three, 2, same=False, name="branch3x3dbl_3"),
            ),
            _halve(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockC(nn.Module):
    """Factorised 7x7 convolutions. width: their inner channels."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one, row, column, w = (1, 1), (1, 7), (7, 1), self.width
        branches = [
            _Conv(192, one, name="branch1x1")(x),
            _chain(
                x,
                _Conv(w, one, name="branch7x7_1"),
                _Conv(w, row, name="branch7x7_2"),
                _Conv(192, column, name="branch7x7_3"),
            ),
            _chain(
                x,
                _Conv(w, one, name="branch7x7dbl_1"),
                _Conv(w, column, name="branch7x7dbl_2"),
                _Conv(w, row, name="branch7x7dbl_3"),
                _Conv(w, column, name="branch7x7dbl_4"),
                _Conv(192, row, name="branch7x7dbl_5"),
            ),
            _Conv(192, one, name="branch_pool")(_average(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockD(nn.Module):
    """Halves the size a second time."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one, three = (1, 1), (3, 3)
        branches = [
            _chain(
                x,
                _Conv(192, one, name="branch3x3_1"),
                _Conv(320, three, 2, same=False, name="branch3x3_2"),
            ),
            _chain(
                x,
                _Conv(192, one, name="branch7x7x3_1"),
                _Conv(192, (1, 7), name="branch7x7x3_2"),
                _Conv(192, (7, 1), name="branch7x7x3_3"),
                _Conv(192, three, 2, same=False, name="branch7x7x3_4"),
            ),
            _halve(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(nn.Module):
    """Widened 3x3 convolutions. maximum: the pool of the last block, an average otherwise."""

    maximum: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one, row, column = (1, 1), (1, 3), (3, 1)
        a = _Conv(384, one, name="branch3x3_1")(x)
        b = _chain(
            x, _Conv(448, one, name="branch3x3dbl_1"), _Conv(384, (3, 3), name="branch3x3dbl_2")
        )
        pooled = _maximum(x) if self.maximum else _average(x)
        branches = [
            _Conv(320, one, name="branch1x1")(x),
            _Conv(384, row, name="branch3x3_2a")(a),
            _Conv(384, column, name="branch3x3_2b")(a),
            _Conv(384, row, name="branch3x3dbl_3a")(b),
            _Conv(384, column, name="branch3x3dbl_3b")(b),
            _Conv(192, one, name="branch_pool")(pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3(nn.Module):
    """Images (B, H, W, 3) in [-1, 1], H and W at least 75, to `Outputs`.

    Names are those of the published PyTorch file. Nothing here is meant to be trained.
    """

    @nn.compact
    def __call__(self, x: Array) -> Outputs:
        three = (3, 3)
        x = _Conv(32, three, 2, same=False, name="Conv2d_1a_3x3")(x)
        x = _Conv(32, three, same=False, name="Conv2d_2a_3x3")(x)
        x = _halve(_Conv(64, three, name="Conv2d_2b_3x3")(x))
        x = _Conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = _halve(_Conv(192, three, same=False, name="Conv2d_4a_3x3")(x))
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(pooled, name=name)(x)
        x = BlockB(name="Mixed_6a")(x)
        for name, width in (
            ("Mixed_6b", 128),
            ("Mixed_6c", 160),
            ("Mixed_6d", 160),
            ("Mixed_6e", 192),
        ):
            x = BlockC(width, name=name)(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(maximum=False, name="Mixed_7b")(x)
        x = BlockE(maximum=True, name="Mixed_7c")(x)
        features = jnp.mean(x, axis=(1, 2))
        return Outputs(features, nn.Dense(LOGITS, precision="highest", name="fc")(features))


@pytree
class Inception:
    """The network with weights, on images as they are stored: levels (B, H, W, 1 or 3).

    variables: of `InceptionV3`, from `from_torch`. levels: L; levels 0 to L - 1 are spread over 0
    to 255. input: a name of the table above.
    """

    variables: PyTree
    levels: int = static(default=256)
    input: str = static(default="pytorch_fid")

    def __post_init__(self):
        one_of("input", self.input, INPUTS)

    def __call__(self, images: Array) -> Outputs:
        """images: integers (B, H, W, C), C of 1 (repeated) or 3."""
        images = jnp.asarray(images)
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"Inception takes images (B, H, W, 1 or 3) of levels; got {images.shape}."
            )
        if not jnp.issubdtype(images.dtype, jnp.integer):
            raise TypeError(f"images must be integer levels; got {images.dtype}.")
        v = images.astype(jnp.float32) * (255 / (self.levels - 1))
        v = jnp.broadcast_to(v, (*v.shape[:3], 3))
        v = bilinear(v, 299, half_pixels=self.input == "pytorch_fid")
        x = (v - 128) / 128 if self.input == "tf2015" else v / 127.5 - 1
        return InceptionV3().apply(self.variables, x)  # type: ignore[return-value]


def bilinear(x: Array, size: int, *, half_pixels: bool) -> Array:
    """Images (B, H, W, C) at (size, size), by two bilinear weights along each axis.

    Output i reads at (i + 1/2) H / size - 1/2 with `half_pixels`, at i H / size without; reads
    beyond the edge take the edge. No antialiasing when it shrinks.
    """
    for axis in (1, 2):
        weights = jnp.asarray(_weights(x.shape[axis], size, half_pixels), x.dtype)
        x = jnp.moveaxis(
            jnp.tensordot(weights, x, axes=(1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis
        )
    return x


def _weights(source: int, size: int, half_pixels: bool) -> np.ndarray:
    """(size, source), two weights a row."""
    shift = 0.5 if half_pixels else 0.0
    place = np.clip((np.arange(size) + shift) * (source / size) - shift, 0, source - 1)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, source - 1)
    weights = np.zeros((size, source))
    np.add.at(weights, (np.arange(size), low), 1 - (place - low))
    np.add.at(weights, (np.arange(size), high), place - low)
    return weights


def from_torch(state: Mapping[str, Any]) -> PyTree:
    """The variables of `InceptionV3` from the tensors of the published PyTorch file.

    state: name to array, as `conv.weight` (O, I, H, W), `bn.weight`, `bn.bias`, `bn.running_mean`,
    `bn.running_var`, `fc.weight` (1008, 2048) and `fc.bias`. `num_batches_tracked` is ignored.
    Raises ValueError where a tensor is missing, foreign or of another shape: torchvision's own
    Inception, with 1000 classes and other pools, is not the network of FID.
    """
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    shapes = jax.eval_shape(
        InceptionV3().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    )
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    names = [_torch_name([str(part.key) for part in path]) for path, _ in leaves]
    missing, foreign = sorted(set(names) - set(state)), sorted(set(state) - set(names))
    if missing or foreign:
        raise ValueError(
            f"These are not the weights of FID's Inception: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])}) and {len(foreign)} foreign ({', '.join(foreign[:3])}). "
            + HOW_TO_GET
        )
    found = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        value = np.asarray(state[name], np.float32)
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if value.shape != leaf.shape:
            raise ValueError(
                f"{name} must have the shape {leaf.shape} after transposing; got {value.shape}. "
                + HOW_TO_GET
            )
        found.append(value)
    return jax.tree_util.tree_unflatten(treedef, found)


_LAST = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _torch_name(path: list[str]) -> str:
    """("params", "Mixed_5b", "branch1x1", "conv", "kernel") to "Mixed_5b.branch1x1.conv.weight"."""
    return ".".join([*path[1:-1], _LAST[path[-1]]])
