"""The stages of a one-step method over a grid, as one scan.

Symbols: x_0 = x_t the state at the start of a step, x_{S} = x_s at its end, k_i what the denoiser
gives at stage i (a slope, or a prediction), m_i, w_ij numbers of the method, n_i a given noise.

    k_i = evaluate(x_i, t_i),   x_{i+1} = m_i x_0 + sum_{j <= i} w_ij k_j + n_i,  i = 0 .. S-1   (1)

A scan, so that a program holds one copy of the network and not one a stage: compiling it is what a
solve waits for first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.numerics import combine
from diffjax.core.types import Array, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import inverse_log_snr


def run_stages(
    evaluate: Callable[[PyTree, Array], PyTree],
    x: PyTree,
    times: Array,
    kept: Array,
    weights: Array,
    noise: PyTree | None = None,
) -> PyTree:
    """x_S of eq. (1), like x.

    evaluate: (x_i, t_i) -> k_i like x. times: t_i, (S, ...). kept: m_i, (S, ...). weights: w_ij
    with zeros for j > i, (S, S, ...). Their further axes are those of a step's time, () or (B,).
    noise: n_i, like x with a leading axis of length S, or None.
    """
    stages = weights.shape[0]

    def point(i, ks):
        terms = [(kept[i], x), *((weights[i, j], k) for j, k in enumerate(ks))]
        ahead = combine(*terms)
        return ahead if noise is None else jax.tree.map(lambda a, n: a + n[i], ahead, noise)

    if stages == 1:
        return point(0, [evaluate(x, times[0])])

    def stage(carry, i):
        ks, now = carry
        k = evaluate(now, times[i])
        ks = [
            jax.tree.map(
                lambda new, old, j=j: jnp.where(i == j, new.astype(old.dtype), old), k, old
            )
            for j, old in enumerate(ks)
        ]
        return (ks, point(i, ks)), None

    start = ([jax.tree.map(jnp.zeros_like, x)] * stages, x)
    return jax.lax.scan(stage, start, jnp.arange(stages))[0][1]


def time_at(process: Process, lam: Array, t: Array, s: Array) -> Array:
    """The time between t and s where the log-SNR is `lam`, like t; never outside of [s, t]."""
    return jnp.clip(inverse_log_snr(process, lam), jnp.minimum(s, t), jnp.maximum(s, t))
