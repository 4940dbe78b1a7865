"""BDIA: two-step methods that can be run backwards exactly.

Symbols: r, t, s three consecutive times of a grid, z_r, z_t, z_s the samples there; L(u) where a
one-step method leads from z_t at the time u, forwards or backwards; gamma in (0, 1];
w = gamma where time runs down and 1/gamma where it runs up.

    z_s = w (z_r - L(r)) + L(s)                                                                (1)
    z_r = (z_s - L(s))/w + L(r)                                                                (2)
    BDIA-DDIM   L(u) = alpha_u x0 + sigma_u eps                          one call a step       (3)
    BDIA-EDM    L(u) = z_t + (u - t)/2 (v(z_t, t) + v(z', u)),           three calls           (4)
                z' = z_t + (u - t) v(z_t, t)

(1) follows the step from t to s and adds gamma times what a step back from z_t to r misses. It is
linear in z_r, and all else depends on z_t alone, so (2) is its inverse: (1) again with the times in
reverse order and 1/w for w. The first step of a solve has no z_r and is the one-step method's.

Order: with (3), 2 at gamma = 1 on a smooth grid, else 1 with (1 - gamma)/(1 + gamma) of DDIM's
leading error. With (4), 2 with Heun's leading error for every gamma. At gamma = 1 the method is of
leapfrog's kind: an error that alternates from step to step is not damped. The authors advise gamma
near 0.5 for 10 steps and 1 for 40 [2].

Rounding: an error in z_s is multiplied by 1/gamma a step in (2), so after n steps back the inverse
is off by about

    eps gamma^-n   of the largest value of the path, eps that of the dtype                     (5)

At gamma = 1 it is exact up to a few eps. `invert` and `sample_reversible` raise where (5) is above
a bound. Encoding data (a solve on an increasing grid) grows in the same way and its inverse, which
runs down, does not.

In (4) the calls at u = s and u = r are both made: a slope of the step before in place of that at r
would save one, but depends on z_r, and (2) would be an equation to solve. Where sigma is 0 at one
end, (3) stands in for (4), as in `Heun`'s last step, since nothing is asked there. The last step
onto sigma = 0 is (1) like the others: it keeps w (z_r - L(r)), without which z_r would be lost.

References:
[1] Zhang, Lewis, Kleijn, "Exact Diffusion Inversion via Bi-directional Integration Approximation",
    2023, https://arxiv.org/abs/2307.10829.
[2] Its code, https://github.com/guoqiang-zhang-x/BDIA.
"""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import combine, select
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import velocity
from diffjax.solvers.base import Keep
from diffjax.solvers.driver import Result, result, sample
from diffjax.solvers.euler import linear_step


class PairState(NamedTuple):
    """Two consecutive samples. t_previous: the time of `previous`; that of x before any step."""

    x: PyTree
    previous: PyTree
    t_previous: Array


def turned(state: PairState, t: Array) -> PairState:
    """The state of the same solve on its way back. t: the time of `state.x`."""
    t = jnp.asarray(t, state.t_previous.dtype)
    return PairState(state.previous, state.x, jnp.broadcast_to(t, state.t_previous.shape))


class _TwoStep(abc.ABC):
    """Eqs. (1) and (2) around `_leap`, which gives D in z_s = w z_r + D.

    Times are taken in the dtype of x, so that a step and its inverse see the same ones.
    """

    gamma: Number

    stochastic = False

    def __post_init__(self):
        checks.positive("gamma", self.gamma)
        checks.in_range("gamma", self.gamma, 0.0, 1.0)

    @abc.abstractmethod
    def _leap(
        self,
        denoise: DenoiseFn,
        process: Process,
        x: PyTree,
        times: tuple[Array, Array, Array],
        weight: Array,
        last: bool,
    ) -> PyTree:
        """D, like x. times: r, t, s. last: whether nothing may be asked at s."""

    def init(self, process: Process, x: PyTree, t: Array) -> PairState:
        return PairState(x, x, jnp.asarray(t, jnp.result_type(*jax.tree.leaves(x))))

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: PairState, t: Array, s: Array
    ) -> PairState:
        """Eq. (1)."""
        return self._advance(denoise, process, state, t, s, last=False)

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: PairState, t: Array, s: Array
    ) -> PairState:
        """Eq. (1), with nothing asked at s."""
        return self._advance(denoise, process, state, t, s, last=True)

    def _advance(self, denoise, process, state, t, s, last):
        t, s = (jnp.asarray(u, state.t_previous.dtype) for u in (t, s))
        weight = jnp.where(state.t_previous == t, 0, self._weight(t, s))
        times = state.t_previous, t, s
        moved = self._leap(denoise, process, state.x, times, weight, last)
        new = combine((weight, state.previous), (jnp.ones_like(weight), moved))
        return PairState(new, state.x, t)

    def undo(
        self, denoise: DenoiseFn, process: Process, state: PairState, t: Array, s: Array, r: Array
    ) -> PairState:
        """The state before the step from t to s that led to `state`, eq. (2).

        r: the time before t; t itself where the step was the first.
        """
        t, s, r = (jnp.asarray(u, state.t_previous.dtype) for u in (t, s, r))
        weight, x = self._weight(t, s), state.previous
        moved = self._leap(denoise, process, x, (r, t, s), weight, last=False)
        older = combine((1 / weight, state.x), (-1 / weight, moved))
        return PairState(x, select(r == t, x, older), r)

    def _weight(self, t: Array, s: Array) -> Array:
        gamma = jnp.asarray(self.gamma, t.dtype)
        return jnp.where(s < t, gamma, 1 / gamma)

    def check_inverse(self, times: Array, dtype: Any, max_error: float) -> None:
        """Raises ValueError if rounding, eq. (5), makes the way back over `times` meaningless."""
        gamma, known = checks.concrete(self.gamma), checks.concrete(times)
        if gamma is None or (known is not None and known[-1] > known[0]):
            return
        eps, intervals = float(jnp.finfo(dtype).eps), times.shape[0] - 1
        error = eps * float(gamma.min()) ** -intervals
        if error > max_error:
            raise ValueError(
                f"Running BDIA backwards multiplies rounding by 1/gamma a step: with gamma = "
                f"{self.gamma} and {intervals} intervals in {jnp.dtype(dtype).name} the inverse "
                f"would be off by {error:.2g} of the path's largest value, above max_error = "
                f"{max_error}. Use gamma = 1, fewer intervals, or float64."
            )


@pytree
class BDIADDIM(_TwoStep):
    """BDIA on DDIM, eqs. (1) and (3). gamma: in (0, 1]."""

    gamma: Number = 1.0

    stages = 1
    final_stages = 1

    def _leap(self, denoise, process, x, times, weight, last):
        r, t, s = times
        prediction = denoise(x, t)
        at_r, at_s = process.coeffs(r), process.coeffs(s)
        # One difference of coefficients each, not two points: the inverse then has exactly the
        # negative of it.
        return combine(
            (at_s.alpha - weight * at_r.alpha, prediction.x0),
            (at_s.sigma - weight * at_r.sigma, prediction.eps),
        )


@pytree
class BDIAEDM(_TwoStep):
    """BDIA on Heun's method, EDM's, eqs. (1) and (4). gamma: in (0, 1]."""

    gamma: Number = 1.0

    stages = 3
    final_stages = 2

    def _leap(self, denoise, process, x, times, weight, last):
        r, t, s = times
        prediction, one = denoise(x, t), jnp.ones_like(t)
        v = velocity(process, prediction, t)

        def straight(u):
            return combine((one, linear_step(process, prediction, u)), (-one, x))

        def heun(u):
            # Where sigma_u = 0 the call is made at t, and not used.
            clean = _is_clean(process, u)
            asked = jnp.where(clean, t, u)
            h = asked - t
            slope = velocity(process, denoise(combine((one, x), (h, v)), asked), asked)
            return select(clean, straight(u), combine((h / 2, v), (h / 2, slope)))

        there = straight(s) if last else heun(s)
        return combine((one, there), (-weight, heun(r)), (1 - weight, x))


def _is_clean(process: Process, t: Array) -> Array:
    """Whether sigma is 0 at t in every element; shaped like t."""
    sigma = process.coeffs(t).sigma
    return jnp.all(sigma == 0, axis=tuple(range(t.ndim, sigma.ndim)))


def invert(
    denoise: DenoiseFn,
    state: PairState,
    times: Array,
    *,
    solver: BDIADDIM | BDIAEDM,
    process: Process,
    max_error: float = 1e-3,
) -> Result:
    """From the final state of a solve over `times` back to where it started, exactly, eq. (2).

        done = sample(key, denoise, x, times, solver=solver, process=process)
        invert(denoise, done.state, times, solver=solver, process=process).x      # x again

    denoise, times, solver, process: as in the solve, without padding; its grid may have increased.
    The solve must end by ToEnd() or Keep(): Tweedie() puts x0 in the place of one of the two
    samples. One step fewer than the solve, since the state holds two: `nfe` counts what ran.
    `Result.state` is the pair at times[0], ready to be solved from again.

    max_error: the largest error by rounding, eq. (5), relative to the path's largest value. Raises
    ValueError above it, where gamma is known (not a tracer).
    """
    times = jnp.asarray(times)
    solver.check_inverse(times, state.t_previous.dtype, max_error)
    start = turned(state, times[-1])
    if times.shape[0] == 2:
        return result(denoise, start, 0)
    back = times[-2::-1]
    key = jax.random.key(0)  # nothing is drawn
    return sample(
        key, denoise, start.x, back, solver=solver, process=process, final=Keep(), state=start
    )
