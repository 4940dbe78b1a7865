"""Shared by the solver tests: processes with safe ranges, mutants and counted denoisers."""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import random
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Prediction
from diffjax.processes import EDM, VE, VP, Cosine, RectifiedFlow, SubVP
from diffjax.solvers import sample
from diffjax.testing.case import PLAIN


class Span(NamedTuple):
    """A process, and times low < high at which everything about it is smooth."""

    process: Any
    low: float
    high: float


SPANS = {
    "vp": Span(VP(), 0.1, 0.9),
    "ve": Span(VE(), 0.5, 0.85),
    "sub_vp": Span(SubVP(), 0.1, 0.9),
    "edm": Span(EDM(), 0.2, 5.0),
    "cosine": Span(Cosine(), 0.1, 0.9),
    "flow": Span(RectifiedFlow(), 0.1, 0.9),
}


def padded(times, length):
    """The grid with its first time repeated in front, (length + 1,), for `n_steps`."""
    times = jnp.asarray(times)
    front = jnp.full((length + 1 - times.shape[0],), times[0])
    return jnp.concatenate([front, times])


def padded_solver(solver, process, denoise, final):
    """(x, times padded, n) -> x at the end; one compilation for every n."""

    @functools.partial(jax.jit, compiler_options=PLAIN)
    def solve(x, times, n):
        result = sample(
            jax.random.key(0),
            denoise,
            x,
            times,
            solver=solver,
            process=process,
            final=final,
            n_steps=n,
        )
        return result.x

    return solve


@pytree
class Mutant:
    """A solver whose step is `change(solver, keys, denoise, process, state, t, s)`."""

    solver: Any
    change: Any = static()

    stages = property(lambda self: self.solver.stages)
    final_stages = property(lambda self: self.solver.final_stages)
    stochastic = property(lambda self: self.solver.stochastic)

    def init(self, process, x, t):
        return self.solver.init(process, x, t)

    def step(self, keys, denoise, process, state, t, s):
        return self.change(self.solver, keys, denoise, process, state, t, s)

    def finish(self, keys, denoise, process, state, t, s):
        return self.solver.finish(keys, denoise, process, state, t, s)


@contextlib.contextmanager
def scaled_noise(factor):
    """Multiplies every draw inside by `factor`; works on top of `given_noise`."""
    original = random.normal_like
    try:
        random.normal_like = lambda keys, name, x: factor * original(keys, name, x)
        yield
    finally:
        random.normal_like = original


def noise_scaled_by(factor):
    """A mutation: the step's noise is multiplied by `factor` (0: none)."""

    def change(solver, *args):
        with scaled_noise(factor):
            return solver.step(*args)

    return change


def times_swapped(solver, keys, denoise, process, state, t, s):
    """A mutation: the target in place of the current time."""
    return solver.step(keys, denoise, process, state, s, t)


def bent_denoiser(process):
    """A smooth, nonlinear, consistent denoiser of no particular law: eps = sin(x) + x/3 + t/5."""

    def denoise(x, t):
        c = process.coeffs(t)
        eps = jnp.sin(x) + x / 3 + t / 5
        return Prediction((x - c.sigma * eps) / c.alpha, eps)

    return denoise


class Counter:
    """Counts the calls of a denoiser that really ran, by a callback."""

    def __init__(self, denoise):
        self.inner = denoise
        self.count = 0

    def _tick(self):
        self.count += 1

    def __call__(self, x, t):
        jax.debug.callback(self._tick)
        return self.inner(x, t)

    def read(self):
        """The count since the last reading."""
        jax.effects_barrier()
        count, self.count = self.count, 0
        return count


def standard_normal(seed, shape):
    """NumPy noise, float64."""
    return np.random.default_rng(seed).standard_normal(shape)
