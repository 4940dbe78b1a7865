"""Tools to test a solver of your own against truth.

Symbols: n steps, e(n) an error, p an order, x_s = A x_t + b + C z one step of a stochastic solver
whose denoiser is affine in x (Gaussian data), z standard normal.

    e(n) ~ n^-p,  so p is minus the slope of ln e over ln n                                     (1)
    m_s = A m_t + b,   P_s = A P_t A^T + C C^T                                                  (2)

(2) is exact: a weak order found with it has no sampling noise. An order is fitted on the finest
grids that rounding allows, in float64, on times away from the ends; for data of several modes the
error is the median over particles, because the root mean square is ruled by the few that switch.

    errors = [median_error(solve(n), exact) for n in steps]
    assert abs(order_of_convergence(steps, errors) - 2) < 0.2
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import random
from diffjax.core.types import Array, DenoiseFn, PyTree
from diffjax.processes.base import Process
from diffjax.solvers.base import Solver


def order_of_convergence(steps: Sequence[int], errors: Sequence[float]) -> float:
    """p of eq. (1) by least squares. steps: numbers of steps; errors: positive, one each.

    Raises ValueError if an error is zero or not finite: then there is no order to speak of.
    """
    values = np.asarray(errors, np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(
            f"Errors must be positive and finite to fit an order; got {values.tolist()}. Use "
            "coarser grids if they reached zero, or compare directly if the solver is exact."
        )
    return float(-np.polyfit(np.log(np.asarray(steps, np.float64)), np.log(values), 1)[0])


def median_error(x: Array, exact: Array) -> float:
    """The median over samples of |x - exact|, the Euclidean norm of each. Both (B, *data)."""
    gap = np.asarray(x, np.float64) - np.asarray(exact, np.float64)
    return float(np.median(np.linalg.norm(gap.reshape(gap.shape[0], -1), axis=1)))


@contextlib.contextmanager
def given_noise(draw: Callable[[str, PyTree], PyTree]) -> Iterator[None]:
    """Within it, `core.random.normal_like(keys, name, x)` returns `draw(name, x)`.

    For functions traced inside only: a jitted function that was compiled before keeps its noise.
    """

    def replacement(keys, name, x):
        return draw(name, x)

    with mock.patch.object(random, "normal_like", replacement):
        yield


def count_draws(solver: Solver, denoise: DenoiseFn, process: Process, x: PyTree) -> int:
    """How many whole-batch draws one `solver.step` makes; a loop's body counts once."""
    draws = []

    def draw(name, like):
        draws.append(name)
        return like

    times = jnp.asarray([process.t_max, (process.t_max + process.t_min) / 2])
    keys = random.sample_keys(jax.random.key(0), jax.tree.leaves(x)[0].shape[0])

    def step(x):
        state = solver.init(process, x, times[0])
        return solver.step(keys, denoise, process, state, times[0], times[1])

    with given_noise(draw):
        jax.eval_shape(step, x)
    return len(draws)


def propagate_moments(
    solver: Solver,
    denoise: DenoiseFn,
    process: Process,
    times: Array,
    mean: Array,
    covariance: Array,
) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D) of x at times[-1], eq. (2), exact up to rounding.

    solver: its step must be affine in x where `denoise` is, with any number of draws; one-step
      methods without rules that depend on the noise's norm.
    times: (n+1,); repeated times are allowed for solvers that stay put over them.
    mean, covariance: of x at times[0].
    """
    dim = mean.shape[0]
    draws = count_draws(solver, denoise, process, jnp.zeros((1, dim), mean.dtype))
    rows = 1 + dim * (1 + draws)
    unit = jnp.eye(dim, dtype=mean.dtype)
    start = jnp.zeros((rows, dim), mean.dtype).at[1 : 1 + dim].set(unit)
    keys = random.sample_keys(jax.random.key(0), rows)

    def response(t, s):
        """The step's output for x = 0, for each unit of x, and for each unit of each draw."""
        used = iter(range(draws))

        def draw(name, like):
            first = 1 + dim * (1 + next(used))
            return jnp.zeros_like(like).at[first : first + dim].set(unit)

        with given_noise(draw):
            state = solver.init(process, start, t)
            return solver.step(keys, denoise, process, state, t, s).x

    def body(moments: Any, pair: Any) -> Any:
        mean, covariance = moments
        out = response(*pair)
        b, gain, spread = out[0], (out[1 : 1 + dim] - out[:1]).T, (out[1 + dim :] - out[:1]).T
        mean = gain @ mean + b
        return (mean, gain @ covariance @ gain.T + spread @ spread.T), None

    return jax.lax.scan(body, (mean, covariance), (times[:-1], times[1:]))[0]
