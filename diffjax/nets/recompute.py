"""Recomputation in the backward pass that survives the CPU compiler.

`jax.checkpoint` keeps XLA from merging the second computation with the first by an optimisation
barrier. XLA removes barriers on the CPU before it looks for common subexpressions, so that there
the two become one again and no memory is saved. Here the second computation starts from a copy of
its input that depends on the incoming cotangent by a comparison which the compiler cannot decide.

Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016,
https://arxiv.org/abs/1604.06174.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, PyTree


def recompute(f: Callable[..., Array]) -> Callable[..., Array]:
    """f(x, *args) whose backward pass keeps only (x, args) and computes f again.

    x is a tree of arrays like f's result, (B, ...) of the same rank; args are trees of arrays.
    Reverse mode only.
    """

    @jax.custom_vjp
    def call(x: PyTree, *args: Any) -> Array:
        return f(x, *args)

    def forward(x: PyTree, *args: Any) -> tuple[Array, tuple[Any, ...]]:
        return f(x, *args), (x, *args)

    def backward(kept: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
        x, *args = kept
        _, pull = jax.vjp(f, _after(x, cotangent), *args)
        return pull(cotangent)

    call.defvjp(forward, backward)
    return call


def _after(x: PyTree, cotangent: Array) -> PyTree:
    """x, not to be known before the cotangent is: x where that is a number, else NaN."""
    probe = cotangent[(slice(None), *[slice(1)] * (cotangent.ndim - 1))]
    return jax.tree.map(lambda leaf: jnp.where(probe == probe, leaf, jnp.nan), x)
