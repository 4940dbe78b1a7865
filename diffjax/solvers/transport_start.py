"""An optimal-transport start: from noise to perturbed data at an intermediate time, then few steps.

Symbols: z standard normal noise of D numbers, y_i (i = 1..N) a bank of points with shares nu_i
(1/N each), h_i heights.

    T(z) = y_i,   i = argmax <z, y_i> + h_i                                                     (1)
    minimise  E max_i (<z, y_i> + h_i) - sum_i nu_i h_i                                         (2)
    dE/dh_i = P(T(z) = y_i) - nu_i                                                              (3)

(1) at the minimum of the convex (2) is the map of least mean square distance from z to the bank
under which each point gets its share: the gradient of Brenier's potential. (2) is minimised by Adam
on (3), estimated from fresh noise.

DPM-OT perturbs data to a level in the middle of the process, takes those points for the bank and
jumps to it from noise in one look-up; the steps left are those from that level on. A few-step
solver from the prior sends noise near the border of two modes between them; from a perturbed datum
of one mode it does not, which is where less mode mixture comes from. Whatever the heights, T(z) is
a point of the bank, so the map of (1) itself adds no new samples: with a deterministic solver there
are N results. The map decides which noise leads to which, and the shares. For fresh samples let the
bank be clean data and perturb T(z) anew (`perturb`), or end with a stochastic solver; the network
then adds what lies between the data and the level.

The public code fits (2) with uniform noise on [0, 1] in place of the normal, and stops when the
shares' error |g| falls below 8e-4. Here noise is normal and `fit_transport` reports its error.

References:
[1] Li, Li, Wang, Lei, Luo, Gu, "DPM-OT: A New Diffusion Probabilistic Model Based on Optimal
    Transport", 2023, https://arxiv.org/abs/2307.11308, and its code,
    https://github.com/cognaclee/DPM-OT.
[2] An et al., "AE-OT: A New Generative Model Based on Extended Semi-discrete Optimal Transport",
    2020, https://openreview.net/forum?id=HkldyTNYwH (the solver of (2)).
"""

import functools

import jax
import jax.numpy as jnp

from diffjax.core import checks, random
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Key, Number, PyTree


def _rows(tree: PyTree) -> Array:
    """Each sample as one row, (B, D)."""
    leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves, axis=1)


@pytree
class TransportStart:
    """The map (1). bank: (N, *data), a tree. heights: (N,).

    error: max_i |P_i/nu_i - 1| of the fit, measured on fresh noise, () or None.
    """

    bank: PyTree
    heights: Array
    error: Array | None = None

    def index(self, z: PyTree) -> Array:
        """The bank's point for each z, (B,); z: (B, *data), standard normal."""
        return jnp.argmax(_rows(z) @ _rows(self.bank).T + self.heights[None], axis=1)

    def __call__(self, z: PyTree) -> PyTree:
        """T(z), like z."""
        chosen = self.index(z)
        return jax.tree.map(lambda leaf: leaf[chosen], self.bank)


def fit_transport(
    key: Key,
    bank: PyTree,
    *,
    steps: int = 1000,
    batch: int = 4096,
    learning_rate: Number | None = None,
) -> TransportStart:
    """The heights of eq. (2) for a bank of points, (N, *data), with equal shares.

    steps: updates, with a rate that falls to 0 along a cosine. batch: noises in an update; some
    tens for each point. learning_rate: of the heights; by default 0.05 of the spread of <z, y>.
    """
    checks.at_least("steps", steps, 1)
    checks.at_least("batch", batch, 1)
    rows = _rows(bank)
    centred = rows - jnp.mean(rows, axis=0, keepdims=True)
    spread = jnp.sqrt(jnp.mean(jnp.sum(centred**2, axis=1)))
    rate = 0.05 * spread if learning_rate is None else learning_rate
    return TransportStart(bank, *_fit(key, rows, rate, steps, batch))


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def _fit(key: Key, rows: Array, rate: Number, steps: int, batch: int) -> tuple[Array, Array]:
    """(heights (N,), error ()) for rows (N, D)."""
    import optax

    count, size = rows.shape
    optimizer = optax.adam(optax.cosine_decay_schedule(1.0, steps))

    def shares(key: Key, heights: Array) -> Array:
        keys = random.sample_keys(key, batch)
        z = random.normal_like(keys, "transport", jnp.empty((batch, size), rows.dtype))
        hit = jnp.argmax(z @ rows.T + heights[None], axis=1)
        return jnp.zeros((count,), rows.dtype).at[hit].add(1 / batch)

    def update(carry, i):
        heights, state = carry
        slope = shares(jax.random.fold_in(key, i), heights) - 1 / count
        change, state = optimizer.update(slope, state)
        heights = heights + rate * change
        return (heights - jnp.mean(heights), state), None

    heights = jnp.zeros((count,), rows.dtype)
    start = (heights, optimizer.init(heights))
    heights = jax.lax.scan(update, start, jnp.arange(steps))[0][0]
    fresh = jnp.arange(max(1, 100000 // batch))
    own = jax.random.fold_in(key, steps)
    found = jax.lax.map(lambda i: shares(jax.random.fold_in(own, i), heights), fresh)
    return heights, jnp.max(jnp.abs(jnp.mean(found, axis=0) * count - 1))
