"""A solver with the programs and inputs that the checks of `conformance` share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array
from diffjax.processes import Process, inverse_log_snr
from diffjax.solvers import Keep, PIController, Solver, ToEnd, Tweedie, grids, sample
from diffjax.solvers.ode import solve_adaptive
from diffjax.testing.oracles import mixture

NOISY, CLEAN = 5.0, 0.2  # noise levels sigma/alpha
ROUNDING = 1e-11  # errors below are not the method's
PLAIN = {"xla_backend_optimization_level": 0}  # equal in every bit whatever the shape


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """The solver with the programs that the checks share."""

    solver: Solver
    process: Process
    order: float | None
    dim: int
    steps: tuple[int, ...]

    @functools.cached_property
    def span(self) -> tuple[float, float]:
        """The times of the two noise levels, the noisy one first."""
        with jax.enable_x64(True):
            lam = -2 * jnp.log(jnp.asarray([NOISY, CLEAN]))
            t = inverse_log_snr(self.process, lam)
            high, low = np.clip(np.asarray(t), self.process.t_min, self.process.t_max)
        return float(high), float(low)

    @functools.cached_property
    def final(self) -> Any:
        """How a whole solve ends."""
        with jax.ensure_compile_time_eval():
            sigma = self.process.coeffs(jnp.asarray(0.0)).sigma
        return ToEnd() if float(sigma) == 0 else Tweedie()

    def times(self, n: int) -> Array:
        """n even steps of the log-SNR between the noise levels."""
        return grids.log_snr(self.process, n, t_max=self.span[0], end=self.span[1])

    def uneven_times(self, n: int) -> Array:
        """Steps that alternate 3 : 1: every other point is moved by half a step."""
        fine = self.times(2 * n)
        return fine[jnp.arange(0, 2 * n + 1, 2) + jnp.arange(n + 1) % 2]

    def whole_times(self, n: int) -> Array:
        """From the noisy level to the end of the process."""
        return grids.uniform(self.process, n, t_max=self.span[0])

    def start(self, batch: int, mean: float = 0.3) -> Array:
        """x at the noisy level, about distributed as the data there; NumPy's noise."""
        c = self.process.coeffs(jnp.asarray(self.span[0]))
        z = np.random.default_rng(0).standard_normal((batch, self.dim))
        return c.alpha * mean + jnp.sqrt(c.sigma**2 + 0.3 * c.alpha**2) * jnp.asarray(z)

    @functools.cached_property
    def between(self) -> Callable[..., Array]:
        """(x, times, oracle) -> x at the last time; one program for all numbers of steps."""
        longest = self.steps[-1]

        @functools.partial(jax.jit, compiler_options=PLAIN)
        def run(x, times, n, denoise):
            return sample(
                jax.random.key(1),
                denoise,
                x,
                times,
                solver=self.solver,
                process=self.process,
                final=Keep(),
                n_steps=n,
            ).x

        def solve(x, times, oracle):
            times, n = grids.padded(times, longest)
            return run(x, times, n, oracle.denoiser(self.process))

        return solve

    @functools.cached_property
    def flow(self) -> tuple[Array, Array]:
        """(x at the noisy level, x at the clean one) on the mixture, by another method."""
        x = self.start(32)
        denoise = mixture(self.dim, jnp.float64).denoiser(self.process)

        @functools.partial(jax.jit, compiler_options=PLAIN)
        def run(x):
            return solve_adaptive(
                jax.random.key(0),
                denoise,
                x,
                *self.span,
                process=self.process,
                controller=PIController(ROUNDING, ROUNDING),
                final=Keep(),
            ).x

        return x, run(x)

    @functools.cached_property
    def counted(self) -> Callable[..., Any]:
        """(n, oracle) -> (x, declared calls, times of the calls that ran) of a whole solve."""
        calls: list[np.ndarray] = []

        @functools.partial(jax.jit, compiler_options=PLAIN)
        def run(x, times, n, denoise):
            def counting(x, t):
                jax.debug.callback(lambda t: calls.append(np.asarray(t)), t)
                return denoise(x, t)

            return sample(
                jax.random.key(1),
                counting,
                x,
                times,
                solver=self.solver,
                process=self.process,
                final=self.final,
                n_steps=n,
            )

        def solve(n, oracle):
            times, n = grids.padded(self.whole_times(n), 5)
            x = self.start(4).astype(jnp.float32)
            calls.clear()
            result = run(x, times, n, oracle.denoiser(self.process))
            jax.block_until_ready(result.x)
            jax.effects_barrier()
            return result.x, int(result.nfe), list(calls)

        return solve
