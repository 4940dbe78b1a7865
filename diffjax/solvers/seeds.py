"""Exponential Runge-Kutta methods for the reverse SDE: SEEDS, and Heun's method with noise.

Symbols: lam = ln(alpha^2/sigma^2), w = e^lam, sigma~ = e^(-lam/2), B a Wiener process, h the step
of lam, c_i the stages' places in it, u a time between t and s, and of
`diffjax.processes.calculus.between` a = alpha_t/alpha_u, r = a sigma_u/sigma_t.

The reverse SDE has noise that does not depend on x. Solved for its linear part it is, exactly,

    d(alpha x/sigma^2) =  x0  dw + dB(w)                     for x0 predictions                  (1)
    d(x/alpha)         = 2 eps d(sigma~) + dB(-sigma~^2)     for eps predictions                 (2)

so that over a step with P = x0 or eps held constant

    x_u = m x_t + q P + n                                                                       (3)
    x0     m = r sigma_u/sigma_t    q = alpha_u (1 - r^2)         var n = sigma_u^2 (1 - r^2)
    eps    m = 1/a                  q = 2 (sigma_u - sigma_t/a)   var n = sigma_t^2 (1 - r^2)/a^2

Later stages replace P by a line through two of its values, weighted by (1) or (2). The weight of
the later one, at c_j, in an interval of length c_i (phi is the mean of v in [0, 1] under a density
that grows as e^(h v)):

    W = (c_i/c_j) phi(c_i h)  (x0),   (c_i/c_j) phi(-c_i h/2)  (eps)     "exact"                 (4)
    W = 1/(2 c_2)                                                        "half"
    phi(h) = 1/(1 - e^-h) - 1/h = 1/2 + h/12 - ...                                               (5)

The noise is one Wiener path: the n of a stage is that of the stage before, times m of the interval
between them, plus a fresh draw.

    stages = 1           exponential Euler. x0: DDPM's ancestral step. eps: weak order 1 too
    stages = 2, "half"   SEEDS-2 of [1]; with c_2 = 1 Heun's method in w or sigma~, where the noise
                         is additive and exact: the explicit scheme of weak order 2 in [2]
    stages = 3           SEEDS-3 of [1], nodes c_2 and 2/3, "exact"

Orders: with additive noise, weak order 2 asks of the stages' noise only the values of B at the
nodes, and its conditions hold for 2 and 3 stages. The mean converges with order 3 for SEEDS-3; the
covariance cannot from values of B alone, so that its weak order is 2 as well.

The authors' code with eps predictions gives, for three stages, the coefficients of z1 and z2 at the
step's end to each other, and scales the noise of the third stage by sigma_s; here both follow the
path. In its two-stage form the coefficients agree with a path's at c_2 = 1/2 only.

Milstein's method is not here: its correction is the derivative of the noise's size in x, which is
zero, so that it is Euler-Maruyama.

References:
[1] Gonzalez et al., "SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion
    Models", 2023, https://arxiv.org/abs/2305.14267, and its code,
    https://github.com/nfsrules/SEEDS.
[2] Kloeden, Platen, "Numerical Solution of Stochastic Differential Equations", 1992, section 15.1,
    https://doi.org/10.1007/978-3-662-12616-5.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp

from diffjax.core import checks, random
from diffjax.core.numerics import combine, safe_sqrt
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import between, log_snr
from diffjax.solvers.base import XState
from diffjax.solvers.euler import landed
from diffjax.solvers.runge_kutta import require_signal
from diffjax.solvers.stages import linear, run_stages, time_at


class Hold(NamedTuple):
    """m, q and the deviation of n in eq. (3), each shaped like a time."""

    kept: Array
    pull: Array
    spread: Array


def hold(process: Process, t: Array, s: Array, prediction: str) -> Hold:
    """Eq. (3) from t to s."""
    move = between(process, t, s)
    at_t, at_s, root = move.at_t, move.at_s, safe_sqrt(move.gain)
    if prediction == "x0":
        kept = move.r * at_s.sigma / at_t.sigma
        return Hold(kept, at_s.alpha * move.gain, at_s.sigma * root)
    pull = 2 * (at_s.sigma - at_t.sigma / move.a)
    return Hold(1 / move.a, pull, at_t.sigma / move.a * root)


def centroid(h: Array) -> Array:
    """phi of eq. (5), in [0, 1], like h; by its series where |h| < 1/2."""
    small = jnp.abs(h) < 0.5
    far = jnp.where(small, 1.0, h)
    square = jnp.where(small, h * h, 0.0)
    terms = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160)
    series = jnp.zeros_like(square)
    for term in reversed(terms):
        series = series * square + term
    return jnp.where(small, 0.5 + h * series, -1 / jnp.expm1(-far) - 1 / far)


@pytree
class SEEDS:
    """Exponential Runge-Kutta on the reverse SDE, eqs. (3) and (4).

    stages: 1, 2 or 3 calls a step. prediction: what is held, "x0" (1) or "eps" (2). weights: "half"
    or "exact" for two stages. node: c_2 in (0, 1], by default 1/2 for two stages; for three in
      (0, 2/3), by default 1/3.
    """

    stages: int = static(default=2)
    prediction: Literal["x0", "eps"] = static(default="x0")
    weights: Literal["half", "exact"] = static(default="half")
    node: Number | None = None

    def __post_init__(self):
        checks.one_of("stages", self.stages, (1, 2, 3))
        checks.one_of("prediction", self.prediction, ("x0", "eps"))
        checks.one_of("weights", self.weights, ("half", "exact"))
        if self.node is not None:
            checks.positive("node", self.node)
            checks.in_range("node", self.node, 0.0, 1.0)
            if self.stages == 3:  # the noise is a path through the nodes in their order
                checks.less("node", self.node, "the third stage's 2/3", 2 / 3)

    final_stages = 1
    stochastic = True

    def init(self, process: Process, x: PyTree, t: Array) -> XState:
        """Raises ValueError where the log-SNR is infinite at the start."""
        if self.stages > 1 or self.prediction == "eps":
            require_signal(
                process, t, f"SEEDS(stages={self.stages}, prediction={self.prediction!r})"
            )
        return XState(x)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (3) through the stages."""
        nodes, times = self._stages(process, t, s)
        holds = [hold(process, t, time, self.prediction) for time in times[1:]]
        weights = jnp.stack(
            [jnp.stack(row) for row in self._rows(process, t, s, nodes, [h.pull for h in holds])]
        )

        def evaluate(x, time):
            return getattr(denoise(x, time), self.prediction)

        kept = jnp.stack([h.kept for h in holds])
        draws = [random.normal_like(keys, f"seeds{i}", state.x) for i in range(self.stages)]
        point = linear(state.x, kept, weights, draws, self._gains(process, times))
        return XState(run_stages(evaluate, state.x, jnp.stack(times[:-1]), point))

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: XState, t: Array, s: Array
    ) -> XState:
        """Eq. (3) without its noise; x0 where sigma_s = 0."""
        prediction = denoise(state.x, t)
        kept, pull, _ = hold(process, t, s, self.prediction)
        mean = combine((kept, state.x), (pull, getattr(prediction, self.prediction)))
        return XState(landed(process, mean, prediction.x0, s))

    def _stages(self, process: Process, t: Array, s: Array) -> tuple[list[Number], list[Array]]:
        """Places in the step and times of the stages and of the end, S + 1 of each."""
        node: Number = 1 / self.stages if self.node is None else self.node
        nodes: list[Number] = [0.0, node, 2 / 3][: self.stages] + [1.0]
        start = log_snr(process, t)
        h = log_snr(process, s) - start
        between = [time_at(process, start + c * h, t, s) for c in nodes[1:-1]]
        return nodes, [t, *between, s]

    def _rows(
        self, process: Process, t: Array, s: Array, nodes: list[Number], pulls: list[Array]
    ) -> list[list[Array]]:
        """w_ij of `linear`: q shared between the first value of P and the latest, eq. (4)."""
        h = log_snr(process, s) - log_snr(process, t)
        rate = h if self.prediction == "x0" else -h / 2
        rows = []
        for i, pull in enumerate(pulls):
            later = jnp.zeros_like(pull)
            if i > 0 and self.stages == 2 and self.weights == "half":
                later = pull / (2 * nodes[i])
            elif i > 0:
                end = nodes[i + 1]
                later = pull * (end / nodes[i]) * centroid(end * rate)
            row = [jnp.zeros_like(pull)] * self.stages
            row[i] = later
            row[0] = pull - later if i > 0 else pull
            rows.append(row)
        return rows

    def _gains(self, process: Process, times: list[Array]) -> Array:
        """v_ij of `linear`, (S, S, ...): one path through the stages, a new draw for each."""
        moves = [
            hold(process, t, s, self.prediction) for t, s in zip(times[:-1], times[1:], strict=True)
        ]
        rows: list[list[Array]] = []
        for i, move in enumerate(moves):
            before = rows[-1] if rows else [jnp.zeros_like(move.spread)] * self.stages
            row = [move.kept * gain for gain in before]
            row[i] = move.spread
            rows.append(row)
        return jnp.stack([jnp.stack(row) for row in rows])


def StochasticHeun(prediction: Literal["x0", "eps"] = "x0") -> SEEDS:
    """Heun's method on the reverse SDE, in the SNR (x0) or sigma/alpha (eps): weak order 2.

    With eps it is, in x/alpha and sigma~, x' = x + 2 h eps + n, x_s = x + h (eps + eps') + n, one
    draw of n for both, with its exact variance. Where sigma~ falls by more than about half in a
    step, x' overshoots and the eps form is unstable: it needs some 50 steps.
    """
    return SEEDS(2, prediction, "half", 1.0)


def SEEDS2(prediction: Literal["x0", "eps"] = "x0") -> SEEDS:
    """SEEDS-2: weak order 2 with 2 calls a step."""
    return SEEDS(2, prediction)


def SEEDS3(prediction: Literal["x0", "eps"] = "x0") -> SEEDS:
    """SEEDS-3: weak order 2, the mean of order 3, with 3 calls a step."""
    return SEEDS(3, prediction)
