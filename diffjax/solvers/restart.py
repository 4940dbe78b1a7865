"""Restart sampling: a deterministic solve that goes back to more noise, several times.

Symbols: a main grid t_0 > ... > t_n; a restart has K repeats and a grid of its own u_0 > ... > u_L,
from u_0 = t_max down to u_L = t_min, a node of the main grid; a, b of `transition`, z standard
normal.

    on reaching u_L, K times:   x_{u_0} = a x_{u_L} + s b z,   then solve from u_0 to u_L       (1)

The forward law of (1) is exact for s = 1, so that what is true at u_L stays true. An error in the
law at u_L is carried up, where the new noise covers it: each repeat contracts it, as an SDE would,
while the solver is a deterministic one with its higher order.

Calls of the denoiser: those of the main grid, and K L steps for each restart, all counted in `nfe`.
All intervals run in one scan, so that a program holds one copy of the network.

Where the authors' code differs: its restarts are at the node next to t_min in sigma, here in t, the
same for EDM; and s is an option there too, whose default at the command line is 0.

References:
[1] Xu, Deng, Cheng, Tian, Liu, Jaakkola, "Restart Sampling for Improving Generative Processes",
    2023, https://arxiv.org/abs/2306.14878, algorithm 1 and appendix B.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks, random
from diffjax.core.numerics import at_least_float32, batch_size, combine, safe_sqrt
from diffjax.core.pytree import pytree, static
from diffjax.core.types import Array, DenoiseFn, Key, Number, PyTree
from diffjax.processes.base import Process
from diffjax.processes.calculus import between
from diffjax.solvers.base import Final, Solver, ToEnd, calls, check_one_step
from diffjax.solvers.driver import Result, check_solve, result


@pytree
class Restart:
    """One restart interval, eq. (1).

    times: its grid u, (L+1,), strictly decreasing, as from `grids.karras(process, L, t_max=...,
    end=...)`; its last time is moved to the nearest inner node of the main grid. repeats: K.
    noise: s.
    """

    times: Array
    repeats: int = static(default=1)
    noise: Number = 1.0

    def __post_init__(self):
        checks.at_least("repeats", self.repeats, 1)
        checks.non_negative("noise", self.noise)
        known = checks.concrete(self.times)
        if known is not None and (known.ndim != 1 or len(known) < 2 or (np.diff(known) >= 0).any()):
            raise ValueError(
                f"times of a restart must decrease strictly, (L+1,) with L >= 1; got {known}. "
                "Build it with diffjax.grids, t_max= its upper and end= its lower time."
            )


class Path(NamedTuple):
    """All intervals in the order they are run, each (m,): where x is, and from where to where.

    `noise` is s where x must be raised first, `level` < `start`.
    """

    level: Array
    start: Array
    end: Array
    noise: Array


def restart_path(times: Array, restarts: Sequence[Restart]) -> Path:
    """The main grid with the restarts put in. Raises ValueError for a main grid without a node."""
    intervals = times.shape[0] - 1
    if intervals < 2:
        raise ValueError(
            f"A restart happens at a node inside the main grid, which needs 2 intervals or more; "
            f"got {intervals}."
        )
    parts = [Path(times[:-1], times[:-1], times[1:], jnp.zeros_like(times[1:]))]
    places = [jnp.arange(intervals, dtype=times.dtype)]
    for restart in restarts:
        inner = jnp.asarray(restart.times, times.dtype)
        node = 1 + jnp.argmin(jnp.abs(times[1:-1] - inner[-1]))
        inner = inner.at[-1].set(times[node])
        start, end = (jnp.tile(part, restart.repeats) for part in (inner[:-1], inner[1:]))
        first = jnp.arange(start.shape[0]) % (inner.shape[0] - 1) == 0
        level = jnp.where(first, times[node], start)
        parts.append(Path(level, start, end, jnp.where(first, restart.noise, 0.0)))
        places.append(jnp.full(start.shape, node - 0.5, times.dtype))  # before interval `node`
    order = jnp.argsort(jnp.concatenate(places), stable=True)
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays)[order], *parts)


def sample_with_restarts(
    key: Key,
    denoise: DenoiseFn,
    x: PyTree,
    times: Array,
    *,
    solver: Solver,
    process: Process,
    restarts: Sequence[Restart],
    final: Final = ToEnd(),
) -> Result:
    """`diffjax.sample` over a decreasing grid, with restarts, eq. (1).

    solver: a one-step method; a deterministic one is what the method is about. restarts: in any
    order; those at one node run one after the other. Other arguments as of `sample`.

    Raises what `sample` raises; ValueError for a grid that increases, a solver with history, or a
    restart that does not lead above its node.
    """
    x = at_least_float32(x)
    times = jnp.asarray(times)
    check_solve(denoise, times, solver, process, final)
    keys = random.sample_keys(key, batch_size(x))
    path = restart_path(times, restarts)
    check_restarts(times, restarts)
    state = solver.init(process, x, times[0])
    check_one_step(solver, state, "a restart")

    def body(state, i):
        step_keys = random.step_keys(keys, i)
        at = jax.tree.map(lambda column: column[i], path)
        state = jax.lax.cond(at.start > at.level, _raise, _stay, process, step_keys, state, at)
        return solver.step(step_keys, denoise, process, state, at.start, at.end), None

    count = path.start.shape[0]
    state, _ = jax.lax.scan(body, state, jnp.arange(count if final.steps else count - 1))
    last = random.step_keys(keys, count - 1)
    state = final.end(solver, last, denoise, process, state, times[-2], times[-1])
    return result(denoise, state, calls(solver, final, count))


def _raise(process: Process, keys: Key, state: Any, at: Path) -> Any:
    """x moved from `at.level` up to `at.start` by the transition, eq. (1)."""
    move = between(process, at.start, at.level)
    z = random.normal_like(keys, "restart", state.x)
    spread = at.noise * move.at_t.sigma * safe_sqrt(move.gain)
    return state._replace(x=combine((move.a, state.x), (spread, z)))


def _stay(process: Process, keys: Key, state: Any, at: Path) -> Any:
    return state


def check_restarts(times: Array, restarts: Sequence[Restart]) -> None:
    """Raises what `sample_with_restarts` would for these times: call it before a jitted one."""
    path = restart_path(times, restarts)
    known = [checks.concrete(part) for part in (path.start, path.end, times)]
    start, end, main = known
    if start is None or end is None or main is None:
        return
    if main[0] < main[-1]:
        raise ValueError("A restart adds noise on the way to the data; the grid must decrease.")
    if (start <= end).any():
        i = int((start <= end).argmax())
        raise ValueError(
            f"A restart must decrease to the node it returns to; got a step from {start[i]} to "
            f"{end[i]}, where its lower end was moved to the nearest inner node of the main grid."
        )
