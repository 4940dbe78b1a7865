"""Numerics with finite values and finite gradients where the plain formula has neither.

Symbols: c is a coefficient, () or (B,), or shaped like one sample; leaf is an array with a leading
batch axis B. Sums and norms are per sample.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffjax.core.types import Array, PyTree


def expand(c: ArrayLike, leaf: Array) -> Array:
    """Aligns a coefficient with an array on the left, in the array's dtype.

    c: () or (B,), or with the rank of one sample or of the batch (a schedule per pixel).
    leaf: (B, *data). Returns c of shape (), (B, 1, ..., 1), or broadcastable as it was, so that
    `expand(c, leaf) * leaf` never depends on NumPy's alignment from the right.
    """
    c = jnp.asarray(c).astype(leaf.dtype)
    if c.ndim == 0:
        return c
    if c.ndim == leaf.ndim and all(n in (1, m) for n, m in zip(c.shape, leaf.shape, strict=True)):
        return c
    if c.ndim == 1 and c.shape[0] == leaf.shape[0]:
        return c.reshape(c.shape + (1,) * (leaf.ndim - 1))
    if c.shape == leaf.shape[1:]:
        return c[None]
    raise ValueError(
        f"A coefficient must be a scalar, one number a sample, or shaped like a sample; got shape "
        f"{c.shape} for an array of shape {leaf.shape}."
    )


def scale(c: ArrayLike, tree: PyTree) -> PyTree:
    """c * tree, leaf by leaf, with c aligned by `expand`."""
    return jax.tree.map(lambda leaf: expand(c, leaf) * leaf, tree)


def combine(*terms: tuple[Any, PyTree]) -> PyTree:
    """The sum of c * tree over pairs (c, tree) of equal structure: `combine((a, x), (b, y))`."""
    coefficients, trees = zip(*terms, strict=True)

    def add(*leaves):
        total = expand(coefficients[0], leaves[0]) * leaves[0]
        for c, leaf in zip(coefficients[1:], leaves[1:], strict=True):
            total = total + expand(c, leaf) * leaf
        return total

    return jax.tree.map(add, *trees)


def select(condition: Array, a: PyTree, b: PyTree) -> PyTree:
    """a where the condition holds, else b, leaf by leaf. condition: () or (B,) bool."""

    def choose(a, b):
        aligned = condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim))
        return jnp.where(aligned, a, b)

    return jax.tree.map(choose, a, b)


def safe_sqrt(x: Array) -> Array:
    """sqrt(max(x, 0)) whose derivative at and below 0 is 0 instead of infinite or NaN."""
    positive = x > 0
    root = jnp.sqrt(jnp.where(positive, x, jnp.ones_like(x)))
    return jnp.where(positive, root, jnp.zeros_like(root))


def sum_per_sample(tree: PyTree) -> Array:
    """The sum of all elements of each sample, (B,); accumulated in at least float32."""
    totals = [
        jnp.sum(
            leaf.reshape(leaf.shape[0], -1), axis=1, dtype=jnp.promote_types(leaf.dtype, "float32")
        )
        for leaf in jax.tree.leaves(tree)
    ]
    return functools.reduce(jnp.add, totals)


def norm_per_sample(tree: PyTree) -> Array:
    """The Euclidean norm of each sample over all leaves, (B,); gradient 0 at 0."""
    return safe_sqrt(sum_per_sample(jax.tree.map(jnp.square, tree)))


def size_per_sample(tree: PyTree) -> int:
    """D: the number of elements of one sample."""
    return sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(tree))


def batch_size(tree: PyTree) -> int:
    """B: the length of the leading axis. Raises ValueError unless all leaves share it."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.shape for leaf in leaves]
    sizes = {shape[0] for shape in shapes if shape}
    if len(sizes) != 1 or () in shapes:
        raise ValueError(f"All leaves of x must share one leading batch axis; got shapes {shapes}.")
    return sizes.pop()


def at_least_float32(tree: PyTree) -> PyTree:
    """Casts half-precision leaves to float32; wider floats stay. Solver states live here."""

    def cast(leaf):
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"x must be real floating point; got dtype {leaf.dtype}.")
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

    return jax.tree.map(cast, tree)


def canonical(tree: PyTree) -> PyTree:
    """Real numbers as arrays of JAX's default float dtype, so that one value has one type.

    A Python float, a NumPy scalar and a JAX scalar would each be a program of its own under `jit`;
    after `canonical` they share one. Arrays of rank 1 and more, integers, booleans and keys pass.
    """

    def convert(leaf):
        dtype = getattr(leaf, "dtype", np.dtype(type(leaf)) if isinstance(leaf, float) else None)
        if dtype is None or np.ndim(leaf) > 0 or not jnp.issubdtype(dtype, jnp.floating):
            return leaf
        return jax.lax.convert_element_type(leaf, jnp.result_type(float))

    return jax.tree.map(convert, tree)
