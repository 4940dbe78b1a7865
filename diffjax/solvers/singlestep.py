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

from typing import Literal

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import combine
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, Prediction, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import inverse_log_snr, log_snr
from diffjax.solvers import exponential
from diffjax.solvers.base import XState
from diffjax.solvers.euler import linear_step
from diffjax.solvers.exponential import Kind
from diffjax.solvers.multistep import extrapolated


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
        known = checks.concrete(process.coeffs(t).alpha)
        if self.order > 1 and known is not None and (known == 0).any():
            raise ValueError(
                f"alpha = 0 at the grid's first time {t}, and no point lies between there and the "
                "next in log-SNR. Start below (t_max= of the grid), or use a multistep solver."
            )
        return XState(x)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eqs. (1) to (3)."""
        first = denoise(state.x, t)
        if self.order == 1:
            return XState(linear_step(process, first, s))
        start, end = log_snr(process, t), log_snr(process, s)
        shares: tuple[Number, ...] = ()
        seen: tuple[PyTree, ...] = ()
        base = extrapolated(self.prediction, first)
        for share in self._shares():
            between = inverse_log_snr(process, start + share * (end - start))
            x = self._reach(process, first, shares, seen, t, between, share, "exact")
            met = extrapolated(self.prediction, denoise(x, between))
            shares, seen = (*shares, share), (*seen, jax.tree.map(jnp.subtract, met, base))
        if self.variant == "midpoint":
            shares, seen = shares[-1:], seen[-1:]
        slope: exponential.Slope = (
            "b2" if self.variant == "midpoint" and self.order == 2 else "exact"
        )
        return XState(self._reach(process, first, shares, seen, t, s, 1.0, slope))

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
        self,
        process: Process,
        first: Prediction,
        shares: tuple[Number, ...],
        seen: tuple[PyTree, ...],
        t: Array,
        s: Array,
        share: Number,
        slope: exponential.Slope,
    ) -> PyTree:
        """x at s, which lies at `share`, from the differences m - m_t seen at `shares`."""
        moved = exponential.move(process, self.prediction, t, s)
        terms = [(moved.reached.alpha, first.x0), (moved.kept, first.eps)]
        if shares:
            count = len(shares)
            taus = jnp.stack([jnp.full_like(moved.pull, r / share) for r in shares])
            totals = exponential.integrals(process, self.prediction, "lambda", moved, t, s, count)
            valid = jnp.ones((count,), bool)
            found = exponential.weights(taus, valid, moved, totals, slope=slope)
            terms += [(found[j], seen[j]) for j in range(count)]
        return combine(*terms)
