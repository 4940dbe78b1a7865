"""The time-shift sampler: the denoiser is asked at the time that the sample's own variance tells.

Symbols: v(x) the variance over the D numbers of one sample, d^2 that of one sample of clean data,
t the grid's time, w the width of the window, s < t the target of the step.

    E v(x_t) = alpha(t)^2 d^2 + sigma(t)^2                                                      (1)
    t' = argmin |v(x_t) - alpha(u)^2 d^2 - sigma(u)^2|   over u in [t - w/2, t + w/2]           (2)
    x_s = step of any one-step solver from t' to s, the denoiser asked at t'                    (3)

A solver's errors, the model's and its own, leave the sample at a level that is not the grid's. A
step of DDIM, which leads along E[x0 | x], always leaves too little variance (Cauchy-Schwarz), more
so the longer it is. (2) finds the level that the sample has, for each sample alone. The first step
has no error behind it and is not shifted; nor are steps at or below a cut-off, where (1) no longer
changes with t.

When to use it. v of one sample has a relative standard error of about sqrt(2/D): 2.6% for 32 x 32 x
3, 35% for D = 16, where (2) is noise. And (1) must change with t: on a variance-preserving process
with d = 1 it says nothing. `data_variance` is the mean over the data of a sample's own variance,
0.25 or so for images in [-1, 1]. The paper leaves its part out of (1), which is d = 0 here: then
(2) sees too high a level wherever alpha(t)^2 d^2 is not small beside sigma(t)^2, and most shifts go
to the window's upper end. On a mixture of deviation 0.5 with learned denoisers and ten steps, a
window of 0.1 with the data's d takes 18 to 36% off DDIM's error, and with d = 0 adds 17 to 36% to
it; a window of 0.3 doubled the error of one network in five (tests/solvers).

The paper's window and cut-off are in training steps of 1,000: its w = 30 with cut-off 300 is 0.03
and 0.3 of a process on [0, 1]. It picks among the training times inside the window, here among
`candidates` evenly spaced ones. Its public code for DDIM and PNDM does something else than its
algorithm: it asks the network at the grid's t and moves the target s, to where (1) meets the
variance of x at t. Here the algorithm is followed.

References:
[1] Li, Qu, Yao, Sun, Moens, "Alleviating Exposure Bias in Diffusion Models through Sampling with
    Shifted Time Steps", 2023, https://arxiv.org/abs/2305.15583, algorithm 3, and its code,
    https://github.com/Mingxiao-Li/TS-DPM.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import batch_size, expand, size_per_sample, sum_per_sample
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.solvers.base import Around, Solver, XState, check_one_step


class ShiftedState(NamedTuple):
    """x, and (B,) whether a step lies behind."""

    x: PyTree
    moved: Array


def variance_per_sample(x: PyTree) -> Array:
    """v(x), the variance over all numbers of each sample, (B,); D - 1 in the denominator."""
    size = size_per_sample(x)
    mean = sum_per_sample(x) / size
    squares = sum_per_sample(jax.tree.map(lambda leaf: jnp.square(leaf - expand(mean, leaf)), x))
    return squares / max(size - 1, 1)


@pytree
class TimeShift(Around):
    """A one-step solver whose steps start at the time of eq. (2).

    solver: any that steps from t to s and has no history (DDIM, Euler, Heun, Ancestral). window: w,
    in units of t. cutoff: the last time that is not shifted. data_variance: d^2, to be measured on
    the data; 0 is the paper's rule. candidates: the number of times tried; odd, so that t itself is
    one of them.
    """

    solver: Solver
    window: Number = 0.03
    cutoff: Number = 0.3
    data_variance: Number = 0.25
    candidates: int = static(default=31)

    def __post_init__(self):
        checks.non_negative("window", self.window)
        checks.non_negative("cutoff", self.cutoff)
        checks.non_negative("data_variance", self.data_variance)
        checks.at_least("candidates", self.candidates, 1)

    @property
    def predictor(self) -> Solver:
        """The part whose last step may leave its noise out."""
        return getattr(self.solver, "predictor", self.solver)

    def init(self, process: Process, x: PyTree, t: Array) -> ShiftedState:
        """Raises ValueError for a schedule per pixel or a solver with a history."""
        shape = process.coeffs(t).sigma.shape
        if shape != jnp.shape(t):
            raise ValueError(
                "TimeShift compares one variance a sample with one level, so it cannot use a "
                f"schedule per pixel; got coefficients of shape {shape} at one time."
            )
        batch = batch_size(x)
        inner = self.solver.init(process, x, jnp.broadcast_to(t, (batch,)))
        check_one_step(self.solver, inner, "a shifted time")
        return ShiftedState(inner.x, jnp.zeros((batch,), bool))

    def step(
        self,
        keys: Key,
        denoise: DenoiseFn,
        process: Process,
        state: ShiftedState,
        t: Array,
        s: Array,
    ) -> ShiftedState:
        """Eqs. (2) and (3)."""
        return self._at_shifted(self.solver.step, keys, denoise, process, state, t, s)

    def finish(
        self,
        keys: Key,
        denoise: DenoiseFn,
        process: Process,
        state: ShiftedState,
        t: Array,
        s: Array,
    ) -> ShiftedState:
        """The inner solver's last interval, from the time of eq. (2)."""
        return self._at_shifted(self.solver.finish, keys, denoise, process, state, t, s)

    def _at_shifted(self, advance, keys, denoise, process, state, t, s):
        start = jnp.where(state.moved, self.shifted(process, state.x, t, s), t)
        inner = advance(keys, denoise, process, XState(state.x), start, s)
        return ShiftedState(inner.x, jnp.ones_like(state.moved))

    def shifted(self, process: Process, x: PyTree, t: Array, s: Array) -> Array:
        """t' of eq. (2), (B,), on t's side of the middle of s and t; t at or below the cut-off.

        The middle, so that a window wider than the step cannot lead behind the target.
        """
        found = variance_per_sample(x)
        places = jnp.linspace(-0.5, 0.5, self.candidates)
        tried = jnp.asarray(t)[..., None] + self.window * places.astype(found.dtype)
        middle, down = (t + s) / 2, s < t
        low = jnp.maximum(jnp.where(down, middle, process.t_min), process.t_min)
        high = jnp.where(down, jnp.maximum(process.t_max, t), middle)
        tried = jnp.clip(tried, low, high)
        at = process.coeffs(tried)
        expected = at.alpha**2 * self.data_variance + at.sigma**2
        nearest = jnp.argmin(jnp.abs(found[:, None] - expected[None]), axis=1)
        return jnp.where(t > self.cutoff, tried[nearest], t).astype(found.dtype)
