"""Precision, recall, density and coverage: the sets compared by their nearest neighbours.

Symbols: x_1 .. x_M real and y_1 .. y_N generated features; r_k(x_i) the distance of x_i from its
k-th nearest other member of its own set; B(x_i) the ball of that radius around it, its surface
included. The union of the balls stands for the set's support.

    precision = 1/N   sum_j 1[y_j in some B(x_i)]           how many samples look real      (1)
    recall    = 1/M   sum_i 1[x_i in some B(y_j)]           how many real ones are reached  (2)
    density   = 1/(kN) sum_j sum_i 1[y_j in B(x_i)]         (1), counting balls; may pass 1 (3)
    coverage  = 1/M   sum_i 1[some y_j in B(x_i)]           how many real balls are hit     (4)

(1) and (2) are published with k = 3, (3) and (4) with k = 5. An outlier among the real features has
a large ball, which lifts (1); (3) and (4) were made to bear it. For two sets of one distribution
the expectations are 1 for (3), and 1 - prod_{i=0}^{k-1} (M - 1 - i) / (M - 1 + N - i) for (4).

One pass over blocks of y gives all four, after a pass over each set for the radii. The largest
temporary holds block * max(M, N) numbers. Squared distances come from |x|^2 + |y|^2 - 2 <x, y>
about the mean of x, at the matmul's highest precision; points within its rounding of a ball's
surface may fall on either side.

References: Kynkaanniemi, Karras, Laine, Lehtinen, Aila, "Improved precision and recall metric for
assessing generative models", 2019, https://arxiv.org/abs/1904.06991 (1, 2); Naeem, Oh, Uh, Choi,
Yoo, "Reliable fidelity and diversity metrics for generative models", 2020,
https://arxiv.org/abs/2002.09797 (3, 4).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.checks import at_least
from diffjax.core.types import Array


class Neighbours(NamedTuple):
    """Eqs. (1) to (4), each ()."""

    precision: Array
    recall: Array
    density: Array
    coverage: Array


def compare(
    real: Array,
    generated: Array,
    *,
    k: int = 3,
    k_density: int = 5,
    block: int = 512,
) -> Neighbours:
    """The four figures. real: (M, F). generated: (N, F).

    k: of precision and recall. k_density: of density and coverage. block: features compared with a
    whole set at once. Raises ValueError where a set has no more members than k.
    """
    real, generated = jnp.asarray(real), jnp.asarray(generated)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"Two sets of features need shapes (M, F) and (N, F); got {real.shape} and "
            f"{generated.shape}."
        )
    at_least("k", k, 1)
    at_least("k_density", k_density, 1)
    at_least("block", block, 1)
    at_least("the number of real features", len(real), max(k, k_density) + 1)
    at_least("the number of generated features", len(generated), k + 1)
    dtype = jnp.promote_types(jnp.promote_types(real.dtype, generated.dtype), jnp.float32)
    real, generated = real.astype(dtype), generated.astype(dtype)
    centre = jnp.mean(real, axis=0)[None]
    real, generated = real - centre, generated - centre

    real_k, real_density = squared_radii(real, (k, k_density), block)
    (generated_k,) = squared_radii(generated, (k,), block)

    def visit(carry, rows):
        reached, hit = carry
        y, radius, counts = rows
        d2 = _squared_distances(y, real)
        near = (d2 <= real_density[None]) & counts[:, None]
        precise = jnp.any(d2 <= real_k[None], axis=1) & counts
        reached = reached | jnp.any((d2 <= radius[:, None]) & counts[:, None], axis=0)
        return (reached, hit | jnp.any(near, axis=0)), (jnp.sum(precise), jnp.sum(near))

    nobody = jnp.zeros(len(real), bool)
    (reached, hit), (precise, near) = jax.lax.scan(
        visit, (nobody, nobody), _blocks(block, generated, generated_k)
    )
    n = len(generated)
    return Neighbours(
        precision=jnp.sum(precise) / n,
        recall=jnp.mean(reached.astype(dtype)),
        # The counts of a block are whole numbers; their sum may pass what 32 bits hold.
        density=jnp.sum(near.astype(dtype) / (k_density * n)),
        coverage=jnp.mean(hit.astype(dtype)),
    )


def squared_radii(x: Array, ks: tuple[int, ...], block: int = 512) -> tuple[Array, ...]:
    """r_k(x_i)^2 for each k, (N,) each: the k-th nearest of the other rows. x: (N, F)."""
    largest = max(ks)

    def of(rows):
        y, index, _ = rows
        d2 = _squared_distances(y, x)
        d2 = jnp.where(jnp.arange(len(x))[None] == index[:, None], jnp.inf, d2)
        return -jax.lax.top_k(-d2, largest)[0]

    nearest = jax.lax.map(of, _blocks(block, x, jnp.arange(len(x))))
    nearest = nearest.reshape(-1, largest)[: len(x)]
    return tuple(nearest[:, k - 1] for k in ks)


def _blocks(block: int, x: Array, per_row: Array) -> tuple[Array, Array, Array]:
    """(blocks of x, blocks of per_row, which rows count), the last block filled with zeros."""
    block = min(block, len(x))
    count = -(-len(x) // block)
    missing = count * block - len(x)
    padded = jnp.pad(x, ((0, missing), (0, 0))).reshape(count, block, -1)
    rows = jnp.pad(per_row, (0, missing)).reshape(count, block)
    return padded, rows, (jnp.arange(count * block) < len(x)).reshape(count, block)


def _squared_distances(y: Array, x: Array) -> Array:
    """|y_j - x_i|^2, (len(y), len(x)), at least 0."""
    inner = jnp.matmul(y, x.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(y**2, axis=1)[:, None] + jnp.sum(x**2, axis=1)[None]
    return jnp.maximum(squares - 2 * inner, 0)
