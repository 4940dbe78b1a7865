"""One call: a schedule fitted to a model.

    schedule = optimise_schedule(
        key, denoise, process, shape=(256, 32, 32, 3), solver=DDIM(),
        times=grids.log_snr(process, 8),
        objective=FineSolution(grids.log_snr(process, 100)), method=Gradient())
    schedule.save("ddim8.json")

The search sees one half of the starts drawn; the other half scores the grid that it began with and
the one that it found, so `Schedule.before` and `after` are fair.
"""

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.core import checks, random
from diffjax.core.numerics import canonical
from diffjax.core.types import Array, DenoiseFn, Key, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import prior
from diffjax.search.methods import Gradient, Method, Problem
from diffjax.search.objective import Objective
from diffjax.search.schedule import Schedule, aligned, held_for, of_plan
from diffjax.search.space import Candidate, Plan, Space, schedule_space
from diffjax.solvers.base import Final, Solver, ToEnd, calls
from diffjax.solvers.driver import check_solve, sample


def optimise_schedule(
    key: Key,
    denoise: DenoiseFn,
    process: Process,
    *,
    shape: tuple[int, ...],
    solver: Solver,
    times: Array,
    objective: Objective,
    method: Method = Gradient(),
    space: Space | None = None,
    final: Final = ToEnd(),
) -> Schedule:
    """The best schedule that `method` finds for `denoise`.

    shape: (starts, *data) of the starts to search with; as many again score the result. solver,
    times: those to begin with, and to compare with. objective: what is made small. space: what may
    change; by default the grid, `schedule_space(process, solver, times)`. final: as of `sample`.

    The whole set of starts is solved at once: choose `shape` as large as memory allows, or more
    starts for a statistic of many samples. Raises what `sample` would for the grid.
    """
    times = jnp.asarray(times)
    check_solve(denoise, times, solver, process, final)
    checks.at_least("starts", shape[0], 1)
    objective.check(times)
    if abs(float(times[0]) - float(process.t_max)) > 1e-5 * float(process.t_max):
        raise ValueError(
            f"Starts are drawn from the prior at t_max = {process.t_max}, so the grid must begin "
            f"there; got {times[0]}. Give the process that t_max."
        )
    space = schedule_space(process, solver, times) if space is None else space
    held, answer = _argument(denoise), held_for(process)
    process = canonical(process)
    sets = [
        _starts(jax.random.fold_in(key, i), held, process, shape, objective, final) for i in (0, 1)
    ]

    def graded(plan: Plan, held: Any, process: Process, starts: Any) -> Array:
        keys, x, target = starts
        model = aligned(_checkpointed(held), process, plan.times, plan.asked, answer)
        found = sample(keys, model, x, plan.times, solver=plan.solver, process=process, final=final)
        return objective.score(found.x, target)

    def chosen(candidate: Candidate, held: Any, process: Process, starts: Any) -> Array:
        return graded(space.plan(candidate), held, process, starts)

    score = jax.jit(chosen)
    slope = jax.jit(
        lambda candidate, held, process, starts, index: jax.value_and_grad(chosen)(
            candidate, held, process, jax.tree.map(lambda leaf: leaf[index], starts)
        )
    )
    problem = Problem(
        space=space,
        score=lambda candidate: score(candidate, held, process, sets[0]),
        gradient=lambda candidate, index: slope(candidate, held, process, sets[0], index),
        starts=shape[0],
    )
    found = method.search(jax.random.fold_in(key, 2), problem)
    plan = space.plan(found.candidate)
    model = aligned(denoise, process, plan.times, plan.asked, answer)
    check_solve(model, plan.times, plan.solver, process, final)
    grade = jax.jit(graded)
    before, after = (
        float(grade(each, held, process, sets[1])) for each in (Plan(times, solver), plan)
    )
    nfe = calls(solver, final, times.shape[0] - 1)
    return of_plan(
        plan,
        process,
        method,
        before=before,
        after=after,
        evaluations=round(found.scored * nfe),
    )


def _starts(
    key: Key,
    held: Any,
    process: Process,
    shape: tuple[int, ...],
    objective: Objective,
    final: Final,
) -> tuple[Key, PyTree, Any]:
    """(keys, x, target) of one set of starts."""
    keys = random.sample_keys(key, shape[0])
    x = prior(keys, process, shape)
    target = jax.jit(objective.target)(keys, held, process, x, final)
    return keys, x, target


def _argument(denoise: DenoiseFn) -> Any:
    """The denoiser as an argument of `jit`: itself where it is a tree, else wrapped, its arrays
    then part of the program.
    """
    leaves = jax.tree.leaves(denoise)
    if all(isinstance(leaf, (jax.Array, float, int)) or hasattr(leaf, "dtype") for leaf in leaves):
        return denoise
    return jax.tree_util.Partial(denoise)


def _checkpointed(denoise: Any) -> Any:
    """Recomputes the network backwards, so that a gradient's memory is that of the states."""
    return jax.checkpoint(lambda x, t: denoise(x, t))
