"""Predictor-corrector sampling with Langevin steps.

Symbols: g = -eps/sigma the score at (x, t), z standard normal, |.| the norm of one sample,
a = alpha_t/alpha_s of the interval that the predictor takes next.

    x' = x + e g + sqrt(2 e) z,     e = 2 a^2 (snr |z|/|g|)^2                                   (1)

a^2 is 1 - beta_k for VP on DDPM's grid and 1 for VE, as in the reference code (the paper's alpha
is the cumulative product in DDPM's notation); (1) thereby covers sub-VP, which the reference admits
and then fails on.

The reference code takes the means of |z| and |g| over the whole batch, across devices, so a sample
depends on its neighbours. The default here is each sample's own norms; coupling="batch" is the
reference's rule. A sample's own norms make its step depend on where it is, which raises the
variance that (1) settles at by a factor of about 1 + 4/D, ((D + 2)/D)^2 for Gaussian data:
nothing for an image, a quarter at D = 16.

Order within an interval: corrector at t, then predictor from t to s, as the reference code does;
the paper's algorithm 1 has the predictor first.

References:
[1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, section 4.2, appendix G, algorithms 4 and 5.
"""

from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from diffjax.core import checks, random
from diffjax.core.numerics import combine, norm_per_sample, safe_sqrt
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import score
from diffjax.solvers.base import Solver


class Corrector(Protocol):
    """Moves x at a fixed t towards p_t; `stages` calls of the denoiser."""

    @property
    def stages(self) -> int: ...

    def correct(
        self, keys: Key, denoise: DenoiseFn, process: Process, x: PyTree, t: Array, s: Array
    ) -> PyTree: ...


@pytree
class Langevin:
    """n_steps of eq. (1).

    snr: the target signal-to-noise ratio of a step (0.16 for VE on CIFAR-10, 0.01 for VP).
    coupling: "sample" uses each sample's own norms, "batch" their means over the batch.
    """

    snr: Number = 0.16
    n_steps: int = static(default=1)
    coupling: Literal["sample", "batch"] = static(default="sample")

    def __post_init__(self):
        checks.positive("snr", self.snr)
        checks.at_least("n_steps", self.n_steps, 1)
        checks.one_of("coupling", self.coupling, ("sample", "batch"))

    @property
    def stages(self) -> int:
        return self.n_steps

    def correct(
        self, keys: Key, denoise: DenoiseFn, process: Process, x: PyTree, t: Array, s: Array
    ) -> PyTree:
        """x after n_steps of eq. (1), like x. Raises ValueError for a schedule per pixel."""
        a2 = (process.coeffs(t).alpha / process.coeffs(s).alpha) ** 2
        if a2.shape != jnp.shape(t):
            raise ValueError(
                "Langevin takes one step size a sample, so it cannot use a schedule per pixel; got "
                f"coefficients of shape {a2.shape} at one time. Leave the corrector out."
            )

        def body(x, i):
            g = score(process, denoise(x, t), t)
            z = random.normal_like(random.step_keys(keys, i), "langevin", x)
            size_z, size_g = norm_per_sample(z), norm_per_sample(g)
            if self.coupling == "batch":
                size_z, size_g = jnp.mean(size_z), jnp.mean(size_g)
            # Where the score vanishes the rule has no finite step; the guard keeps it finite.
            ratio = size_z / jnp.maximum(size_g, 1e-12)
            e = 2 * a2 * (self.snr * ratio) ** 2
            return combine((jnp.ones_like(e), x), (e, g), (safe_sqrt(2 * e), z)), None

        return jax.lax.scan(body, x, jnp.arange(self.n_steps))[0]


@pytree
class PredictorCorrector:
    """A corrector at each time of the grid before the predictor's step."""

    predictor: Solver
    corrector: Corrector

    @property
    def stages(self) -> int:
        return self.predictor.stages + self.corrector.stages

    @property
    def final_stages(self) -> int:
        return self.predictor.final_stages + self.corrector.stages

    @property
    def stochastic(self) -> bool:
        return True

    def init(self, process: Process, x: PyTree, t: Array) -> Any:
        return self.predictor.init(process, x, t)

    def _correct(self, keys, denoise, process, state, t, s):
        return state._replace(x=self.corrector.correct(keys, denoise, process, state.x, t, s))

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array
    ) -> Any:
        """Corrects at t, then the predictor's step."""
        state = self._correct(keys, denoise, process, state, t, s)
        return self.predictor.step(keys, denoise, process, state, t, s)

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array
    ) -> Any:
        """Corrects at t, then the predictor's last interval."""
        state = self._correct(keys, denoise, process, state, t, s)
        return self.predictor.finish(keys, denoise, process, state, t, s)
