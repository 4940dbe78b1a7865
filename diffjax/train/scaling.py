"""Dynamic scaling of the loss, for gradients in float16.

Symbols: s the scale, k the finite gradients since it last changed, g the gradient of the loss.

float16 has no number below 6e-8, and gradients of images and activations are often smaller: they
vanish. The gradient of s l, taken through the network and divided by s in float32, is the same and
does not. The largest useful s is found as one goes on:

    all of g finite:   an update;  k <- k + 1, and at k = period: k <- 0, s <- min(2 s, 2^24)   (1)
    else:              no update;  k <- 0,  s <- max(s / 2, 1)                                  (2)

s is a power of two, so scaling rounds nothing. A skipped update leaves the weights and the inner
optimizer, its counts included, as they were. At s = 1 a gradient that is not finite is the loss's
own fault, and is reported as such.

Reference: Micikevicius et al., "Mixed precision training", 2018, https://arxiv.org/abs/1710.03740,
section 3.2.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core import checks
from diffjax.core.types import Array, PyTree

_LEAST, _MOST = 1.0, 2.0**24


class ScalingState(NamedTuple):
    """loss_scale: s, float32. good: k, int32. inner: the state of the optimizer within."""

    loss_scale: Array
    good: Array
    inner: Any


def dynamic_scaling(
    inner: optax.GradientTransformation, *, initial: float = 2.0**15, period: int = 2000
) -> optax.GradientTransformation:
    """`inner`, with updates skipped and the scale moved by eqs. (1) and (2).

    It takes the gradients after division by the scale that `loss_scale` gives. initial: s at the
    start, a power of two from 1 to 2^24. period: >= 1. Raises ValueError for other values.
    """
    if not _LEAST <= initial <= _MOST or np.log2(initial) % 1:
        raise ValueError(f"initial must be a power of two from 1 to 2**24; got {initial}.")
    checks.at_least("period", period, 1)

    def init(params):
        return ScalingState(
            jnp.asarray(initial, jnp.float32), jnp.zeros((), jnp.int32), inner.init(params)
        )

    def update(grads, state, params=None):
        finite = all_finite(grads)
        updates, after = inner.update(grads, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, 0), updates)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state.inner)
        good = jnp.where(finite, state.good + 1, 0)
        scale = jnp.where(finite, state.loss_scale, jnp.maximum(state.loss_scale / 2, _LEAST))
        grow = good >= period
        scale = jnp.where(grow, jnp.minimum(2 * scale, _MOST), scale)
        return updates, ScalingState(scale, jnp.where(grow, 0, good), after)

    return optax.GradientTransformation(init, update)


def loss_scale(opt_state: PyTree) -> Array | None:
    """The scale of an optimizer's state, float32 (); None where nothing is scaled."""
    return cast("Array | None", optax.tree.get(opt_state, "loss_scale", default=None))


def reported_norm(norm: Array, scale: Array) -> Array:
    """The gradient's norm for the metrics: 0 where an update is skipped for the scale's sake."""
    return jnp.where(jnp.isfinite(norm) | (scale <= _LEAST), norm, 0)


def all_finite(tree: PyTree) -> Array:
    """Whether no element is infinite or not a number, bool ()."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite))
