"""One update under the glass: the loss of each image, each leaf's gradient, where a NaN began.

The micro-batches of an update are looked at one after another, as `accumulate` takes them, so this
needs no more memory than the update: the activations of one of them, and a second gradient.
"""

import functools
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core.numerics import at_least_float32
from diffjax.core.pytree import named
from diffjax.core.types import Array, Key, PyTree
from diffjax.train.accumulate import LossFn, Means, Prepare, as_it_is, cut, loss_and_gradient
from diffjax.train.scaling import loss_scale
from diffjax.train.state import TrainState

_LIBRARIES = tuple(str(Path(m.__file__).parent) for m in (jax, flax, optax) if m.__file__)


class Examined(NamedTuple):
    """What an update is made of.

    losses: (B,). aux: what the loss function reports. weights, gradients: trees like the weights of
    each leaf's norm, (), which is not finite where an element is not.
    """

    losses: Array
    aux: Mapping[str, Array]
    weights: PyTree
    gradients: PyTree


def examine(
    state: TrainState,
    batch: PyTree,
    loss_fn: LossFn,
    *,
    accumulate: int = 1,
    prepare: Prepare = as_it_is,
) -> Examined:
    """The update that follows `state`, with the key and loss of `step.train_step`; none is made.

    Compiles by itself. aux: the values of each image, as (B,), and the means of others over the
    micro-batches.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total, params, key, part):
        seen, grads = _look(params, key, part, loss_fn, scale)
        return jax.tree.map(lambda t, g: t + g / accumulate, total, grads), seen

    scale, found = loss_scale(state.opt_state), []
    total = jax.tree.map(jnp.zeros_like, at_least_float32(state.params))
    for key, part in _parts(state, batch, accumulate, prepare):
        total, seen = add(total, state.params, key, part)
        found.append(jax.device_get(seen))
    seen = jax.tree.map(lambda *values: _whole(values), *found)
    return Examined(seen["losses"], seen["aux"], _norms(state.params), _norms(total))


def origin(
    state: TrainState,
    batch: PyTree,
    loss_fn: LossFn,
    *,
    accumulate: int = 1,
    prepare: Prepare = as_it_is,
) -> str | None:
    """The operation that first makes a NaN, as JAX names it, and the line that called for it.

    Runs the update operation by operation, which is slow; the arguments are `examine`'s. None where
    no operation makes a NaN out of numbers.
    """
    scale = loss_scale(state.opt_state)
    try:
        with jax.debug_nans(True):
            for key, part in _parts(state, batch, accumulate, prepare):
                jax.block_until_ready(_look(state.params, key, part, loss_fn, scale))
    except FloatingPointError as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if not f.filename.startswith(_LIBRARIES)]
        at = f"{own[-1].filename}:{own[-1].lineno}" if own else "an unknown line"
        return f"{str(error).splitlines()[0]} {at}"
    return None


def first_bad(examined: Examined) -> str | None:
    """The first of weights, losses and gradients that is not finite, by name; None if all are."""
    groups = (
        ("weights", by_name(examined.weights)),
        ("loss of image", dict(enumerate(np.asarray(examined.losses)))),
        ("gradient", by_name(examined.gradients)),
    )
    for what, values in groups:
        for name, value in values.items():
            if not np.isfinite(value):
                return f"{what} {name}"
    return None


def by_name(tree: PyTree) -> dict[str, float]:
    """Numbers by the path of their leaf, in the order of the tree."""
    return {name: float(value) for name, value in named(tree).items()}


def _parts(
    state: TrainState, batch: PyTree, accumulate: int, prepare: Prepare
) -> Iterator[tuple[Key, PyTree]]:
    """The key or keys and the images of each micro-batch."""
    key = jax.random.fold_in(state.key, state.step)
    batch = prepare(key, batch)
    if accumulate == 1:
        yield key, batch
        return
    parts = cut(key, batch, accumulate)
    for m in range(accumulate):
        yield jax.tree.map(lambda leaf, m=m: leaf[m], parts)


def _look(
    params: PyTree, key: Key, batch: PyTree, loss_fn: LossFn, scale: Array | None
) -> tuple[Means, PyTree]:
    """The losses and aux of a micro-batch, and the gradient of their mean."""
    _, seen, grads = loss_and_gradient(
        loss_fn,
        params,
        key,
        batch,
        scale=scale,
        summarise=lambda losses, aux: {"losses": losses, "aux": aux},
    )
    return seen, grads


def _whole(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The values of all images in their order, (B,), or the mean of what is none of images."""
    if np.ndim(parts[0]) == 0:
        return np.mean(parts, axis=0)
    return np.stack(parts, axis=1).reshape(-1, *np.shape(parts[0])[1:])


def _norms(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.sqrt(jnp.sum(jnp.square(x))), at_least_float32(tree))
