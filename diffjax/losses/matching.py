"""Denoising score matching.

Symbols: eps standard normal, x0^ and eps^ the two halves of the prediction at (x_t, t), w the
time sampler's weight, (a, b) the row of the weighting, D the elements of one sample.

    x_t  = alpha(t) x0 + sigma(t) eps                                                          (1)
    loss = w reduce(|a (x0^ - x0) + b (eps^ - eps)|^2)                                         (2)

`reduce` takes a sample's D squares to one number: their `mean`, their sum (`total`, EDM's), or
`half_sum`, half of it as in the reference code's `reduce_mean=False`. Adam hardly sees the factors
of about D between them, clipping of the gradient does. The minimiser over all functions is the
posterior mean for every weighting.

Reference: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
2021, https://arxiv.org/abs/2011.13456, eq. 7.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.numerics import at_least_float32, batch_size, size_per_sample, sum_per_sample
from diffjax.core.random import normal_like, sample_keys
from diffjax.core.types import Array, DenoiseFn, Key, Prediction, PyTree
from diffjax.losses.times import TimeSampler, UniformTimes
from diffjax.losses.weights import Weight
from diffjax.prediction.kinds import Eps, target
from diffjax.processes.base import Process
from diffjax.processes.calculus import perturb

Reduce = Callable[[PyTree], Array]  # a sample's squares, (B, *data), to (B,)


class Asked(NamedTuple):
    """A batch at its drawn times, and what the network says of it.

    x0, x_t, eps: (B, *data), trees. t, importance: (B,), the times and their samplers' weights.
    """

    x0: PyTree
    x_t: PyTree
    eps: PyTree
    t: Array
    importance: Array
    prediction: Prediction


Watch = Callable[[Asked], Mapping[str, Array]]


def nothing(asked: Asked) -> dict[str, Array]:
    """Nothing more to watch."""
    del asked
    return {}


def mean(squares: PyTree) -> Array:
    """The mean over the D elements of each sample, (B,)."""
    return sum_per_sample(squares) / size_per_sample(squares)


def half_sum(squares: PyTree) -> Array:
    """Half the sum over the D elements of each sample, (B,)."""
    return sum_per_sample(squares) / 2


def total(squares: PyTree) -> Array:
    """The sum over the D elements of each sample, (B,)."""
    return sum_per_sample(squares)


def denoising_score_matching(
    key: Key,
    denoise: DenoiseFn,
    process: Process,
    x0: PyTree,
    *,
    times: TimeSampler = UniformTimes(),
    weight: Weight = Eps(),
    reduce: Reduce = mean,
    watch: Watch = nothing,
) -> tuple[Array, dict[str, Array]]:
    """The loss of each sample, eq. (2), (B,), and what to watch, each (B,).

    key: a typed key, or (B,) keys, one a sample; sample i's time and noise depend on its key only
      (except under `StratifiedTimes`).
    denoise: (x_t, t) -> Prediction. In training, call `make_denoiser` inside the function that is
      differentiated, with variables={"params": params}.
    x0: clean data (B, *data), a tree; half precision is raised to float32.
    times, weight, reduce: see `losses.times`, `losses.weights` and the module's docstring.
    watch: gives more to watch, each (B,), by name.
    The dict has "t", and "eps_error" and "x0_error", the unweighted means over D of the squares.
    """
    asked = ask(key, denoise, process, x0, times)
    losses, seen = match(asked, process, weight, reduce)
    return losses, seen | dict(watch(asked))


def ask(key: Key, denoise: DenoiseFn, process: Process, x0: PyTree, times: TimeSampler) -> Asked:
    """Draws times and noise, eq. (1), and calls the network once. As `denoising_score_matching`."""
    x0 = at_least_float32(x0)
    keys = sample_keys(key, batch_size(x0))
    t, importance = times(keys, process)
    eps = normal_like(keys, "eps", x0)
    x_t = perturb(process, x0, t, eps)
    return Asked(x0, x_t, eps, t, importance, denoise(x_t, t))


def match(
    asked: Asked, process: Process, weight: Weight, reduce: Reduce
) -> tuple[Array, dict[str, Array]]:
    """Eq. (2), (B,), and what to watch. As `denoising_score_matching`."""
    x0_error = jax.tree.map(jnp.subtract, asked.prediction.x0, asked.x0)
    eps_error = jax.tree.map(jnp.subtract, asked.prediction.eps, asked.eps)
    error = target(weight, process, x0_error, eps_error, asked.t)
    losses = asked.importance * reduce(_squares(error))
    watch = {
        "t": asked.t,
        "eps_error": mean(_squares(eps_error)),
        "x0_error": mean(_squares(x0_error)),
    }
    return losses, watch


def _squares(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.square, tree)
