"""The stages of a one-step method over a grid, as one scan.

Symbols: x_0 = x_t the state at the start of a step, x_{S} = x_s at its end, k_i what the denoiser
gives at stage i (a slope, or a prediction), P_i the method's rule for the next point.

    k_i = evaluate(x_i, t_i),   x_{i+1} = P_i(k_0, .., k_i),   i = 0 .. S-1                      (1)

For most methods, with numbers m_i, w_ij, v_ij and draws z_j,

    P_i(k) = m_i x_0 + sum_{j <= i} w_ij k_j + sum_j v_ij z_j                                    (2)

A scan, so that a program holds one copy of the network and not one a stage: compiling it is what a
solve waits for first.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from diffjax.core.numerics import combine, select
from diffjax.core.types import Array, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import inverse_log_snr

Point = Callable[[Array | int, Sequence[PyTree]], PyTree]


def run_stages(
    evaluate: Callable[[PyTree, Array], PyTree],
    x: PyTree,
    times: Array,
    point: Point,
    like: PyTree | None = None,
) -> PyTree:
    """x_S of eq. (1), like x.

    evaluate: (x_i, t_i) -> k_i. times: t_i, (S, ...). point: (i, k) -> x_{i+1}; i may be traced, k
    has S entries, and those with j > i are there to be multiplied by 0. like: a tree of k_i's
    structure, shapes and dtypes; x's by default.
    """
    stages = times.shape[0]
    if stages == 1:
        return point(0, [evaluate(x, times[0])])

    empty = jax.tree.map(jnp.zeros_like, x if like is None else like)

    def stage(carry, i):
        ks, now = carry
        k = jax.tree.map(lambda a, b: a.astype(b.dtype), evaluate(now, times[i]), empty)
        ks = [select(i == j, k, old) for j, old in enumerate(ks)]
        return (ks, point(i, [*ks, k])), None

    # The last one is used as soon as it is there, and not kept.
    return jax.lax.scan(stage, ([empty] * (stages - 1), x), jnp.arange(stages))[0][1]


def linear(
    x: PyTree,
    kept: Array,
    weights: Array,
    draws: Sequence[PyTree] = (),
    gains: Array | None = None,
) -> Point:
    """The rule of eq. (2).

    kept: m_i, (S, ...). weights: w_ij with zeros for j > i, (S, S, ...). draws: z_j, each like x.
    gains: v_ij, (S, draws, ...), with draws only. The further axes are those of a step's time, ()
    or (B,).
    """

    def point(i, ks):
        terms = [(kept[i], x), *((weights[i, j], k) for j, k in enumerate(ks))]
        if gains is not None:
            terms += [(gains[i, j], z) for j, z in enumerate(draws)]
        return combine(*terms)

    return point


def time_at(process: Process, lam: Array, t: Array, s: Array) -> Array:
    """The time between t and s where the log-SNR is `lam`, like t; never outside of [s, t]."""
    return jnp.clip(inverse_log_snr(process, lam), jnp.minimum(s, t), jnp.maximum(s, t))
