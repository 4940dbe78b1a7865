"""Single-step DPM-Solver and DPM-Solver++: exponential Runge-Kutta methods in the log-SNR.

Symbols: lam the log-SNR, m the extrapolated prediction (eps or x0), tau in [0, 1] the share of the
step in lam, m_r the prediction at tau = r; D(x, tau) the linear (DDIM) step to tau; w the weights
of `diffjax.solvers.exponential` for a step that ends at the time given.

    order 1   x_s = D(x_t, 1)                                                                   (1)
    order 2   u = D(x_t, r1),   x_s = D(x_t, 1) + w (m_r1 - m_t)                                (2)
    order 3   u = D(x_t, r1),   v = D(x_t, r2) + w' (m_r1 - m_t)
              x_s = D(x_t, 1) + sum_j w_j (m_rj - m_t)                                          (3)

r1 = 1/2 for (2), r1 = 1/3 and r2 = 2/3 for (3). "midpoint" is the papers' algorithm: W_1 = W_0/2 in
(2), the node r2 alone in (3). "heun" (their "taylor") integrates the polynomial through all nodes.
(2) is DPM-Solver-2, or DPM-Solver++(2S) with x0. (3) is DPM-Solver-3; it has order 3 for every r1
where r2 = 2/3, and else order 2. diffusers' "midpoint" of (3) takes W_0/2 for v too, this one does
as the paper.

The last interval is one linear step, which leads to x0 where sigma_s = 0. The papers' "fast" mode,
whose last steps are of lower order so as to spend a given number of calls, is the choice of the
grid here: n intervals cost (n - 1) p + 1 calls.

References: [1] and [2] of `diffjax.solvers.exponential`; algorithms 1 and 2 of [1], 1 of [2].
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import combine
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import inverse_log_snr, log_snr
from diffjax.solvers import exponential
from diffjax.solvers.base import XState
from diffjax.solvers.euler import linear_step
from diffjax.solvers.exponential import Kind
from diffjax.solvers.stages import run_stages


@pytree
class SingleStep:
    """Eqs. (1) to (3): order 1, 2 or 3 with as many calls a step.

    prediction: what is extrapolated. variant: see the module's docstring. r1, r2: the shares of the
    intermediate points in the log-SNR, 0 < r1 < r2 <= 1; None for the papers'.
    """

    order: int = static(default=2)
    prediction: Kind = static(default="eps")
    variant: Literal["midpoint", "heun"] = static(default="midpoint")
    r1: Number | None = None
    r2: Number | None = None

    def __post_init__(self):
        checks.one_of("order", self.order, (1, 2, 3))
        checks.one_of("prediction", self.prediction, ("x0", "eps"))
        checks.one_of("variant", self.variant, ("midpoint", "heun"))
        for name, given, least in (("r1", self.r1, 2), ("r2", self.r2, 3)):
            if given is not None and self.order < least:
                raise ValueError(f"{name} belongs to order {least} and above; got {self.order}.")
            checks.positive(name, given)
            checks.in_range(name, given, 0.0, 1.0)
        if self.order == 3:
            first, second = self._shares()
            checks.less("r1", first, "r2", second)

    @property
    def stages(self) -> int:
        return self.order

    final_stages = 1
    stochastic = False

    def init(self, process: Process, x: PyTree, t: Array) -> XState:
        """Raises ValueError where the log-SNR is infinite, unless the order is 1."""
        known = checks.evaluated(lambda: process.coeffs(t).alpha)
        if self.order > 1 and known is not None and (known == 0).any():
            raise ValueError(
                f"alpha = 0 at the grid's noisy end {t}, and no point lies between there and the "
                "next in log-SNR. Start below (t_max= of the grid), or use a multistep solver."
            )
        return XState(x)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eqs. (1) to (3)."""
        shares = self._shares()
        start, end = log_snr(process, t), log_snr(process, s)
        times = [t, *(inverse_log_snr(process, start + r * (end - start)) for r in shares), s]
        reaches = [self._reach(process, times, i, (*shares, 1.0)) for i in range(self.order)]
        linear, rotated, pulls = (jnp.stack(parts) for parts in zip(*reaches, strict=True))

        def evaluate(x: PyTree, time: Array) -> tuple[PyTree, PyTree]:
            prediction = denoise(x, time)
            return prediction.x0, prediction.eps

        def point(i: Array | int, seen: Sequence[tuple[PyTree, PyTree]]) -> PyTree:
            x0, eps = seen[0]
            base, *later = (pair[0 if self.prediction == "x0" else 1] for pair in seen)
            changes = (jax.tree.map(jnp.subtract, m, base) for m in later)
            more = ((pulls[i, j], change) for j, change in enumerate(changes))
            return combine((linear[i], x0), (rotated[i], eps), *more)

        both = (state.x, state.x)
        return XState(run_stages(evaluate, state.x, jnp.stack(times[:-1]), point, both))

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (1); x0 where sigma_s = 0."""
        return XState(linear_step(process, denoise(state.x, t), s))

    def _shares(self) -> tuple[Number, ...]:
        """The shares of the intermediate points."""
        if self.order == 2:
            return (0.5 if self.r1 is None else self.r1,)
        first = 1 / 3 if self.r1 is None else self.r1
        return (first, 2 / 3 if self.r2 is None else self.r2) if self.order == 3 else ()

    def _reach(
        self, process: Process, times: list[Array], i: int, shares: tuple[Number, ...]
    ) -> tuple[Array, Array, Array]:
        """The numbers of stage i, which leads from times[0] to times[i + 1] at shares[i].

        The factors of the first x0 and eps, and of m_rj - m_t for every node, (order - 1, ...);
        zero for those not seen or not used.
        """
        t, s = times[0], times[i + 1]
        moved = exponential.move(process, self.prediction, t, s)
        last = i == self.order - 1
        first = i - 1 if last and self.variant == "midpoint" and i > 0 else 0
        pulls = [jnp.zeros_like(moved.pull)] * (self.order - 1)
        if i > 0:
            count = i - first
            taus = jnp.stack([jnp.full_like(moved.pull, r / shares[i]) for r in shares[first:i]])
            totals = exponential.integrals(process, self.prediction, "lambda", moved, t, s, count)
            valid = jnp.ones((count,), bool)
            half = self.variant == "midpoint" and self.order == 2
            slope: exponential.Slope = "b2" if half else "exact"
            pulls[first:i] = list(exponential.weights(taus, valid, moved, totals, slope=slope))
        stacked = jnp.stack(pulls) if pulls else jnp.zeros((0, *moved.pull.shape))
        return moved.reached.alpha, moved.kept, stacked
