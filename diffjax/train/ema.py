"""Running averages of the weights.

Symbols: n = 0, 1, ... counts the updates already made, p the weights after the update, q their
average, d(n) the decay, B the images in a batch.

    q <- q + (1 - d(n)) (p - q)                                                             (1)

A rule is a value that gives d(n). Written as (1) rather than d q + (1 - d) p, a weight that does
not move keeps its average to the last bit.

    constant    d(n) = r                                                                    (2)
    warm-up     d(n) = min(r, (1 + m) / (10 + m)),      m = n + 1 updates with this one     (3)
    half-life   d(n) = 2^(-B / H),   H = min(half_life, ramp_up n B)  in images             (4)
    power       d(n) = (1 - 1/t)^(gamma + 1),           t = n + 1 updates with this one     (5)

Under (5) the weights after update s <= t have the share of the average after update t

    ((s/t)^(gamma + 1) - ((s - 1)/t)^(gamma + 1)) = integral of p(u) over s - 1 < u < s,
    p(u) = (gamma + 1) u^gamma / t^(gamma + 1)   for 0 < u < t                              (6)

whose standard deviation is a fixed share of the run so far,

    std = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))   times t.                        (7)

Averages of (5) at several t and gamma combine to those of any other gamma: `posthoc`.

References:
  (2), (3): Song et al., "Score-based generative modeling through stochastic differential
    equations", 2021, https://arxiv.org/abs/2011.13456; its JAX code has (2), its PyTorch code (3).
  (4): Karras et al., "Elucidating the design space of diffusion-based generative models", 2022,
    https://arxiv.org/abs/2206.00364, app. F.
  (5) to (7): Karras et al., "Analyzing and improving the training dynamics of diffusion models",
    2024, https://arxiv.org/abs/2312.02696, section 3.1 and app. C.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Number, PyTree

WIDEST = 12**-0.5  # the relative width of a uniform average, gamma = 0 in eq. (7)


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


@pytree
class PowerEMA:
    """A profile that widens with the run, eq. (5): `std` is its relative width, eq. (7).

    std in (0, 12^-1/2 = 0.2886]; at the upper end gamma is 0 and all updates count alike. The
    initial weights never count: the first average is the weights after the first update.
    """

    std: Number = 0.05

    def __post_init__(self):
        _check_std(self.std)

    def __call__(self, step: Array | int) -> Array:
        t = jnp.asarray(step, float) + 1
        return jnp.exp((power_gamma(self.std) + 1) * jnp.log1p(-1 / t))


def power_gamma(std: Number | np.ndarray) -> Array:
    """The exponent gamma >= 0 of a profile of relative width `std`, eq. (7); in the shape of std.

    With y = gamma + 2 eq. (7) is y^3 + y^2 - (y - 1) / std^2 = 0, a cubic of three real roots whose
    largest is wanted.
    """
    xp: Any = np if isinstance(std, (float, np.ndarray)) else jnp  # NumPy: in float64
    inverse = 1 / xp.asarray(std) ** 2
    p, q = -(inverse + 1 / 3), 2 / 27 + 4 / 3 * inverse
    radius = xp.sqrt(-p / 3)
    cosine = xp.clip(-q / (2 * radius**3), -1, 1)
    return 2 * radius * xp.cos(xp.arccos(cosine) / 3) - 7 / 3


def averages(
    rules: Mapping[str, EMARule], step: Array, ema: PyTree, params: PyTree
) -> dict[str, PyTree]:
    """Every track after an update, eq. (1). rules, ema: by name. step: n. params: after it.

    Raises ValueError where the names differ.
    """
    if rules.keys() != ema.keys():
        raise ValueError(
            f"The rules are of the averages {sorted(rules)}, the state has {sorted(ema)}; make the "
            "state with create_state(..., tracks=rules)."
        )
    return {name: average(rule(step), ema[name], params) for name, rule in rules.items()}


def average(decay: Array, ema: PyTree, params: PyTree) -> PyTree:
    """The average after an update, eq. (1). decay: (). ema, params: trees of one structure."""
    return jax.tree.map(lambda q, p: q + (1 - decay).astype(q.dtype) * (p - q), ema, params)


def _check_rate(rate: Number) -> None:
    known = checks.concrete(rate)
    if known is not None and not 0 <= known < 1:
        raise ValueError(f"rate must lie in [0, 1); got {rate}.")


def _check_std(std: Number) -> None:
    known = checks.concrete(std)
    if known is not None and not (np.all(known > 0) and np.all(known <= WIDEST)):
        raise ValueError(
            f"std, the relative width of a power-function average, must lie in (0, {WIDEST:.4f}], "
            f"whose end counts all updates alike; got {std}."
        )
