"""A choice of multistep method at every step, as one table: the unified sampling framework.

Symbols: as of `diffjax.solvers.multistep`; c_i the method chosen for the step from t_i, whose
predictor has the weights w^p and whose corrector w^c; a_i the sum that step i added to DDIM's.

    x_s = alpha_s x0 + sigma_s eps + carry delta + a_i,   a_i = sum_j w^p_j (m_j - m_i)         (1)
    delta = sum_j w^c_j (m_j - m_(i-1)) - a_(i-1)   where c_i corrects, else 0                  (2)

Methods that agree in all but order, corrector, prediction (x0 or eps), variable or rule share (1),
so that a step takes the weights of one of them. The history holds x0 and eps both. The table is an
array of integers, so one compilation serves every table: what `diffjax.search` looks for.

With the same method everywhere it is that method. A corrector acts on the step before it, whatever
method that took.

Reference: Liu, Ning, Lin, Yang, Wang, "A Unified Sampling Framework for Solver Searching of
Diffusion Probabilistic Models", 2023, https://arxiv.org/abs/2312.07243.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core import checks
from diffjax.core.numerics import combine
from diffjax.core.pytree import pytree
from diffjax.core.types import Array, DenoiseFn, Key, PyTree
from diffjax.processes.base import Process
from diffjax.solvers import exponential
from diffjax.solvers.multistep import Multistep, as_like, weighted_differences
from diffjax.solvers.presets import DEIS, DPMSolverPP, UniPC


class UnifiedState(NamedTuple):
    """x: the sample. x0, eps: earlier predictions, newest first, and times: theirs, (H,).

    added: a_i of the last step, like x. done: the steps done, () int32.
    """

    x: PyTree
    x0: tuple[PyTree, ...]
    eps: tuple[PyTree, ...]
    times: Array
    added: PyTree
    done: Array


@pytree
class Unified:
    """Eq. (1) with method `choices[table[i]]` in step i.

    choices: deterministic members of the family, such as DPMSolverPP(2), UniPC(3), DEIS(3).
    table: (n,) integers below len(choices), one for each interval of the grid. The last interval is
      a step of order 1, whose entry says whether there is a corrector before it.

    Raises ValueError for another kind of solver or table. A table of the wrong length cannot be
    seen before it is read: entries beyond its end are the last one.
    """

    choices: tuple[Multistep, ...]
    table: Array

    def __post_init__(self):
        checks.at_least("the number of choices", len(self.choices), 1)
        for choice in self.choices:
            if type(choice) is not Multistep or choice.eta is not None:
                raise ValueError(
                    "choices must be deterministic members of the multistep family, such as "
                    f"DPMSolverPP(2) or UniPC(3); got {choice!r}."
                )
            if not choice.lower_order_final:
                raise ValueError("choices end by a step of order 1: lower_order_final=True.")
        known = checks.concrete(self.table)
        if known is not None and (known.ndim != 1 or not len(known)):
            raise ValueError(f"table must have shape (n,) with n >= 1; got {known.shape}.")
        if known is not None and known.dtype.kind not in "iu":
            raise ValueError(f"table must hold integers; got {known.dtype}.")
        if known is not None and ((known < 0) | (known >= len(self.choices))).any():
            raise ValueError(
                f"table must hold integers from 0 to {len(self.choices) - 1}, the places of the "
                f"choices; got {known.tolist()}."
            )

    stages = 1
    final_stages = 1
    stochastic = False

    @property
    def _orders(self) -> tuple[int, int]:
        """The largest order and number of corrector nodes among the choices."""
        return (
            max(choice.order for choice in self.choices),
            max(choice.corrector for choice in self.choices),
        )

    def init(self, process: Process, x: PyTree, t: Array) -> UnifiedState:
        """No history."""
        order, corrector = self._orders
        kept = max(order, corrector, 1)
        empty = tuple(jax.tree.map(jnp.zeros_like, x) for _ in range(kept))
        dtype = jnp.result_type(*jax.tree.leaves(x))
        times = jnp.broadcast_to(jnp.asarray(t, dtype)[None], (kept, *jnp.shape(t)))
        added = jax.tree.map(jnp.zeros_like, x)
        return UnifiedState(x, empty, empty, times, added, jnp.zeros((), jnp.int32))

    def step(
        self,
        keys: Key,
        denoise: DenoiseFn,
        process: Process,
        state: UnifiedState,
        t: Array,
        s: Array,
    ) -> UnifiedState:
        """Eqs. (2) and (1)."""
        return self._advance(denoise, process, state, t, s, linear=False)

    def finish(
        self,
        keys: Key,
        denoise: DenoiseFn,
        process: Process,
        state: UnifiedState,
        t: Array,
        s: Array,
    ) -> UnifiedState:
        """Eq. (2), then (1) without a_i; x0 where sigma_s = 0."""
        return self._advance(denoise, process, state, t, s, linear=True)

    def _advance(
        self,
        denoise: DenoiseFn,
        process: Process,
        state: UnifiedState,
        t: Array,
        s: Array,
        linear: bool,
    ) -> UnifiedState:
        prediction = denoise(state.x, t)
        x0, eps = as_like(prediction.x0, state.x), as_like(prediction.eps, state.x)
        chosen = self.table[jnp.minimum(state.done, self.table.shape[0] - 1)]
        at_s = process.coeffs(s)
        terms = [(at_s.alpha, x0), (at_s.sigma, eps)]
        if self._orders[1]:
            weights, carry, corrects = self._corrector(process, state, t, s, chosen)
            nodes = ((x0, *state.x0[1:]), (eps, *state.eps[1:]))
            sums = _differences(weights, nodes, (state.x0[0], state.eps[0]))
            terms += [(carry * w, difference) for w, difference in sums]
            terms.append((-carry * corrects, state.added))
        added = jax.tree.map(jnp.zeros_like, state.x)
        if self._orders[0] > 1 and not linear:
            weights = self._predictor(process, state, t, s, chosen)
            added = combine(*_differences(weights, (state.x0, state.eps), (x0, eps)))
            terms.append((jnp.ones_like(at_s.alpha), added))
        kept = len(state.x0)
        times = jnp.concatenate([jnp.asarray(t, state.times.dtype)[None], state.times])[:kept]
        return UnifiedState(
            combine(*terms),
            (x0, *state.x0)[:kept],
            (eps, *state.eps)[:kept],
            times,
            added,
            state.done + 1,
        )

    def _predictor(
        self, process: Process, state: UnifiedState, t: Array, s: Array, chosen: Array
    ) -> Array:
        """w^p of the chosen method, (2, J, *coeffs): of x0, then of eps."""
        rows = []
        for choice in self.choices:
            moved = exponential.move(process, choice.prediction, t, s)
            used = jnp.zeros((0, *moved.pull.shape), moved.pull.dtype)
            if choice.order > 1:
                used = choice.predictor_weights(process, state.times, state.done, moved, t, s)
            rows.append(_row(choice, used, self._orders[0] - 1))
        return jnp.stack(rows)[chosen]

    def _corrector(
        self, process: Process, state: UnifiedState, t: Array, s: Array, chosen: Array
    ) -> tuple[Array, Array, Array]:
        """w^c of the chosen method, (2, J, *coeffs), carry, and 1 where it corrects, else 0."""
        rows, carries, corrects = [], [], []
        for choice in self.choices:
            moved = exponential.move(process, choice.prediction, t, s)
            used = jnp.zeros((0, *moved.pull.shape), moved.pull.dtype)
            if choice.corrector:
                used = choice.corrector_weights(process, state.times, state.done, t, s)
            rows.append(_row(choice, used, self._orders[1]))
            carries.append(moved.carry)
            corrects.append(jnp.where(choice.corrector > 0, state.done > 0, False))
        corrected = jnp.stack(corrects)[chosen].astype(rows[0].dtype)
        return jnp.stack(rows)[chosen], jnp.stack(carries)[chosen], corrected


def unified(table: Sequence[int] | Array = (4,)) -> Unified:
    """`Unified` over the usual choices; by default UniPC of order 3 throughout.

    0: DDIM. 1, 2: DPM-Solver++ of orders 2, 3. 3, 4: UniPC of orders 2, 3. 5: DPM-Solver multistep
    of order 2, in eps. 6: DEIS of order 3.
    """
    choices = (
        Multistep(1),
        DPMSolverPP(2),
        DPMSolverPP(3),
        UniPC(2),
        UniPC(3),
        Multistep(2, "eps"),
        DEIS(3),
    )
    members = tuple(choice for choice in choices if isinstance(choice, Multistep))
    return Unified(members, jnp.asarray(table, jnp.int32))


def _row(choice: Multistep, weights: Array, nodes: int) -> Array:
    """Weights (j, *coeffs) of a method as (2, nodes, *coeffs), zero for what it does not use."""
    missing = nodes - weights.shape[0]
    padded = jnp.pad(weights, [(0, missing)] + [(0, 0)] * (weights.ndim - 1))
    pair = (padded, jnp.zeros_like(padded))
    return jnp.stack(pair if choice.prediction == "x0" else pair[::-1])


def _differences(
    weights: Array, nodes: tuple[tuple[PyTree, ...], ...], base: tuple[PyTree, PyTree]
) -> list[tuple[Array, PyTree]]:
    """The pairs of `combine` for both predictions."""
    both = zip(weights, nodes, base, strict=True)
    return [pair for w, past, now in both for pair in weighted_differences(w, past, now)]
