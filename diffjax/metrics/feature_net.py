"""A small network for a Fréchet distance without downloads: trained here, on the data's own labels.

A classifier's penultimate layer tells apart what its classes need told apart, so a distance in it
sees what is wrong with samples. Its numbers compare models under one network only: they are a
Fréchet distance in the features of that network, and never a FID.

The network: a 3x3 convolution to `width` channels; then `stages` times two residual 3x3
convolutions, with twice the channels and half the size at each stage but the first; the mean over
pixels; a dense layer to `dim` smooth features; the logits. Normalisation over groups of 8 channels,
so that features do not depend on the batch. It is trained with label smoothing by Adam on a cosine,
and with mirrored and shifted images where asked.

References: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2016,
https://arxiv.org/abs/1512.03385; Wu, He, "Group normalization", 2018,
https://arxiv.org/abs/1803.08494.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.checks import at_least, in_range, positive
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, Key, PyTree
from diffjax.metrics.inception import Outputs


class ResNet(nn.Module):
    """Images (B, H, W, C) in [-1, 1] to `Outputs` of (B, dim) and (B, num_classes).

    width: channels of the first stage, a multiple of 8. H and W need not be equal.
    """

    num_classes: int
    width: int = 32
    stages: int = 3
    dim: int = 128

    @nn.compact
    def __call__(self, x: Array) -> Outputs:
        x = nn.Conv(self.width, (3, 3))(x)
        for stage in range(self.stages):
            channels = self.width * 2**stage
            stride = 1 if stage == 0 else 2
            skip = x if stage == 0 else nn.Conv(channels, (1, 1), (stride, stride))(x)
            h = nn.Conv(channels, (3, 3), (stride, stride))(
                nn.silu(nn.GroupNorm(None, group_size=8)(x))
            )
            h = nn.Conv(channels, (3, 3))(nn.silu(nn.GroupNorm(None, group_size=8)(h)))
            x = skip + h
        x = jnp.mean(self._smooth(x), axis=(1, 2))
        features = nn.silu(nn.Dense(self.dim)(x))
        return Outputs(features, nn.Dense(self.num_classes)(features))

    def _smooth(self, x: Array) -> Array:
        return nn.silu(nn.GroupNorm(None, group_size=8)(x))


@pytree
class FeatureNet:
    """A trained `ResNet` on images as they are stored: levels (B, H, W, C), 0 to levels - 1."""

    params: PyTree
    net: ResNet = static()
    levels: int = static(default=256)

    def __call__(self, images: Array) -> Outputs:
        """images: integers (B, H, W, C)."""
        return self.net.apply({"params": self.params}, _scaled(images, self.levels))  # type: ignore[return-value]


def train_feature_net(
    key: Key,
    images: np.ndarray,
    labels: np.ndarray,
    net: ResNet,
    *,
    levels: int = 256,
    steps: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    smoothing: float = 0.1,
    mirror: bool = False,
    shift: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> FeatureNet:
    """Trains the network on labelled images; equal keys give equal parameters.

    images: (N, H, W, C) integer levels, kept on the host. labels: (N,) ints below the network's
    classes. learning_rate: Adam's at the start, falling to 0 along a cosine. smoothing: q of the
    targets. mirror: half of the images left to right. shift: each image moved by up to this many
    pixels along both axes, its edge repeated. progress: called with the steps done.
    """
    at_least("steps", steps, 1)
    at_least("batch_size", batch_size, 1)
    at_least("shift", shift, 0)
    positive("learning_rate", learning_rate)
    in_range("smoothing", smoothing, 0.0, 1.0)
    images, labels = np.asarray(images), np.asarray(labels)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers, one an image, ({len(images)},); got {labels.dtype} "
            f"{labels.shape}."
        )
    in_range("labels", labels, 0, net.num_classes - 1)
    recipe = _Recipe(net, levels, steps, learning_rate, smoothing, mirror, shift)
    init_key, data_key = jax.random.split(key)
    params = jax.jit(net.init)(init_key, _scaled(jnp.asarray(images[:1]), levels))["params"]
    state = recipe.optimizer().init(params)
    order = np.random.default_rng(np.asarray(jax.random.key_data(data_key)))
    for done in range(steps):
        chosen = order.integers(0, len(images), batch_size)
        own = jax.random.fold_in(data_key, done)
        params, state = _step(recipe, params, state, own, images[chosen], labels[chosen])
        progress(done + 1)
    return FeatureNet(params, net, levels)


class _Recipe(NamedTuple):
    """What a step depends on beside its data; see `train_feature_net`."""

    net: ResNet
    levels: int
    steps: int
    learning_rate: float
    smoothing: float
    mirror: bool
    shift: int

    def optimizer(self) -> Any:
        import optax

        return optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps))


@functools.partial(jax.jit, static_argnums=0)
def _step(recipe: _Recipe, params: PyTree, state: PyTree, key: Key, images: Array, labels: Array):
    """One update: (params, state of the optimizer)."""
    import optax

    net = recipe.net
    images = augment(key, _scaled(images, recipe.levels), mirror=recipe.mirror, shift=recipe.shift)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, net.num_classes), recipe.smoothing)

    def loss(params):
        outputs: Any = net.apply({"params": params}, images)
        return jnp.mean(optax.softmax_cross_entropy(outputs.logits, targets))

    updates, state = recipe.optimizer().update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def augment(key: Key, x: Array, *, mirror: bool, shift: int) -> Array:
    """Images (B, H, W, C), each mirrored at random and moved at random; see `train_feature_net`."""
    mirror_key, shift_key = jax.random.split(key)
    if mirror:
        chosen = jax.random.bernoulli(mirror_key, 0.5, (x.shape[0], 1, 1, 1))
        x = jnp.where(chosen, x[:, :, ::-1], x)
    if shift:
        height, width, channels = x.shape[1:]
        padded = jnp.pad(x, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
        corners = jax.random.randint(shift_key, (x.shape[0], 2), 0, 2 * shift + 1)

        def window(image, corner):
            return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

        x = jax.vmap(window)(padded, corners)
    return x


def accuracy(net: FeatureNet, images: np.ndarray, labels: np.ndarray, batch: int = 500) -> float:
    """The share of images whose label the network names."""
    named = jax.jit(lambda net, x: jnp.argmax(net(x).logits, axis=1))
    right = [
        np.asarray(named(net, images[i : i + batch])) == labels[i : i + batch]
        for i in range(0, len(images), batch)
    ]
    return float(np.mean(np.concatenate(right)))


def _scaled(images: Array, levels: int) -> Array:
    """Levels 0 to L - 1 in [-1, 1]. Raises for reals and for other ranks."""
    images = jnp.asarray(images)
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.integer):
        raise TypeError(
            f"images must be integer levels (B, H, W, C); got {images.dtype} {images.shape}."
        )
    return images.astype(jnp.float32) * (2 / (levels - 1)) - 1
