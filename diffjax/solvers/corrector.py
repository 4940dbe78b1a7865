"""Predictor-corrector sampling with Langevin steps.

Symbols: g = -eps/sigma the score at (x, t), z standard normal, |.| the norm of one sample, D its
elements, a = alpha_t/alpha_s <= 1 of an interval that begins or ends at the corrector's time.

    x' = x + e g + sqrt(2 e) z                                                                  (1)
    Langevin             e = 2 a^2 (snr |z|/|g|)^2                                              (2)
    annealed Langevin    e = 2 a^2 (snr sigma)^2                                                (3)

a^2 is 1 - beta_k for VP on DDPM's grid and 1 for VE, as in the reference code (the paper's alpha
is the cumulative product in DDPM's notation); (1) thereby covers sub-VP, which the reference admits
and then fails on.

The reference code takes the means of |z| and |g| over the whole batch, across devices, so a sample
depends on its neighbours. The default here is each sample's own norms; coupling="batch" is the
reference's rule. A sample's own norms make its step depend on where it is, which raises the
variance that (2) settles at by a factor of about 1 + 4/D, ((D + 2)/D)^2 for Gaussian data:
nothing for an image, a quarter at D = 16. noise_norm="sqrt_dim" has sqrt(D) in place of |z|, as
appendix G of the paper advises for small batches and the reference code does not offer.

(3) is the rule of NCSN and NCSNv2, whose step is step_lr sigma^2/sigma_min^2: snr is
sqrt(step_lr/2)/sigma_min there [2, 3].

Order. Corrector first, as the reference code: at every time of the grid the corrector, then the
predictor's step; before Tweedie's denoising at the last time it comes too (`settle`). Over n
intervals that is n + 1 times, so the reference's N points are n = N - 1 intervals with
final=Tweedie(), and N (n_steps + 1) calls. Predictor first, as the paper's algorithm 1: the step,
then the corrector at the time that it led to, but not after a step without noise, whose end is to
stay as clean as it is. The two differ in the first time and in nothing else.

With `NoPredictor` x is carried from time to time by the corrector alone (NCSN), and the last
denoising is left to `Tweedie()`, or to `ToEnd()` on a grid that ends at sigma = 0. The reference
code's own noise removal then does nothing.

References:
[1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, section 4.2, appendix G, algorithms 4 and 5.
[2] Song, Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", 2019,
    https://arxiv.org/abs/1907.05600, algorithm 1.
[3] Song, Ermon, "Improved Techniques for Training Score-Based Generative Models", 2020,
    https://arxiv.org/abs/2006.09011.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from diffjax.core import checks, random
from diffjax.core.numerics import combine, norm_per_sample, safe_sqrt, size_per_sample
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import score
from diffjax.solvers.base import Solver, XState
from diffjax.solvers.euler import landed


class Corrector(Protocol):
    """Moves x at a fixed t towards p_t; `stages` calls of the denoiser.

    s: the other end of an interval at t, which gives a of eq. (1).
    """

    @property
    def stages(self) -> int: ...

    def correct(
        self, keys: Key, denoise: DenoiseFn, process: Process, x: PyTree, t: Array, s: Array
    ) -> PyTree: ...


def _ratio2(process: Process, t: Array, s: Array) -> Array:
    """a^2, whichever of t and s is the noisier."""
    at_t, at_s = process.coeffs(t).alpha, process.coeffs(s).alpha
    return (jnp.minimum(at_t, at_s) / jnp.maximum(at_t, at_s)) ** 2


def _langevin(
    keys: Key,
    denoise: DenoiseFn,
    process: Process,
    x: PyTree,
    t: Array,
    n_steps: int,
    size: Callable[[PyTree, PyTree], Array],
) -> PyTree:
    """n_steps of eq. (1) at t. size: (z, g) -> e."""

    def body(x, i):
        g = score(process, denoise(x, t), t)
        z = random.normal_like(random.step_keys(keys, i), "langevin", x)
        e = size(z, g)
        return combine((jnp.ones_like(e), x), (e, g), (safe_sqrt(2 * e), z)), None

    return jax.lax.scan(body, x, jnp.arange(n_steps))[0]


@pytree
class Langevin:
    """n_steps of eqs. (1) and (2).

    snr: the target signal-to-noise ratio of a step (0.16 for VE on CIFAR-10, 0.01 for VP).
    coupling: "sample" uses each sample's own norms, "batch" their means over the batch.
    noise_norm: "drawn" is |z|, "sqrt_dim" its expectation sqrt(D).
    """

    snr: Number = 0.16
    n_steps: int = static(default=1)
    coupling: Literal["sample", "batch"] = static(default="sample")
    noise_norm: Literal["drawn", "sqrt_dim"] = static(default="drawn")

    def __post_init__(self):
        checks.positive("snr", self.snr)
        checks.at_least("n_steps", self.n_steps, 1)
        checks.one_of("coupling", self.coupling, ("sample", "batch"))
        checks.one_of("noise_norm", self.noise_norm, ("drawn", "sqrt_dim"))

    @property
    def stages(self) -> int:
        return self.n_steps

    def correct(
        self, keys: Key, denoise: DenoiseFn, process: Process, x: PyTree, t: Array, s: Array
    ) -> PyTree:
        """x after n_steps of eq. (2), like x. Raises ValueError for a schedule per pixel."""
        a2 = _ratio2(process, t, s)
        if a2.shape != jnp.shape(t):
            raise ValueError(
                "Langevin takes one step size a sample, so it cannot use a schedule per pixel; got "
                f"coefficients of shape {a2.shape} at one time. Use AnnealedLangevin(), or leave "
                "the corrector out."
            )

        def size(z, g):
            size_z, size_g = norm_per_sample(z), norm_per_sample(g)
            if self.noise_norm == "sqrt_dim":
                size_z = jnp.full_like(size_z, size_per_sample(z) ** 0.5)
            if self.coupling == "batch":
                size_z, size_g = jnp.mean(size_z), jnp.mean(size_g)
            # Where the score vanishes the rule has no finite step; the guard keeps it finite.
            return 2 * a2 * (self.snr * size_z / jnp.maximum(size_g, 1e-12)) ** 2

        return _langevin(keys, denoise, process, x, t, self.n_steps, size)


@pytree
class AnnealedLangevin:
    """n_steps of eqs. (1) and (3): the step depends on the time alone, not on x.

    snr: step over noise level; NCSN has 0.316, NCSNv2 0.176 on CIFAR-10.
    """

    snr: Number = 0.176
    n_steps: int = static(default=1)

    def __post_init__(self):
        checks.positive("snr", self.snr)
        checks.at_least("n_steps", self.n_steps, 1)

    @property
    def stages(self) -> int:
        return self.n_steps

    def correct(
        self, keys: Key, denoise: DenoiseFn, process: Process, x: PyTree, t: Array, s: Array
    ) -> PyTree:
        """x after n_steps of eq. (3), like x."""
        e = 2 * _ratio2(process, t, s) * (self.snr * process.coeffs(t).sigma) ** 2
        return _langevin(keys, denoise, process, x, t, self.n_steps, lambda z, g: e)


@pytree
class NoCorrector:
    """Leaves x where it is."""

    stages = 0

    def correct(
        self, keys: Key, denoise: DenoiseFn, process: Process, x: PyTree, t: Array, s: Array
    ) -> PyTree:
        """x."""
        return x


@pytree
class NoPredictor:
    """Leaves x where it is, for a corrector alone; at the end of a grid with sigma = 0, E[x0 | x].

    By itself it samples nothing.
    """

    stages = 0
    final_stages = 1
    stochastic = False

    def init(self, process: Process, x: PyTree, t: Array) -> XState:
        return XState(x)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """The state."""
        return state

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """E[x0 | x_t] where sigma_s = 0, else the state."""
        return XState(landed(process, state.x, denoise(state.x, t).x0, s))


@pytree
class PredictorCorrector:
    """A corrector at the times of the grid, between the predictor's steps.

    order: "corrector_first" (the reference code) or "predictor_first" (the paper).
    """

    predictor: Solver
    corrector: Corrector
    order: Literal["corrector_first", "predictor_first"] = static(default="corrector_first")

    def __post_init__(self):
        checks.one_of("order", self.order, ("corrector_first", "predictor_first"))

    @property
    def stages(self) -> int:
        return self.predictor.stages + self.corrector.stages

    @property
    def final_stages(self) -> int:
        return self.predictor.final_stages + self.settle_stages

    @property
    def settle_stages(self) -> int:
        return self.corrector.stages if self._first else 0

    @property
    def stochastic(self) -> bool:
        return self.predictor.stochastic or self.corrector.stages > 0

    @property
    def _first(self) -> bool:
        return self.order == "corrector_first"

    def init(self, process: Process, x: PyTree, t: Array) -> Any:
        return self.predictor.init(process, x, t)

    def _correct(self, keys, denoise, process, state, t, s):
        return state._replace(x=self.corrector.correct(keys, denoise, process, state.x, t, s))

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array
    ) -> Any:
        """Corrects at t, then the predictor's step; or the step, then corrects at s."""
        if self._first:
            state = self._correct(keys, denoise, process, state, t, s)
            return self.predictor.step(keys, denoise, process, state, t, s)
        state = self.predictor.step(keys, denoise, process, state, t, s)
        return self._correct(keys, denoise, process, state, s, t)

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array
    ) -> Any:
        """The predictor's last interval; corrector first, after a correction at t."""
        if self._first:
            state = self._correct(keys, denoise, process, state, t, s)
        return self.predictor.finish(keys, denoise, process, state, t, s)

    def settle(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array
    ) -> Any:
        """Corrector first: corrects at s too, the last time; else it has been done."""
        if not self._first:
            return state
        own = random.step_keys(keys, random.tag("settle"))  # `step` has used these keys at t
        return self._correct(own, denoise, process, state, s, t)
