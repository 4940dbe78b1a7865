"""DPM-Solver with steps of its own: two orders of one exponential method, compared.

Symbols: lam = ln(alpha/sigma), half the log-SNR; h the step in lam, from s to t; eps_i the noise
predicted at stage i, D_i = eps_i - eps_0; E(z) = expm1(z), P(z) = E(z)/z - 1; index i at the time
of lam_s + r_i h.

    x_t = (alpha_t/alpha_s) x_s - sigma_t E(h) eps_0                              order 1       (1)
    x_t = (1) - sigma_t E(h)/(2 r_1) D_1                                          order 2       (2)
    x_2 = (1 at r_2 h) - sigma_2 (r_2/r_1) P(r_2 h) D_1
    x_t = (1) - sigma_t P(h)/r_2 D_2                                              order 3       (3)

    DPM-Solver-12: (1) against (2), r_1 = 1/2.  DPM-Solver-23: (2) against (3), r = 1/3, 2/3.
    err = rms((low - high) / max(atol, rtol max(|low|, |low of the last accepted step|)))       (4)
    accept high if err <= 1;   h <- 0.9 h err^(-1/order), no further than the end               (5)

Order 2 or 3 calls of the denoiser in an attempt; a rejected one is paid in full. The first step is
0.05.

The paper and its code [2] take the largest err of a batch, so all its samples share every step and
depend on one another; here each has its own. (5) is `PIController`'s rule, which also bounds the
factor and lets no step grow after a rejection; `paper_controller` lifts both bounds.

References:
[1] Lu, Zhou, Bao, Chen, Li, Zhu, "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model
    Sampling in Around 10 Steps", 2022, https://arxiv.org/abs/2206.00927, algorithms 1 and 2 and
    appendix C.
[2] https://github.com/LuChengTHU/dpm-solver
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import combine
from diffjax.core.types import Array, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.solvers.adaptive import PIController, Progress, Trial, staged
from diffjax.solvers.methods import Problem, check_log_snr, half_log_snr, small_step, time_at

FIRST_STEP = 0.05  # in lam, [2]


def paper_controller(rtol: Number = 0.05, atol: Number = 0.0078) -> PIController:
    """Rule (5) without other bounds. atol: [1]'s for images in [-1, 1], one level of 256."""
    unbounded = float("inf")
    return PIController(rtol, atol, min_factor=0.0, max_factor=unbounded, after_rejection=unbounded)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DPMSolverAdaptive:
    """DPM-Solver-12 (order 2) or -23 (order 3) with the error (4); see the module's docstring."""

    order: int = 3

    def __post_init__(self):
        checks.one_of("order", self.order, (2, 3))

    @property
    def stages(self) -> int:
        return self.order

    @property
    def start_stages(self) -> int:
        return 0

    stochastic = False

    def controller(self) -> PIController:
        """The paper's rtol = 0.05, atol = 0.0078."""
        return PIController(rtol=0.05, atol=0.0078)

    def check(self, process: Process, t0: Number, t1: Number) -> None:
        """Raises ValueError where the log-SNR is infinite."""
        check_log_snr("DPMSolverAdaptive", process, t0, t1)

    def clock(self, process: Process, t: Array) -> Array:
        """Half the log-SNR."""
        return half_log_snr(process, t)

    def start(self, problem: Problem, x: PyTree) -> tuple[PyTree, Array]:
        """No call: x stands for the last low-order result."""
        return x, small_step(problem, x, FIRST_STEP)

    def limit(self, memory: PyTree) -> None:
        """None."""

    def attempt(self, keys: Key, problem: Problem, at: Progress, u_next: Array, h: Array) -> Trial:
        """(1) to (4)."""
        nodes: tuple[float, ...] = (0.0, 0.5) if self.order == 2 else (0.0, 1 / 3, 2 / 3)
        times = [time_at(problem, at.t + r * h) for r in nodes]
        levels = [problem.process.coeffs(t) for t in (*times, time_at(problem, u_next))]
        bases = [level.alpha / levels[0].alpha for level in levels]
        none = jnp.zeros_like(h)
        # Weights of eps_0, eps_1, ... in each stage's point.
        rows = [[none] * self.order]
        for r, level in zip(nodes[1:], levels[1:], strict=False):
            rows.append([-level.sigma * jnp.expm1(r * h), *[none] * (self.order - 1)])
        if self.order == 3:
            rows[2] = _add(rows[2], 1, -levels[2].sigma * (nodes[2] / nodes[1]) * _p(nodes[2] * h))

        _, eps = staged(
            lambda t, x: problem.denoise(x, t).eps,
            at.y,
            [],
            jnp.stack(times),
            jnp.stack(bases[:-1]),
            jnp.stack([jnp.stack(row) for row in rows]),
        )
        sigma = levels[-1].sigma
        first = [-sigma * jnp.expm1(h), *[none] * (self.order - 1)]
        second = _add(first, 1, -sigma * jnp.expm1(h) / (2 * nodes[1]))
        low_row, high_row = first, second
        if self.order == 3:
            low_row, high_row = second, _add(first, 2, -sigma * _p(h) / nodes[2])
        low, high = (
            combine((bases[-1], at.y), *zip(row, eps, strict=True)) for row in (low_row, high_row)
        )
        difference = combine(*zip(map(jnp.subtract, low_row, high_row), eps, strict=True))
        # Steps are held constant: what they are chosen by has no derivative where the error is 0.
        held = jax.lax.stop_gradient((difference, low, at.memory))
        return Trial(high, low, problem.controller.error_by_larger(*held), at.memory)


def _add(row: list[Array], i: int, weight: Array) -> list[Array]:
    """The row with `weight` times D_i = eps_i - eps_0 added."""
    added = list(row)
    added[0], added[i] = added[0] - weight, added[i] + weight
    return added


def _p(z: Array) -> Array:
    """P(z) = expm1(z)/z - 1, with all its digits near 0."""
    small = jnp.abs(z) < 0.1
    safe = jnp.where(small, 1.0, z)
    series = z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7)))))
    return jnp.where(small, series, jnp.expm1(safe) / safe - 1)
