"""Everything that a training run carries from one step to the next."""

import jax
import jax.numpy as jnp
import optax

from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Key, PyTree


@pytree
class TrainState:
    """The state after `step` updates.

    step: int32, the updates made so far. params, opt_state: the weights and the optimizer's state.
    ema: the running average of the weights, a tree like params. key: the run's typed key; it never
    changes, the randomness of step n comes from `fold_in(key, n)`, so (key, step) says it all.
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    ema: PyTree
    key: Key


def create_state(key: Key, params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; the average starts at the weights.

    key: a typed scalar key. params: a tree of arrays. All leaves are copies, because a compiled
    step takes its state's memory over and the caller may want to keep the arguments.
    Raises TypeError for a key that is not typed.
    """
    if not hasattr(key, "dtype") or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError("key must be a typed key; build it with jax.random.key(seed).")
    if key.ndim:
        raise TypeError(f"key must be one key; got an array of keys of shape {key.shape}.")
    params = jax.tree.map(jnp.copy, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params),
        key=jnp.copy(key),
    )


def abstract(tree: PyTree, sharding: jax.sharding.Sharding | None = None) -> PyTree:
    """The shapes, dtypes and shardings of a tree, which a checkpoint is restored like.

    tree: arrays, or what `jax.eval_shape` returns. sharding: for every leaf; None keeps their own.
    """
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding if sharding is None else sharding
        ),
        tree,
    )
