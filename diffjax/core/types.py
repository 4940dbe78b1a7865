"""The few types that every room speaks.

Symbols: x_t is the state at time t, a pytree of arrays with one leading batch axis B (or none under
`vmap`). t is a scalar array or has shape (B,). x0 is the clean data, eps the unit noise.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
from flax.core import FrozenDict

Array = jax.Array
PyTree = Any
Key = jax.Array  # a typed PRNG key: scalar, or (B,), one a sample
Number = float | jax.Array  # a leaf of a process, solver or guide


class Prediction(NamedTuple):
    """What a model says at (x_t, t): both halves of x_t = alpha x0 + sigma eps.

    x0, eps: trees like x_t. They may disagree with x_t on purpose (guidance that moves x0 only,
    clipping). extras: further outputs by name, such as a learned variance.
    """

    x0: PyTree
    eps: PyTree
    extras: Mapping[str, Any] = FrozenDict()


class DenoiseFn(Protocol):
    """The model contract: any callable (x_t, t) -> Prediction."""

    def __call__(self, x_t: PyTree, t: Array, /) -> Prediction: ...


def evaluations(denoise: DenoiseFn) -> int:
    """How many networks one call asks: `denoise.evaluations` where a guide says so, else 1."""
    return getattr(denoise, "evaluations", 1)


class Coeffs(NamedTuple):
    """The forward law x_t = alpha x0 + beta y + sigma eps at some t; beta = 0 without an anchor y.

    Each has the shape of t, or, with a schedule per pixel, of one sample of x.
    """

    alpha: Array
    beta: Array
    sigma: Array


class Rates(NamedTuple):
    """The coefficients of dx = f x dt + g dw: f = d log(alpha)/dt and g^2, shaped like t."""

    f: Array
    g2: Array
