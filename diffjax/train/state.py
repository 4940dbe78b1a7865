"""Everything that a training run carries from one step to the next."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Key, PyTree


@pytree
class TrainState:
    """The state after `step` updates.

    step: int32, the updates made so far. params, opt_state: the weights and the optimizer's state.
    ema: running averages of the weights by name, each a tree like params; "main" is the one to
    sample and measure. key: the run's typed key; it never changes, the randomness of step n comes
    from `fold_in(key, n)`, so (key, step) says it all.
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    ema: PyTree
    key: Key


def create_state(
    key: Key,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    tracks: Iterable[str] = ("main",),
) -> TrainState:
    """The state before the first update; the averages start at the weights.

    key: a typed scalar key. params: a tree of arrays. tracks: names of the averages, such as the
    rules of `train_step`. All leaves are copies, because a compiled step takes its state's memory
    over and the caller may want to keep the arguments.
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
        ema={name: jax.tree.map(jnp.copy, params) for name in tracks},
        key=jnp.copy(key),
    )


def abstract(tree: PyTree, sharding: PyTree | None = None) -> PyTree:
    """The shapes, dtypes and shardings of a tree, which a checkpoint is restored like.

    tree: arrays, or what `jax.eval_shape` returns. sharding: one for every leaf, or a tree of them
    like `tree`; None keeps their own.
    """
    if sharding is None:
        sharding = jax.tree.map(lambda leaf: leaf.sharding, tree)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        jax.tree.broadcast(sharding, tree),
    )
