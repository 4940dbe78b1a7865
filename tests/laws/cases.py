"""What the laws of the solvers share: one compiled `sample` and one set of inputs per pair.

A law is a function law(pair): it raises AssertionError where the promise is broken. The suite runs
it over `members.PAIRS`, and over a mutant (`mutants`) that it must catch.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.pytree import pytree
from diffjax.processes import VP
from diffjax.solvers import ToEnd, grids, sample
from tests import members, oracles

B = 8  # one sample a simulated device

TRACES: list[None] = []  # one entry each time a denoiser is traced or called


@pytree
class Counted:
    """A denoiser that leaves an entry in `TRACES` whenever Python runs it."""

    denoise: Any

    def __call__(self, x, t):
        TRACES.append(None)
        return self.denoise(x, t)


class Mutated:
    """A pair of VP and a broken solver, with the face of `members.Pair`."""

    def __init__(self, solver):
        self.name, self.solver, self.process, self.final = "mutant", solver, VP(), ToEnd()

    def times(self, n=members.N):
        return grids.uniform(self.process, n)


# The one compiled sampler: laws that need a plain run share its programs. Without LLVM's optimiser,
# which contracts a * b + c into one rounding here and not there as the shape has it, so that what
# is equal is equal in every bit; it also compiles faster.
PLAIN = {"xla_backend_optimization_level": 0}
# The older emitters, which the tests compile with for speed (conftest), still contract in loops.
OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
EXACT = PLAIN | (
    {"xla_cpu_use_fusion_emitters": True} if OLD_EMITTERS in os.environ["XLA_FLAGS"] else {}
)
DRAW = jax.jit(sample, static_argnames=("save",), compiler_options=PLAIN)


def denoiser(pair):
    """The exact denoiser of Gaussian data under the pair's process: element-wise in x."""
    return Counted(oracles.gaussian(members.D).denoiser(pair.process))


def keys(seed=0, batch=B):
    """One key a sample."""
    return jax.random.split(jax.random.key(seed), batch)


def start(pair, batch=B):
    """x at the first time, (B, D), of about the right size."""
    x = np.random.default_rng(1).standard_normal((B, members.D)).astype(np.float32)[:batch]
    return jnp.asarray(x * float(jnp.max(pair.process.coeffs(pair.times()[0]).sigma)))


def arguments(pair, **changes):
    """The arguments of `sample` for a pair, but for the key and x; concrete, also under `jit`."""
    with jax.ensure_compile_time_eval():
        return {
            "denoise": denoiser(pair),
            "times": pair.times(),
            "solver": pair.solver,
            "process": pair.process,
            "final": pair.final,
        } | changes


def draw(pair, x=None, key=None, run=DRAW, **changes):
    """The samples of a pair, as the laws run it; `changes` replace arguments of `sample`."""
    given = arguments(pair, **changes)
    x = start(pair) if x is None else x
    key = keys(batch=jax.tree.leaves(x)[0].shape[0]) if key is None else key
    return run(key, given.pop("denoise"), x, given.pop("times"), **given).x


@functools.cache
def cached(pair):
    return np.asarray(draw(pair))


def base(pair) -> np.ndarray:
    """The plain run of a pair, computed once."""
    return cached(pair) if isinstance(pair, members.Pair) else np.asarray(draw(pair))
