"""The exponential multistep family: one implementation, whose members are values.

Symbols: t_i the times, m_i the extrapolated prediction (x0 or eps) at t_i, t = t_i, s = t_(i+1),
p the order; the coefficients k, carry, W, n and the weights w of `diffjax.solvers.exponential`.

    predictor   x_s = alpha_s x0 + k eps + sum_(j=1..p-1) w_j (m_(i-j) - m_i) + n z             (1)
    corrector   before (1), once m_i is known at the predicted x_t, the polynomial of the step from
                t_(i-1) also goes through m_i at tau = 1:
                delta = sum_j (w^c_j - w^p_j) (m_j - m_(i-1)),   x_t += delta                   (2)
                and (1) gains carry * delta

with w^p the weights that the step had used and w^c those of q nodes, the new one among them:
UniC-q of [4]. m_i is not evaluated again, so a corrector costs no call; nor is the last x
corrected, for which m would be needed there. As in DDIM, x0 and eps are taken as the denoiser gives
them.

    variable   prediction  order p, corrector q   what it is
    any        any         1, 0                   DDIM (eta = 0)
    "lambda"   "x0"        p, 0                   DPM-Solver++ multistep [2]
    "lambda"   "eps"       p, 0                   DPM-Solver multistep [1]; DEIS in ln rho
    "rho"      "eps"       p, 0                   DEIS rho-AB [3]; linear multistep in sigma (LMS)
    "t"        "eps"       p, 0                   DEIS t-AB [3]
    "step"     "eps"       p, 0                   iPNDM, PLMS: fixed Adams-Bashforth weights
    "lambda"   either      p, p                   UniPC-p [4]

Start: step i has order min(p, i + 1), so one exact step of order 1 comes first and the whole is of
global order 2 at most for p >= 2 without a corrector, 3 with one; p (p + 1 with a corrector) with
an exact history. With eta > 0 mean and covariance of Gaussian data converge with order min(p, 2):
the part of m_(i-1) - m_i that is noise makes up for what x0 gains of the noise within a step.

End: `finish` is (1) at p = 1, which leads to x0 where sigma_s = 0. `n_steps` makes the order of
step i at most n_steps - i, as the reference codes do where they lower it (diffusers below 15 steps,
DPM-Solver's code below 10). `lower_order_final=False` keeps p on the last interval, which needs a
polynomial that is finite at sigma = 0: eps in rho, t or step. A `step` that leads there (`Keep`)
does the same.

References: [1] to [4] of `diffjax.solvers.exponential`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core import checks, random
from diffjax.core.numerics import combine
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, Prediction, PyTree
from diffjax.processes.base import Process
from diffjax.solvers import exponential
from diffjax.solvers.exponential import Kind, Move, Slope, Variable


class History(NamedTuple):
    """The state of a multistep method.

    x: the sample. past: the predictions m of earlier steps, newest first, each like x. times: their
    times, (H, *t.shape), as x's dtype. applied: the weights w_j of the last step, (p - 1, *coeffs).
    done: the number of steps done, () int32; only the first `done` entries of `past` are real.
    """

    x: PyTree
    past: tuple[PyTree, ...]
    times: Array
    applied: Array
    done: Array


class Choice(NamedTuple):
    """What one step uses: the order p of its predictor and the number q of the corrector's nodes.

    Both may be traced, up to the solver's own.
    """

    order: Array
    corrector: Array


@pytree
class Multistep:
    """Eqs. (1) and (2).

    order: p >= 1. prediction: what is extrapolated. variable: in what. slope: the rule of
      `exponential` for orders 2 (and UniC-1). curvature: a factor of W_2 at order 3; 1/2 is what
      the codes of DPM-Solver have, which then is of order 2 (see `diffjax.solvers.presets`).
    corrector: q, the most nodes besides t of eq. (2); 0 for none.
    n_steps: the grid's number of intervals, for an order that falls towards the end; or None.
    lower_order_final: whether `finish` is of order 1.
    eta: None (static) draws nothing. A number >= 0 is the strength of the noise, a leaf: 1 is the
      reverse SDE, 0 the flow. It needs variable="lambda".
    """

    order: int = static(default=2)
    prediction: Kind = static(default="x0")
    variable: Variable = static(default="lambda")
    slope: Slope = static(default="exact")
    corrector: int = static(default=0)
    lower_order_final: bool = static(default=True)
    curvature: Number = 1.0
    n_steps: Number | None = None
    eta: Number | None = None

    def __post_init__(self):
        checks.at_least("order", self.order, 1)
        checks.at_least("corrector", self.corrector, 0)
        checks.one_of("prediction", self.prediction, ("x0", "eps"))
        checks.one_of("variable", self.variable, ("lambda", "rho", "t", "step"))
        checks.one_of("slope", self.slope, ("exact", "b1", "b2"))
        if self.slope == "b1" and self.variable != "lambda":
            raise ValueError(
                f"slope='b1' is a rule of the log-SNR; got variable={self.variable!r}. Use 'exact' "
                "or 'b2'."
            )
        if not self.lower_order_final and not self._finite:
            raise ValueError(
                "lower_order_final=False needs a polynomial that is finite at sigma = 0: "
                "prediction='eps' with variable 'rho', 't' or 'step'; got "
                f"{self.prediction!r} and {self.variable!r}."
            )
        if self.n_steps is not None:
            checks.positive("n_steps", self.n_steps)
        if self.eta is not None:
            checks.non_negative("eta", self.eta)
            if self.variable != "lambda" or self.corrector:
                raise ValueError(
                    "Noise (eta) goes with variable='lambda' and no corrector; got "
                    f"variable={self.variable!r}, corrector={self.corrector}."
                )

    stages = 1
    final_stages = 1

    @property
    def stochastic(self) -> bool:
        return self.eta is not None

    @property
    def _finite(self) -> bool:
        """Whether the polynomial may be followed to sigma = 0."""
        return self.prediction == "eps" and self.variable != "lambda"

    def init(self, process: Process, x: PyTree, t: Array) -> History:
        """No history. Raises ValueError for noise in the eps form where alpha = 0."""
        coeffs = process.coeffs(t)
        known = checks.evaluated(lambda: process.coeffs(t).alpha)
        loud = self.stochastic and self.prediction == "eps"
        if loud and known is not None and (known == 0).any():
            raise ValueError(
                f"alpha = 0 at the grid's noisy end {t}, where the noise of the eps form is "
                "infinite. Start below (t_max= of the grid), or use prediction='x0'."
            )
        dtype = jnp.result_type(*jax.tree.leaves(x))
        kept = max(self.order, self.corrector) if self.corrector else self.order - 1
        past = tuple(jax.tree.map(jnp.zeros_like, x) for _ in range(kept))
        times = jnp.broadcast_to(jnp.asarray(t, dtype)[None], (kept, *jnp.shape(t)))
        applied = jnp.zeros((self.order - 1, *coeffs.alpha.shape), dtype)
        return History(x, past, times, applied, jnp.zeros((), jnp.int32))

    def choice(self, count: Array) -> Choice:
        """What step number `count` uses."""
        last = count + 1
        if self.n_steps is not None:
            last = jnp.minimum(last, jnp.maximum(self.n_steps - count, 1))
        return Choice(jnp.minimum(self.order, last), jnp.minimum(self.corrector, last))

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: History, t: Array, s: Array
    ) -> History:
        """Eqs. (2) and (1)."""
        mean, moved, after = self._advance(denoise, process, state, t, s)
        if self.stochastic:
            z = random.normal_like(keys, "multistep", state.x)
            mean = combine((jnp.ones_like(moved.noise), mean), (moved.noise, z))
        return after._replace(x=mean)

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: History, t: Array, s: Array
    ) -> History:
        """Eqs. (2) and (1) at p = 1, without noise; x0 where sigma_s = 0."""
        mean, _, after = self._advance(denoise, process, state, t, s, linear=self.lower_order_final)
        return after._replace(x=mean)

    def _advance(
        self,
        denoise: DenoiseFn,
        process: Process,
        state: History,
        t: Array,
        s: Array,
        linear: bool = False,
    ) -> tuple[PyTree, Move, History]:
        """x_s without noise, the coefficients that led there, and the history with m_t."""
        prediction = denoise(state.x, t)
        new = as_like(extrapolated(self.prediction, prediction), state.x)
        moved = exponential.move(process, self.prediction, t, s, self.eta)
        terms = [(moved.reached.alpha, prediction.x0), (moved.kept, prediction.eps)]
        if self.corrector:
            terms.append((moved.carry, self._correction(process, state, new, t, s)))
        applied = state.applied
        if self.order > 1 and not linear:
            used = self.predictor_weights(process, state.times, state.done, moved, t, s)
            terms += weighted_differences(used, state.past, new)
            applied = used.astype(applied.dtype)
        return combine(*terms), moved, remembered(state, new, t)._replace(applied=applied)

    def predictor_weights(
        self, process: Process, times: Array, done: Array, moved: Move, t: Array, s: Array
    ) -> Array:
        """w_1..w_(p-1) of eq. (1), (p - 1, *coeffs). times: of the history; done: its steps."""
        valid = jnp.arange(1, self.order) < self.choice(done).order
        places = exponential.places(
            process, self.prediction, self.variable, moved, t, s, times[: self.order - 1], valid
        )
        found = self._weights(process, places, valid, moved, t, s)
        return found if self._finite else jnp.where(moved.reached.sigma > 0, found, 0)

    def corrector_weights(
        self, process: Process, times: Array, done: Array, t: Array, s: Array
    ) -> Array:
        """w^c of eq. (2), (q, *coeffs), of m_i and the nodes older than m_(i-1); 0 at first."""
        begun = done > 0
        # At the first step nothing is corrected: the interval only has to be a proper one.
        start, end = jnp.where(begun, times[0], t), jnp.where(begun, t, s)
        moved = exponential.move(process, self.prediction, start, end)
        chosen = self.choice(jnp.maximum(done - 1, 0)).corrector
        valid = (jnp.arange(self.corrector) < chosen) & begun
        older = exponential.places(
            process,
            self.prediction,
            self.variable,
            moved,
            start,
            end,
            times[1 : self.corrector],
            valid[1:],
        )
        places = jnp.concatenate([jnp.ones_like(moved.pull)[None], older])
        return jnp.where(begun, self._weights(process, places, valid, moved, start, end), 0)

    def _correction(
        self, process: Process, state: History, new: PyTree, t: Array, s: Array
    ) -> PyTree:
        """The change delta of eq. (2), like x; zero at the first step."""
        used = self.corrector_weights(process, state.times, state.done, t, s)
        more = max(self.order - self.corrector, 0)
        used = jnp.pad(used, [(0, more)] + [(0, 0)] * (used.ndim - 1))
        change = used.at[1 : self.order].add(-state.applied.astype(used.dtype))
        return combine(*weighted_differences(change, (new, *state.past[1:]), state.past[0]))

    def _weights(
        self, process: Process, places: Array, valid: Array, moved: Move, t: Array, s: Array
    ) -> Array:
        totals = exponential.integrals(
            process, self.prediction, self.variable, moved, t, s, places.shape[0]
        )
        return exponential.weights(
            places, valid, moved, totals, slope=self.slope, curvature=self.curvature
        )


def extrapolated(kind: Kind, prediction: Prediction) -> PyTree:
    """What is extrapolated of a prediction, like x."""
    return prediction.x0 if kind == "x0" else prediction.eps


def as_like(tree: PyTree, x: PyTree) -> PyTree:
    """The tree in x's dtypes."""
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, x)


def weighted_differences(
    weights: Array, nodes: tuple[PyTree, ...], base: PyTree
) -> list[tuple[Array, PyTree]]:
    """The pairs (w_j, m_j - m) for `combine`."""
    return [
        (weights[j], jax.tree.map(jnp.subtract, nodes[j], base)) for j in range(weights.shape[0])
    ]


def remembered(state: History, new: PyTree, t: Array) -> History:
    """The history with a new prediction in front and one step more."""
    kept = len(state.past)
    past = (new, *state.past)[:kept]
    front = jnp.asarray(t, state.times.dtype)[None]
    times = jnp.concatenate([front, state.times])[:kept]
    return state._replace(past=past, times=times, done=state.done + 1)
