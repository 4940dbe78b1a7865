"""Recomputation in the backward pass that survives the CPU compiler.

`jax.checkpoint` keeps XLA from merging the second computation with the first by an optimisation
barrier. XLA removes barriers on the CPU before it looks for common subexpressions, so that there
the two become one again: every convolution's result is kept after all. Here the second computation
starts from a copy of its input that depends on the incoming cotangent by a comparison which the
compiler cannot decide.

Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016,
https://arxiv.org/abs/1604.06174.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, PyTree


def recompute(f: Callable[..., Array]) -> Callable[..., Array]:
    """f(x, *args) whose backward pass keeps only (x, args) and computes f again.

    x is a tree of arrays and keys, args are trees of arrays, f's result is an array; x and the
    result share the leading axis B. Reverse mode only.
    """

    @jax.custom_vjp
    def call(x: PyTree, *args: PyTree) -> Array:
        return f(x, *args)

    def forward(x: PyTree, *args: PyTree) -> tuple[Array, tuple[PyTree, ...]]:
        return f(x, *args), (x, *args)

    def backward(kept: tuple[PyTree, ...], cotangent: Array) -> tuple[PyTree, ...]:
        x, *args = kept
        _, pull = jax.vjp(f, _after(x, cotangent), *args)
        return pull(cotangent)

    call.defvjp(forward, backward)
    return call


def _after(x: PyTree, cotangent: Array) -> PyTree:
    """x, not to be known before the cotangent: x where that is a number, else NaN or zero."""
    probe = cotangent[(slice(None), *[0] * (cotangent.ndim - 1))]
    is_number = probe == probe

    def hide(leaf: Array) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = hide(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        fill = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
        return jnp.where(jnp.expand_dims(is_number, range(1, leaf.ndim)), leaf, fill)

    return jax.tree.map(hide, x)
