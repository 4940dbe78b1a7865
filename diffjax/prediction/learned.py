"""Learned variances: what the extra channels of a network say of the noise of a step.

Symbols: s < t two times; b^2 = sigma_t^2 (1 - r^2) and c^2 = sigma_s^2 (1 - r^2) the variances of
x_t | x_s and of x_s | x_t, x0 (`processes.calculus`, eqs. 2 and 3); v the extra channels, one
number for each of x. The variance Sigma of x_s | x_t, element by element, is

    LearnedRange   ln Sigma = u ln b^2 + (1 - u) ln c^2,   u = (v + 1)/2                       (1)
    LearnedLog     ln Sigma = v                                                                (2)

(1) is what iDDPM, ADM and DiT train [1]: on DDPM's levels b^2 is beta_t and c^2 its posterior
variance, which are the right ones for data of unit variance and for a single point. Since b and c
are those of the step that is taken, (1) holds for any subset of the levels, as in the reference
code; (2) holds for the steps of training only. v is not clipped: a network may leave the range.

A network has v in the second half of its channels, the last axis. `make_denoiser(...,
learned_variance=LearnedRange())` splits them and puts a `StepVariance` into
`Prediction.extras["variance"]`, where `solvers.Ancestral("learned")` and `losses.hybrid` find it.

Reference:
[1] Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    https://arxiv.org/abs/2102.09672, section 3.1, eq. 15; its code,
    https://github.com/openai/improved-diffusion.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffjax.core.numerics import expand
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, Prediction, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import between

VARIANCE = "variance"  # its name among the extras


class LearnedVariance(Protocol):
    """What the extra channels mean: an option of `make_denoiser`."""

    def std(
        self, values: PyTree, process: Process, t: Array, s: Array, floor: ArrayLike = 0.0
    ) -> PyTree:
        """The standard deviation of x_s | x_t, like values. s < t: () or (B,).

        floor: the least c, like t; for the step onto clean data, whose c is 0.
        """
        ...


@pytree
class LearnedRange:
    """Eq. (1): v in [-1, 1] leads from the posterior's variance to the transition's."""

    def std(
        self, values: PyTree, process: Process, t: Array, s: Array, floor: ArrayLike = 0.0
    ) -> PyTree:
        """Eq. (1) as c (b/c)^u; 0 where c is."""
        move = between(process, t, s)
        # Steps of no length, as padding has, keep finite logarithms.
        moves = move.gain > 0
        root = jnp.sqrt(jnp.where(moves, move.gain, 1.0))
        small = jnp.maximum(move.at_s.sigma * root, floor)
        large = move.at_t.sigma * root
        rise = jnp.log(large / jnp.where(small > 0, small, large))
        small = jnp.where(moves, small, 0.0)

        def of(v: Array) -> Array:
            return expand(small, v) * jnp.exp((v + 1) / 2 * expand(rise, v))

        return jax.tree.map(of, values)


@pytree
class LearnedLog:
    """Eq. (2): v is the logarithm of the variance itself."""

    def std(
        self, values: PyTree, process: Process, t: Array, s: Array, floor: ArrayLike = 0.0
    ) -> PyTree:
        """Eq. (2)."""
        return jax.tree.map(lambda v: jnp.exp(v / 2), values)


@pytree
class StepVariance:
    """The extra channels with their meaning. values: v, like x."""

    values: PyTree
    rule: LearnedVariance

    def std(self, process: Process, t: Array, s: Array, floor: ArrayLike = 0.0) -> PyTree:
        """The standard deviation of x_s | x_t, like x; see `LearnedVariance.std`."""
        return self.rule.std(self.values, process, t, s, floor)


def step_variance(prediction: Prediction, asked_by: str) -> StepVariance:
    """The learned variance of a prediction. Raises ValueError where it has none.

    asked_by: who wants it, for the message.
    """
    found = prediction.extras.get(VARIANCE)
    if found is None:
        raise ValueError(
            f"{asked_by} needs a learned variance, and this denoiser gives none. Pass "
            "learned_variance=LearnedRange() to make_denoiser, for a network with twice the "
            "channels of x, or choose a fixed variance ('small' or 'large')."
        )
    return found


def split_channels(out: PyTree, like: PyTree) -> tuple[PyTree, PyTree]:
    """Halves of the last axis of each leaf, (B, ..., 2 C): the prediction and v, each like `like`.

    Raises ValueError where a leaf has another shape than that.
    """
    for o, leaf in zip(jax.tree.leaves(out), jax.tree.leaves(like), strict=True):
        wanted = (*leaf.shape[:-1], 2 * leaf.shape[-1])
        if o.shape != wanted:
            raise ValueError(
                f"With a learned variance the network's output must have twice the channels of x, "
                f"{wanted}; got {o.shape}. Set out_channels (learn_sigma and return_sigma of DiT), "
                "or leave learned_variance out."
            )
    halves = [jax.tree.map(lambda o, i=i: jnp.split(o, 2, axis=-1)[i], out) for i in (0, 1)]
    return halves[0], halves[1]
