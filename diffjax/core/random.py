"""Randomness that does not depend on the batch.

A draw is a pure function of (the sample's key, the name of the draw), so sample i gets the same
noise whatever the batch size, its neighbours, the padding or the mesh, and a sharded draw needs no
communication:

    keys = sample_keys(key, B)                    # (B,): fold_in(key, i)
    keys = step_keys(keys, n)                     # (B,): fold_in(keys[i], n)
    z    = normal_like(keys, "noise", x)          # z[i] from keys[i], the name and the leaf's place

Only counter-based generators have this property under `vmap`; XLA's `rbg` draws one stream for the
whole batch, so its keys are refused unless the caller accepts the coupling.
"""

import math
import zlib

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Key, PyTree


def tag(name: str) -> int:
    """A fixed 31-bit number for the name of a draw."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def sample_keys(key: Key, batch: int, *, allow_batch_coupled_noise: bool = False) -> Key:
    """One key a sample, (B,): `fold_in(key, i)` for a scalar key; an array of B keys passes.

    Raises TypeError for keys that are not typed (`jax.random.key`) and ValueError for `rbg` keys,
    whose draws depend on the whole batch, unless `allow_batch_coupled_noise`.
    """
    if not jnp.issubdtype(
        jnp.asarray(key).dtype if not hasattr(key, "dtype") else key.dtype, jax.dtypes.prng_key
    ):
        raise TypeError("key must be a typed key; build it with jax.random.key(seed).")
    implementation = str(jax.random.key_impl(key))
    if "rbg" in implementation and not allow_batch_coupled_noise:
        raise ValueError(
            f"{implementation} keys draw one stream for the whole batch, so a sample would depend "
            "on its neighbours. Use jax.random.key(seed, impl='threefry2x32'), or pass "
            "allow_batch_coupled_noise=True to accept that."
        )
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"key must be one key or one a sample, ({batch},); got shape {key.shape}.")
    return key


def step_keys(keys: Key, step: Array | int) -> Key:
    """The keys of one step: `fold_in(keys[i], step)`, (B,)."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


def _draw_like(sampler, keys: Key, name: str, x: PyTree) -> PyTree:
    """Applies `sampler(key, shape, dtype)` per sample; leaf j of x folds in the name and j."""
    leaves, treedef = jax.tree.flatten(x)
    drawn = []
    for j, leaf in enumerate(leaves):
        named = step_keys(keys, (tag(name) + j) & 0x7FFFFFFF)
        # Drawn as one row and shaped afterwards: the same bits, and XLA compiles Threefry over one
        # axis four times as fast as over the axes of an image.
        size = math.prod(leaf.shape[1:])
        rows = jax.vmap(lambda k, n=size, s=leaf: sampler(k, (n,), s.dtype))(named)
        drawn.append(rows.reshape(leaf.shape))
    return jax.tree.unflatten(treedef, drawn)


def normal_like(keys: Key, name: str, x: PyTree) -> PyTree:
    """Standard normal noise shaped like x, one independent stream per (sample key, name, leaf)."""
    return _draw_like(jax.random.normal, keys, name, x)


def rademacher_like(keys: Key, name: str, x: PyTree) -> PyTree:
    """Signs +-1 with equal probability, shaped like x; otherwise as `normal_like`."""
    return _draw_like(jax.random.rademacher, keys, name, x)


def uniform_like(keys: Key, name: str, x: PyTree) -> PyTree:
    """Uniform noise on [0, 1), shaped like x; otherwise as `normal_like`."""
    return _draw_like(jax.random.uniform, keys, name, x)
