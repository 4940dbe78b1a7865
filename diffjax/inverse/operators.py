"""Linear measurements of a sample, and their pseudo-inverses.

Symbols: x data (B, *data), a tree; A a linear map of each sample; y = A x; A^+ the Moore-Penrose
inverse, A^T the adjoint, P = A^+ A.

    y = A x,   A^+ y = the smallest x with A x = y                                             (1)
    P = A^+ A  is the orthogonal projection onto what A sees: P = P^2 = P^T                    (2)

An operator is a frozen pytree with `__call__` and `pinv`. The adjoint needs no code: JAX transposes
what is linear (`adjoint`). An operator that holds something for each sample has `take(index)`.

    Mask      y = m x          A^+ y = m y              inpainting: m is 1 where x is known
    Grey      the mean over channels; A^+ repeats it    colorization
    Linear    a matrix for each sample as a vector; A^+ by its singular values

Isotropic noise z has independent parts P z and z - P z, which is all that inpainting needs of a
mask; so Grey is inpainting in a rotated colour space. The reference code rotates by an orthogonal
matrix, written to eight digits, whose first column is (1, 1, 1)/sqrt(3), and masks the first
coordinate: the same P, here to rounding.

Reference: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
2021, https://arxiv.org/abs/2011.13456, appendices I.2 to I.4.
"""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffjax.core import checks
from diffjax.core.pytree import pytree, replace, static
from diffjax.core.types import Array, PyTree


class LinearOperator(Protocol):
    """Eq. (1); see the module's docstring."""

    def __call__(self, x: PyTree, /) -> PyTree:
        """A x."""
        ...

    def pinv(self, y: PyTree, /) -> PyTree:
        """A^+ y, like x."""
        ...


def projection(operator: LinearOperator, x: PyTree) -> PyTree:
    """P x, eq. (2), like x."""
    return operator.pinv(operator(x))


def adjoint(operator: LinearOperator, y: PyTree, x: PyTree) -> PyTree:
    """A^T y, like x. x: any tree of the shapes and dtypes of the data."""
    return jax.linear_transpose(operator, x)(y)[0]


@pytree
class Mask:
    """Inpainting: keeps x where the mask is 1 and is 0 elsewhere; y is like x.

    mask: zeros and ones, a tree like x whose leaves have the shape of one sample, or 1 on some
      axes: (H, W, 1) for an image. per_sample: its leaves have the leading axis B too.
    What y holds where the mask is 0 is not used.
    """

    mask: PyTree
    per_sample: bool = static(default=False)

    def __post_init__(self):
        for leaf in jax.tree.leaves(self.mask):
            known = checks.concrete(leaf)
            if known is not None and not np.isin(known, (0, 1)).all():
                raise ValueError(f"A mask holds 0 (unknown) and 1 (known); got {np.unique(known)}.")

    def __call__(self, x: PyTree) -> PyTree:
        """m x, like x. Raises ValueError for a mask of another shape."""
        return jax.tree.map(_kept, self.mask, x)

    def pinv(self, y: PyTree) -> PyTree:
        """m y, like y."""
        return self(y)

    def take(self, index: Array) -> "Mask":
        """The operator of the samples `index`, (k,)."""
        if not self.per_sample:
            return self
        return replace(self, mask=jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], self.mask))


def _kept(mask: ArrayLike, leaf: Array) -> Array:
    known = jnp.asarray(mask)
    known = known[None] if known.ndim == leaf.ndim - 1 else known
    if not _fits(known.shape, leaf.shape):
        raise ValueError(
            f"A mask must have the shape of one sample, or 1 on some of its axes; got "
            f"{np.shape(mask)} for x of shape {leaf.shape}."
        )
    # Chosen rather than multiplied: what is unknown may be NaN.
    return jnp.where(known.astype(bool), leaf, jnp.zeros_like(leaf))


def _fits(mask: tuple[int, ...], x: tuple[int, ...]) -> bool:
    """Whether the shapes agree up to ones in the mask, and a one in x's place for all samples."""
    same_rank = len(mask) == len(x)
    return same_rank and all(
        m in (1, n) or (axis == 0 and n == 1)
        for axis, (m, n) in enumerate(zip(mask, x, strict=True))
    )


@pytree
class Grey:
    """Colorization: y is the mean over the last axis, (..., 1); A^+ repeats it."""

    channels: int = static(default=3)

    def __post_init__(self):
        checks.at_least("channels", self.channels, 2)

    def __call__(self, x: Array) -> Array:
        """(..., C) -> (..., 1)."""
        if x.shape[-1] != self.channels:
            raise ValueError(f"x must have {self.channels} channels; got shape {x.shape}.")
        return jnp.mean(x, axis=-1, keepdims=True)

    def pinv(self, y: Array) -> Array:
        """(..., 1) -> (..., C)."""
        if y.shape[-1] != 1:
            raise ValueError(f"y must have one channel, the grey one; got shape {y.shape}.")
        return jnp.repeat(y, self.channels, axis=-1)


@pytree
class Linear:
    """y = A x for x as a vector of D numbers: the general case, for small D. Use `Linear.of`.

    matrix: A, (M, D). inverse: A^+, (D, M). shape: one sample's, of D elements.
    """

    matrix: Array
    inverse: Array
    shape: tuple[int, ...] = static()

    @classmethod
    def of(cls, matrix: Any, shape: tuple[int, ...], *, cutoff: float = 1e-6) -> "Linear":
        """A with its pseudo-inverse from the singular values above cutoff times the largest.

        matrix: (M, D), known numbers. Directions that are cut off count as not measured; a y
        outside of A's range is met in the least-squares sense. Raises ValueError for another shape.
        """
        known = np.asarray(matrix, np.float64)
        if known.ndim != 2 or known.shape[1] != math.prod(shape):
            raise ValueError(
                f"matrix must be (M, D) with D = {math.prod(shape)}, the elements of a sample of "
                f"shape {shape}; got {known.shape}."
            )
        u, values, vh = np.linalg.svd(known, full_matrices=False)
        kept = values > cutoff * values[0]
        # What is cut off of A is cut off of both, so that eq. (2) holds.
        forward = (u[:, kept] * values[kept]) @ vh[kept]
        inverse = (vh[kept].T / values[kept]) @ u[:, kept].T
        return cls(jnp.asarray(forward, float), jnp.asarray(inverse, float), tuple(shape))

    def __call__(self, x: Array) -> Array:
        """(..., *shape) -> (..., M)."""
        lead = x.shape[: x.ndim - len(self.shape)]
        if x.shape[len(lead) :] != self.shape:
            raise ValueError(f"x must end in the shape {self.shape}; got {x.shape}.")
        return _times(self.matrix, x.reshape(*lead, -1))

    def pinv(self, y: Array) -> Array:
        """(..., M) -> (..., *shape)."""
        return _times(self.inverse, y).reshape(*y.shape[:-1], *self.shape)


def _times(matrix: Array, vectors: Array) -> Array:
    # Full precision: an accelerator's default of ten bits would leave y unmet by 1e-3.
    return jnp.einsum("...d,md->...m", vectors, matrix.astype(vectors.dtype), precision="highest")
