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
from diffjax.core.numerics import combine
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

        def begin(state: History) -> History:
            return self._begin(denoise, process, state, t, s)

        def go_on(state: History) -> History:
            return self._linear().step(keys, denoise, process, state, t, s)

        return jax.lax.cond(state.done < self.first, begin, go_on, state)

    def finish(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: History, t: Array, s: Array
    ) -> History:
        """Eq. (1), which is finite at sigma_s = 0."""
        return self._linear().finish(keys, denoise, process, state, t, s)

    def _linear(self) -> Multistep:
        return Multistep(self.order, "eps", "step", lower_order_final=False)

    def _begin(
        self, denoise: DenoiseFn, process: Process, state: History, t: Array, s: Array
    ) -> History:
        first = denoise(state.x, t)
        new = as_like(first.eps, state.x)

        def change(x: PyTree, time: Array) -> PyTree:
            """e(x, time) - e_1."""
            return jax.tree.map(jnp.subtract, as_like(denoise(x, time).eps, state.x), new)

        if self.start == "trapezoid":
            ahead = change(_transfer(process, first, None, t, s), s)
            mean = jax.tree.map(lambda b: b / 2, ahead)
        else:
            middle = (t + s) / 2
            second = change(_transfer(process, first, None, t, middle), middle)
            third = change(_transfer(process, first, second, t, middle), middle)
            fourth = change(_transfer(process, first, third, t, s), s)
            mean = jax.tree.map(lambda b, c, d: (2 * b + 2 * c + d) / 6, second, third, fourth)
        x = as_like(_transfer(process, first, mean, t, s), state.x)
        return remembered(state, new, t)._replace(x=x)


def _transfer(
    process: Process, first: Prediction, change: PyTree | None, t: Array, s: Array
) -> PyTree:
    """phi(x_t, e_1 + change, t, s), like x."""
    moved = exponential.move(process, "eps", t, s)
    terms = [(moved.reached.alpha, first.x0), (moved.kept, first.eps)]
    return combine(*terms) if change is None else combine(*terms, (moved.pull, change))
