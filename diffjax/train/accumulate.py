"""The gradient of a batch, in one piece or in micro-batches one after another.

Symbols: a batch of B samples is cut into n micro-batches of B / n; micro-batch m has the samples
m, m + n, m + 2 n, ...; l_i is the loss of sample i, s the scale of the loss (`scaling`).

    g = (1/n) sum_m  grad mean_{i in m} s l_i  /  s                                           (1)

The sum is in float32 at least. Sample i keeps its key fold_in(key, i), so (1) is the gradient of
the whole batch up to rounding, while the activations of one micro-batch only are in memory. What
a sample must know of the others is drawn beforehand and cut like the rest: `Prepare`.
Strided, a device's share of the batch gives a share of each micro-batch: no sample moves.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import at_least_float32
from diffjax.core.random import sample_keys
from diffjax.core.types import Array, Key, PyTree

LossFn = Callable[[PyTree, Key, PyTree], tuple[Array, Mapping[str, Array]]]
Prepare = Callable[[Key, PyTree], PyTree]  # a whole batch and its key -> the batch, with more in it
Means = dict[str, Any]  # by name, arrays or trees of them


def as_it_is(key: Key, batch: PyTree) -> PyTree:
    """Prepares nothing."""
    del key
    return batch


def means(losses: Array, watched: Mapping[str, Array]) -> Means:
    """The mean of each value that a loss function watches, in at least float32."""
    del losses
    return {name: _mean(value) for name, value in watched.items()}


def loss_and_gradient(
    loss_fn: LossFn,
    params: PyTree,
    key: Key,
    batch: PyTree,
    *,
    accumulate: int = 1,
    unroll: bool = False,
    scale: Array | None = None,
    prepare: Prepare = as_it_is,
    summarise: Callable[[Array, Mapping[str, Array]], Means] = means,
) -> tuple[Array, Means, PyTree]:
    """The mean loss (), what `summarise` makes of what loss_fn watches, and the gradient, eq. (1).

    loss_fn: (params, key, batch) -> per-image losses (B,) and a dict of further values. It is given
    the key as it is, or with accumulate = n > 1 an array of keys, one a sample of the micro-batch:
    what it draws must depend on a sample's own key only. batch: a tree of arrays (B, ...).
    unroll: copies the program n times instead of a loop, for XLA on CPU. scale: s, a power of two;
    None for 1. prepare: (key, batch) -> the batch that loss_fn is given, whole or in parts.
    summarise: (losses, watched) -> sums or means over the images, which are averaged over the
    micro-batches; by default the mean of each value.
    Raises ValueError for losses that are not (B,) and where n does not divide B.
    """

    def objective(params, key, batch):
        losses, watched = loss_fn(params, key, batch)
        if losses.ndim != 1:
            raise ValueError(
                f"loss_fn must return one loss an image, shape (B,); got shape {losses.shape}."
            )
        loss = _mean(losses)
        seen = summarise(losses, watched)
        return (loss if scale is None else loss * scale.astype(loss.dtype)), (loss, seen)

    gradient = jax.grad(objective, has_aux=True)
    batch = prepare(key, batch)
    if accumulate == 1:
        grads, (loss, seen) = gradient(params, key, batch)
    else:
        grads, (loss, seen) = _in_turn(gradient, params, key, batch, accumulate, unroll)
    if scale is not None:
        grads = jax.tree.map(lambda g: (at_least_float32(g) / scale).astype(g.dtype), grads)
    return loss, seen, grads


def cut(key: Key, batch: PyTree, n: int) -> tuple[Key, PyTree]:
    """The micro-batches: keys (n, B / n) and arrays (n, B / n, ...).

    key: one of the batch. batch: (B, ...), prepared. Raises ValueError where n does not divide B.
    """
    checks.at_least("accumulate", n, 1)
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % n:
        raise ValueError(f"accumulate={n} must divide the batch of {size} images.")

    def strided(leaf):
        return leaf.reshape(size // n, n, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(strided, (sample_keys(key, size), batch))


def _in_turn(
    gradient: Callable[..., tuple[PyTree, PyTree]],
    params: PyTree,
    key: Key,
    batch: PyTree,
    n: int,
    unroll: bool,
) -> tuple[PyTree, PyTree]:
    """The means over the micro-batches of what `gradient` returns."""
    parts = cut(key, batch, n)
    shapes = jax.eval_shape(gradient, params, *jax.tree.map(lambda leaf: leaf[0], parts))
    zero = jax.tree.map(lambda s: at_least_float32(jnp.zeros(s.shape, s.dtype)), shapes)

    def add(total, part):
        keys, images = part
        if unroll:
            images = _after(total[0], images)
        grads = gradient(params, keys, images)
        return jax.tree.map(lambda t, g: t + at_least_float32(g), total, grads), None

    total, _ = jax.lax.scan(add, zero, parts, unroll=unroll)
    return jax.tree.map(lambda t, s: (t / n).astype(s.dtype), total, shapes)


def _after(grads: PyTree, batch: PyTree) -> PyTree:
    """`batch`, known only when `grads` are: parts follow one another, and so do their activations.

    XLA on CPU drops optimization barriers and would run all forward passes first. Where `grads` are
    not finite, and the update lost, the batch is zeros.
    """
    token = sum(leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(grads))
    return jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(token), leaf, 0), batch)


def _mean(values: Array) -> Array:
    """The mean over all elements, in at least float32."""
    values = jnp.asarray(values)
    return jnp.mean(values, dtype=jnp.promote_types(values.dtype, jnp.float32))
