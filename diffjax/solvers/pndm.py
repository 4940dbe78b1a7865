"""PNDM: pseudo linear multistep (PLMS) on eps, with its two starts.

Symbols: e the prediction of eps, phi(x, e, t, s) the DDIM step from t to s with any e, m = (t+s)/2.

    PLMS          x_s = phi(x_t, e', t, s),   e' = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3)/24         (1)
    pseudo RK     e_1 = e(x_t, t)                     e_2 = e(phi(x_t, e_1, t, m), m)
                  e_3 = e(phi(x_t, e_2, t, m), m)     e_4 = e(phi(x_t, e_3, t, s), s)
                  x_s = phi(x_t, (e_1 + 2 e_2 + 2 e_3 + e_4)/6, t, s)                           (2)
    trapezoid     e_2 = e(phi(x_t, e_1, t, s), s),   x_s = phi(x_t, (e_1 + e_2)/2, t, s)        (3)

PNDM starts with (2) on the first three steps (nine calls more), PLMS as in Stable Diffusion with
(3) on the first (one call more) and lower orders of (1) after it. The weights of (1) assume equal
steps of a variable in which phi is smooth: on a grid uniform in t PNDM and PLMS are of order 2, as
e' is a fourth-order rule inside a second-order transfer. Only the history of e is kept.

Reference: Liu, Ren, Lin, Zhao, "Pseudo Numerical Methods for Diffusion Models on Manifolds", 2022,
https://arxiv.org/abs/2202.09778, eqs. 12 to 14 and algorithm 2.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import combine, select
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Prediction, PyTree
from diffjax.processes.base import Process
from diffjax.solvers import exponential
from diffjax.solvers.multistep import History, Multistep, as_like, remembered


@pytree
class PNDM:
    """Eq. (1) from the start of eq. (2) or (3).

    start: "runge_kutta" or "trapezoid". order: of (1), 1 to 4 as published.
    """

    start: Literal["runge_kutta", "trapezoid"] = static(default="runge_kutta")
    order: int = static(default=4)

    def __post_init__(self):
        checks.one_of("start", self.start, ("runge_kutta", "trapezoid"))
        checks.at_least("order", self.order, 1)

    stages = 1
    final_stages = 1
    stochastic = False

    @property
    def first(self) -> int:
        """How many steps the start takes."""
        return self.order - 1 if self.start == "runge_kutta" else 1

    def startup(self, steps: int | Array) -> int | Array:
        """The calls that the start adds when `steps` steps are taken."""
        more = 3 if self.start == "runge_kutta" else 1
        return (
            more * jnp.minimum(steps, self.first)
            if isinstance(steps, jax.Array)
            else (more * min(steps, self.first))
        )

    def init(self, process: Process, x: PyTree, t: Array) -> History:
        return self._linear().init(process, x, t)

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: History, t: Array, s: Array
    ) -> History:
        """Eq. (2) or (3) on the first steps, then eq. (1)."""
        starting = state.done < self.first
        first, change = self._stages(denoise, process, state.x, t, s, starting)

        def begin() -> History:
            new = as_like(first.eps, state.x)
            x = as_like(_transfer(process, first, change, t, s), state.x)
            return remembered(state, new, t)._replace(x=x)

        def go_on() -> History:
            return self._linear().step(keys, lambda x, time: first, process, state, t, s)

        return jax.lax.cond(starting, begin, go_on)

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: History, t: Array, s: Array
    ) -> History:
        """Eq. (1), which is finite at sigma_s = 0."""
        return self._linear().finish(keys, denoise, process, state, t, s)

    def _linear(self) -> Multistep:
        return Multistep(self.order, "eps", "step", lower_order_final=False)

    def _stages(
        self,
        denoise: DenoiseFn,
        process: Process,
        x: PyTree,
        t: Array,
        s: Array,
        starting: Array,
    ) -> tuple[Prediction, PyTree]:
        """The prediction at t, and for a start what its mean e adds to e_1: eqs. (2), (3).

        A scan over the stages, so that a program holds one copy of the network. Outside of the
        start only the first one calls.
        """
        middle = (t + s) / 2
        if self.start == "trapezoid":
            times, weights = jnp.stack([t, s]), jnp.asarray([0, 1 / 2])
        else:
            times, weights = jnp.stack([t, middle, middle, s]), jnp.asarray([0, 2, 2, 1]) / 6
        zeros = jax.tree.map(jnp.zeros_like, x)

        def ask(carry, i):
            first, change, mean = carry
            ahead = select(i == 0, x, as_like(_transfer(process, first, change, t, times[i]), x))
            found = denoise(ahead, times[i])
            found = Prediction(as_like(found.x0, x), as_like(found.eps, x))
            first = select(i == 0, found, first)
            change = jax.tree.map(jnp.subtract, found.eps, first.eps)
            return first, change, combine((1, mean), (weights[i], change))

        def stage(carry, i):
            return jax.lax.cond((i == 0) | starting, ask, lambda carry, i: carry, carry, i), None

        start = (Prediction(zeros, zeros), zeros, zeros)
        (first, _, mean), _ = jax.lax.scan(stage, start, jnp.arange(len(times)))
        return first, mean


def _transfer(process: Process, first: Prediction, change: PyTree, t: Array, s: Array) -> PyTree:
    """phi(x_t, e_1 + change, t, s), like x."""
    moved = exponential.move(process, "eps", t, s)
    terms = [(moved.reached.alpha, first.x0), (moved.kept, first.eps)]
    return combine(*terms, (moved.pull, change))
