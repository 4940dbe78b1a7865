"""Solves with steps of their own: the black-box ODE sampler, its inverse, and other methods.

Symbols: v(x, t) = alpha' x0 + sigma' eps the velocity of the probability flow, t0 and t1 two times
in [t_min, t_max] of the process.

    dx/dt = v(x, t)   from t0 to t1 by an embedded Runge-Kutta method                           (1)

t1 < t0 samples, t1 > t0 encodes; the flow is a bijection, so one undoes the other up to the
tolerance. All is inside the compiled program, with no loop on the host. `DPMSolverAdaptive` solves
(1) in its own way and `AdaptiveSDE` the reverse SDE; controller and loop are the same.

With `slots`, no more than so many samples are in flight, and one that has arrived gives its place
to the next (`diffjax.solvers.slots`): the cost follows the mean number of steps. `sample_many` is
that from the prior. A sample's result is that of the whole batch at once, up to the rounding of
the denoiser for another batch size.

The reference code [1] hands the batch to SciPy's RK45 as one vector, so that the steps and the
result of a sample depend on the others. Here each sample has its own steps, those that SciPy would
take for it alone at the same rtol and atol. The reference keeps the state in float64 around a
float32 network; here it has x's dtype, and in float32 tolerances below about 1e-6 ask for digits
that are not there.

It denoises at the end by a step of its reverse-diffusion predictor without noise, here by
`Tweedie()`: the same for VE at its last level, and for VP up to the difference between
2 - sqrt(1 - beta) and 1/sqrt(1 - beta).

References:
[1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
    https://arxiv.org/abs/2011.13456, section 4.3 and appendix D.4.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks, random
from diffjax.core.numerics import at_least_float32, batch_size
from diffjax.core.pytree import pytree, static, taken
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import prior
from diffjax.solvers.adaptive import PIController, Progress, Trial, advance, begin, landed, run
from diffjax.solvers.base import Final, Tweedie
from diffjax.solvers.driver import Result, result
from diffjax.solvers.methods import AdaptiveMethod, EmbeddedRungeKutta, Problem
from diffjax.solvers.slots import in_chunks, run_in_slots
from diffjax.solvers.tableaus import DORMAND_PRINCE, Tableau


class FlowState(NamedTuple):
    """Where each sample ended: x, and (B,) counts as in `diffjax.solvers.adaptive.Solution`.

    rounds: (), the attempts that the program made; each calls the denoiser `method.stages` times.
    """

    x: PyTree
    nfe: Array
    accepted: Array
    rejected: Array
    arrived: Array
    rounds: Array


@pytree
class AdaptiveFlow:
    """An adaptive solve as one value: what `Model.sample` takes beside solvers of a grid.

    controller: tolerances and the rule for steps; None is the method's own, its paper's. method: a
    tableau, which solves eq. (1), or another `AdaptiveMethod`.
    """

    controller: PIController | None = None
    method: Tableau | AdaptiveMethod = static(default=DORMAND_PRINCE)


@pytree
class ProbabilityFlow:
    """The flow where it has arrived, in the place of a solver for `Final`: no step, no noise."""

    stages = 0
    final_stages = 0
    stochastic = False

    def init(self, process: Process, x: PyTree, t: Array) -> FlowState:
        zero = jnp.zeros((batch_size(x),), jnp.int32)
        return FlowState(x, zero, zero, zero, zero == 0, jnp.int32(0))

    def step(
        self, keys: Key, denoise: DenoiseFn, process: Process, state: FlowState, t: Array, s: Array
    ) -> FlowState:
        """The state."""
        return state

    finish = step


def solve_adaptive(
    key: Key,
    denoise: DenoiseFn,
    x: PyTree,
    t0: Number,
    t1: Number,
    *,
    process: Process,
    method: Tableau | AdaptiveMethod = DORMAND_PRINCE,
    controller: PIController | None = None,
    final: Final = Tweedie(),
    slots: int | None = None,
) -> Result:
    """Solves from x at t0 to t1, each sample with its own steps.

    key: a typed key, or (B,) keys, one a sample; attempt i of a sample draws from its key and i.
      The flow draws nothing; `AdaptiveSDE` and `final` may.
    denoise: (x_t, t (B,)) -> Prediction, any callable.
    x: (B, *data), a tree of floating-point arrays: a draw of the prior, a latent or, to encode,
      data. Half precision is raised to float32.
    t0, t1: (), within [t_min, t_max]; t1 > t0 encodes, with final=Keep().
    method: a tableau, for eq. (1), or another method; static under `jit`. controller: the
      tolerances, by default `method.controller()`.
    final: `Tweedie()` denoises at t1 by one call more, `Keep()` leaves x there.
    slots: the samples in flight; None for all. With fewer than B, `denoise` is asked for `slots`
      samples at a time, so one that holds something for each sample must have `take(index)`.
      Static under `jit`.

    Returns `Result` whose `nfe` is (B,), the calls that each sample needed; without slots the batch
    takes as long as its slowest. `state` is a `FlowState`. A sample that the controller gave up is
    NaN, with `state.arrived` False.

    Raises ValueError for times outside the process's range or equal, a `final` that does not fit,
    or where the method cannot start. Reverse-mode differentiation raises TypeError unless
    `controller.bounded`, which does not go with slots.
    """
    x = at_least_float32(x)
    method = as_method(method)
    controller = method.controller() if controller is None else controller
    check_flow(denoise, t0, t1, process, final, method)
    _check_slots(slots, controller)
    dtype, count = jnp.result_type(*jax.tree.leaves(x)), batch_size(x)
    t0, t1 = (jnp.asarray(t, dtype) for t in (t0, t1))
    u0, u1 = (method.clock(process, t).astype(dtype) for t in (t0, t1))
    problem = Problem(denoise, process, controller, t0, t1, u0, u1)
    keys = random.sample_keys(key, count)
    flight = _Flight(method, problem, keys, count, count if slots is None else min(slots, count))

    end, rounds = flight.solve(x)
    y, arrived = landed(end, u1, controller)
    nfe = method.start_stages + method.stages * (end.accepted + end.rejected)
    state = FlowState(y, nfe, end.accepted, end.rejected, arrived, rounds)
    flow = ProbabilityFlow()

    def finish(index: Array) -> PyTree:
        own, own_keys = flow.init(process, flight.pick(y, index), t1), flight.pick(keys, index)
        return final.end(flow, own_keys, flight.of(index).denoise, process, own, t0, t1).x

    state = state._replace(x=flight.everywhere(finish))
    return result(denoise, state, nfe + final.evaluations(flow))


class _Flight(NamedTuple):
    """A solve of `total` samples, at most `size` of them at a time."""

    method: AdaptiveMethod
    problem: Problem
    keys: Key  # (total,)
    total: int
    size: int

    def of(self, index: Array) -> Problem:
        """The problem of those samples."""
        if self.size == self.total:
            return self.problem
        return self.problem._replace(denoise=taken(self.problem.denoise, index))

    def pick(self, tree: PyTree, index: Array) -> PyTree:
        """The rows of those samples."""
        if self.size == self.total:
            return tree
        return jax.tree.map(lambda leaf: leaf[index], tree)

    def everywhere(self, function: Callable[[Array], PyTree]) -> PyTree:
        """function(index) of all samples: at once, or `size` of them at a time."""
        if self.size == self.total:
            return function(jnp.arange(self.total))
        return in_chunks(function, self.total, self.size)

    def step_of(self, index: Array) -> Callable[[Progress], Progress]:
        """One attempt of those samples."""
        problem, keys = self.of(index), self.pick(self.keys, index)

        def attempt(at: Progress, u_next: Array, h: Array) -> Trial:
            drawn = jax.vmap(jax.random.fold_in)(keys, at.accepted + at.rejected)
            return self.method.attempt(drawn, problem, at, u_next, h)

        def step(at: Progress) -> Progress:
            limit = self.method.limit(at.memory)
            return advance(attempt, at, problem.u1, problem.controller, self.method.order, limit)

        return step

    def solve(self, x: PyTree) -> tuple[Progress, Array]:
        """(the end of every sample, the rounds that it took)."""
        memory, h = self.everywhere(
            lambda index: self.method.start(self.of(index), self.pick(x, index))
        )
        u0, u1 = self.problem.u0, self.problem.u1
        start = begin(x, memory, jnp.broadcast_to(u0, (self.total,)), u1, h)
        if self.size < self.total:
            return run_in_slots(self.step_of, start, self.size)
        end = run(self.step_of(jnp.arange(self.total)), start, self.problem.controller)
        return end, jnp.max(end.accepted + end.rejected)


def sample_many(
    key: Key,
    denoise: DenoiseFn,
    n: int,
    batch: int,
    *,
    process: Process,
    shape: tuple[int, ...] | None = None,
    draw: Callable[[Key], PyTree] | None = None,
    t0: Number | None = None,
    t1: Number | None = None,
    **options,
) -> Result:
    """Draws n samples with at most `batch` in flight: `solve_adaptive` from the prior, with slots.

    key: a typed key, or (n,) keys, one a sample: sample i is the same whatever n and batch.
    denoise: with `take(index)` where it holds something, such as a label, for each of n samples.
    shape: of one sample, drawn from the process's prior; or draw: keys (n,) -> x (n, *data).
    t0, t1: by default t_max and t_min. options: the other arguments of `solve_adaptive`.

    Returns its `Result`; `state.rounds` times `method.stages` are the calls for a batch that the
    loop made, about sum(nfe)/batch and the tail.
    """
    checks.at_least("n", n, 1)
    keys = random.sample_keys(key, n)
    if draw is not None and shape is None:
        x = draw(keys)
    elif shape is not None and draw is None:
        x = prior(keys, process, (n, *shape))
    else:
        raise ValueError("Give either shape=, of one sample, or draw=, which makes them from keys.")
    return solve_adaptive(
        keys,
        denoise,
        x,
        process.t_max if t0 is None else t0,
        process.t_min if t1 is None else t1,
        process=process,
        slots=batch,
        **options,
    )


def as_method(method: Tableau | AdaptiveMethod) -> AdaptiveMethod:
    """A tableau as a method of the probability flow; others pass."""
    return EmbeddedRungeKutta(method) if isinstance(method, Tableau) else method


def _check_slots(slots: int | None, controller: PIController) -> None:
    if slots is None:
        return
    checks.at_least("slots", slots, 1)
    if controller.bounded:
        raise ValueError(
            "Slots are refilled in a loop that reverse mode cannot go through, which "
            "PIController(bounded=True) is for: leave out slots=, or bounded=True."
        )


def check_flow(
    denoise: DenoiseFn,
    t0: Number,
    t1: Number,
    process: Process,
    final: Final,
    method: Tableau | AdaptiveMethod = DORMAND_PRINCE,
) -> None:
    """Raises what `solve_adaptive` would for these arguments: call it before a jitted one."""
    first, last = checks.concrete(t0), checks.concrete(t1)
    low, high = checks.concrete(process.t_min), checks.concrete(process.t_max)
    if first is None or last is None:
        return
    if (first == last).any():
        raise ValueError(f"t0 and t1 must differ; got {t0} for both.")
    if low is not None and high is not None:
        for name, t in (("t0", first), ("t1", last)):
            # Times may have gone through float32.
            if not np.all((t >= low * (1 - 1e-6)) & (t <= high * (1 + 1e-6))):
                raise ValueError(
                    f"{name} must lie in the process's [t_min, t_max] = [{low}, {high}], where its "
                    f"velocity is finite; got {t}. To denoise at the end use final=Tweedie()."
                )
    as_method(method).check(process, t0, t1)
    end_sigma = checks.evaluated(lambda: process.coeffs(jnp.asarray(last, float)).sigma)
    final.check(ProbabilityFlow(), end_sigma, bool((last > first).any()))
    if hasattr(denoise, "check_times"):
        denoise.check_times(jnp.stack([jnp.asarray(t, float) for t in (t0, t1)]))
