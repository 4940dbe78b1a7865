"""Running averages of the weights.

Symbols: n = 0, 1, ... counts the updates already made, p the weights after the update, q their
average, d(n) the decay, B the images in a batch.

    q <- q + (1 - d(n)) (p - q)                                                             (1)

A rule is a value that gives d(n). Written as (1) rather than d q + (1 - d) p, a weight that does
not move keeps its average to the last bit.

    constant    d(n) = r                                                                    (2)
    warm-up     d(n) = min(r, (1 + m) / (10 + m)),      m = n + 1 updates with this one     (3)
    half-life   d(n) = 2^(-B / H),   H = min(half_life, ramp_up n B)  in images             (4)

References:
  (2), (3): Song et al., "Score-based generative modeling through stochastic differential
    equations", 2021, https://arxiv.org/abs/2011.13456; its JAX code has (2), its PyTorch code (3).
  (4): Karras et al., "Elucidating the design space of diffusion-based generative models", 2022,
    https://arxiv.org/abs/2206.00364, app. F.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Number, PyTree


class EMARule(Protocol):
    """Gives the decay d(n) in [0, 1) of the update that follows n others."""

    def __call__(self, step: Array | int, /) -> Array: ...


@pytree
class ConstantEMA:
    """The decay `rate` in [0, 1) at every step, eq. (2). Rate 0: the average is the weights."""

    rate: Number = 0.9999

    def __post_init__(self):
        _check_rate(self.rate)

    def __call__(self, step: Array | int) -> Array:
        del step
        return jnp.asarray(self.rate, float)


@pytree
class WarmupEMA:
    """The decay `rate` in [0, 1), less in the first steps, eq. (3)."""

    rate: Number = 0.9999

    def __post_init__(self):
        _check_rate(self.rate)

    def __call__(self, step: Array | int) -> Array:
        m = jnp.asarray(step, float) + 1
        return jnp.minimum(self.rate, (1 + m) / (10 + m))


@pytree
class HalfLifeEMA:
    """A decay by half over `half_life_images`, eq. (4), whatever the batch size.

    batch_size: B > 0 images a step. ramp_up: the half-life is at most this share (> 0) of the
    images seen so far; None for no ramp.
    """

    half_life_images: Number
    batch_size: Number
    ramp_up: Number | None = 0.05

    def __post_init__(self):
        checks.positive("half_life_images", self.half_life_images)
        checks.positive("batch_size", self.batch_size)
        checks.positive("ramp_up", self.ramp_up)

    def __call__(self, step: Array | int) -> Array:
        half_life = jnp.asarray(self.half_life_images, float)
        if self.ramp_up is not None:
            # In floating point from the start: images overflow int32 in long runs.
            seen = jnp.asarray(step, float) * self.batch_size
            half_life = jnp.minimum(half_life, self.ramp_up * seen)
        # At the first step H is 0 and the average becomes the weights.
        return jnp.exp2(-self.batch_size / jnp.maximum(half_life, 1e-8))


def average(decay: Array, ema: PyTree, params: PyTree) -> PyTree:
    """The average after an update, eq. (1). decay: (). ema, params: trees of one structure."""
    return jax.tree.map(lambda q, p: q + (1 - decay).astype(q.dtype) * (p - q), ema, params)


def _check_rate(rate: Number) -> None:
    known = checks.concrete(rate)
    if known is not None and not 0 <= known < 1:
        raise ValueError(f"rate must lie in [0, 1); got {rate}.")
