"""One update under the glass: the loss of each image, each leaf's gradient, where a NaN began."""

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core.numerics import at_least_float32
from diffjax.core.pytree import named
from diffjax.core.types import Array, PyTree
from diffjax.train.accumulate import LossFn, Means, loss_and_gradient
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


def examine(state: TrainState, batch: PyTree, loss_fn: LossFn) -> Examined:
    """The update that follows `state`, with the key and loss of `step.train_step`; none is made."""
    _, seen, grads = _parts(state, batch, loss_fn)
    return Examined(seen["losses"], seen["aux"], _norms(state.params), _norms(grads))


def origin(state: TrainState, batch: PyTree, loss_fn: LossFn) -> str | None:
    """The operation that first makes a NaN, as JAX names it, and the line that called for it.

    Runs the update operation by operation, which is slow, and needs no more than `examine`'s
    arguments. None where no operation makes a NaN out of numbers.
    """
    try:
        with jax.debug_nans(True):
            jax.block_until_ready(_parts(state, batch, loss_fn))
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


def _parts(state: TrainState, batch: PyTree, loss_fn: LossFn) -> tuple[Array, Means, PyTree]:
    """The mean loss, the losses and aux of the images, and the gradient."""
    key = jax.random.fold_in(state.key, state.step)
    return loss_and_gradient(
        loss_fn,
        state.params,
        key,
        batch,
        summarise=lambda losses, aux: {"losses": losses, "aux": aux},
    )


def _norms(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.sqrt(jnp.sum(jnp.square(x))), at_least_float32(tree))
