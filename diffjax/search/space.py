"""What a search may change: candidates, how they vary, and the plan that each stands for.

Symbols: times t_0 > ... > t_n, the last network time t_m (m = n - 1 where the grid jumps from there
to 0, else m = n), low the smallest time allowed for it, c (m' logits) and r (n offsets) the
candidate.

    t_k = low + (t_0 - low) sum_{j >= k} softmax(c)_j,   k = 0 .. m                             (1)
    the network is asked at t_k exp(r_k) in place of t_k, within [t_min, t_max]                 (2)

(1) makes every vector c a strictly decreasing grid with its ends kept, and equal changes of c equal
relative changes of a step, whether steps are of 10 or of 1e-4; so one step size serves a gradient
on all of them. The sums run from the smallest steps up and keep their digits. A grid whose last
network time may move has m' = m + 1: the last share is its distance from t_min.

A `Space` is a value: functions on candidates, which may be any tree.

References:
[1] Li et al., "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for
    Automated Diffusion Model Acceleration", 2023, https://arxiv.org/abs/2309.10438 (which picks
    among the training times; crossover takes each time from one of two parents).
[2] Xia et al., "Towards More Accurate Diffusion Model Acceleration with A Timestep Aligner", 2023,
    https://arxiv.org/abs/2310.09469 (2).
[3] Liu et al., "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic
    Models", 2023, https://arxiv.org/abs/2312.07243 (`table_space`).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import checks
from diffjax.core.pytree import replace
from diffjax.core.types import Array, Key, PyTree
from diffjax.processes.base import Process
from diffjax.solvers.base import Solver
from diffjax.solvers.grids import given
from diffjax.solvers.unified import Unified

Candidate = PyTree


class Plan(NamedTuple):
    """What a candidate stands for.

    times: (n+1,). solver: of a grid. asked: (n+1,) the times that the network is asked at, or None
    for the grid's own. table: further arrays of the solver by name, to be kept with the schedule.
    """

    times: Array
    solver: Solver
    asked: Array | None = None
    table: dict[str, Array] | None = None


@dataclasses.dataclass(frozen=True)
class Space:
    """A set of candidates.

    first: where a search starts. plan: candidate -> Plan, traceable. random: key -> candidate.
    mutate: (key, candidate) -> candidate. cross: (key, a, b) -> candidate. features: candidate ->
    (F,), what a predictor sees.
    """

    first: Candidate
    plan: Callable[[Candidate], Plan]
    random: Callable[[Key], Candidate]
    mutate: Callable[[Key, Candidate], Candidate]
    cross: Callable[[Key, Candidate, Candidate], Candidate]
    features: Callable[[Candidate], Array]


def schedule_space(
    process: Process,
    solver: Solver,
    times: Array,
    *,
    move: bool = True,
    align: bool = False,
    spread: float = 0.4,
) -> Space:
    """Grids around `times`, eq. (1), and times asked, eq. (2), for one solver.

    times: (n+1,), decreasing; both ends stay. move: whether the grid may change. align: whether the
    times asked may. spread: the standard deviation of a mutation, in c; r takes a tenth of it.
    """
    times = given(times)
    checks.positive("spread", spread)
    if not (move or align):
        raise ValueError("Nothing to search for: pass move=True, align=True or both.")
    first: dict[str, Array] = {}
    if move:
        first["grid"] = logits_of(process, times)
    if align:
        first["asked"] = jnp.zeros((times.shape[0] - 1,), times.dtype)

    def plan(candidate: Candidate) -> Plan:
        grid = grid_of(process, times, candidate["grid"]) if move else times
        asked = None
        if align:
            near = jnp.clip(grid[:-1] * jnp.exp(candidate["asked"]), process.t_min, process.t_max)
            asked = jnp.concatenate([near, grid[-1:]])
        return Plan(grid, solver, asked)

    sizes = {"grid": spread, "asked": spread / 10}

    def vary(key: Key, candidate: Candidate, share: float) -> Candidate:
        varied = {}
        for (name, leaf), own in zip(
            candidate.items(), jax.random.split(key, len(candidate)), strict=True
        ):
            k1, k2 = jax.random.split(own)
            chosen = jax.random.bernoulli(k1, share, leaf.shape)
            varied[name] = leaf + chosen * sizes[name] * jax.random.normal(k2, leaf.shape)
        return varied

    return Space(
        first=first,
        plan=plan,
        random=lambda key: vary(key, first, 1.0),
        mutate=lambda key, candidate: vary(key, candidate, 0.5),
        cross=mix,
        features=lambda candidate: jnp.concatenate(
            [candidate[name] - jnp.mean(candidate[name]) * (name == "grid") for name in first]
        ),
    )


def table_space(
    process: Process,
    solver: Unified,
    times: Array,
    *,
    move: bool = False,
    changed: float = 0.3,
    spread: float = 0.4,
) -> Space:
    """A choice of method for every step of `times` [3], and the grid too where it may `move`.

    solver: the choices; its table, repeated at its end to one entry a step, is where the search
    starts. changed: the share of entries that a mutation draws anew. spread: as of
    `schedule_space`. A candidate has integers, so `Gradient` does not apply.
    """
    times = given(times)
    checks.in_range("changed", changed, 0.0, 1.0)
    steps, count = times.shape[0] - 1, len(solver.choices)
    entries = jnp.minimum(jnp.arange(steps), solver.table.shape[0] - 1)
    grid = schedule_space(process, solver, times, spread=spread)
    first = {"table": jnp.asarray(solver.table)[entries]}
    first |= grid.first if move else {}

    def plan(candidate: Candidate) -> Plan:
        moved = grid.plan({"grid": candidate["grid"]}).times if move else times
        table = {"table": candidate["table"]}
        return Plan(moved, replace(solver, **table), table=table)

    def vary(key: Key, candidate: Candidate, share: float) -> Candidate:
        which, what, rest = jax.random.split(key, 3)
        drawn = jax.random.randint(what, (steps,), 0, count, candidate["table"].dtype)
        anew = jax.random.bernoulli(which, share, (steps,))
        varied = {"table": jnp.where(anew, drawn, candidate["table"])}
        return varied | (grid.mutate(rest, {"grid": candidate["grid"]}) if move else {})

    def features(candidate: Candidate) -> Array:
        chosen = jax.nn.one_hot(candidate["table"], count, dtype=times.dtype).reshape(-1)
        if not move:
            return chosen
        return jnp.concatenate([chosen, grid.features({"grid": candidate["grid"]})])

    return Space(
        first=first,
        plan=plan,
        random=lambda key: vary(key, first, 1.0),
        mutate=lambda key, candidate: vary(key, candidate, changed),
        cross=mix,
        features=features,
    )


def mix(key: Key, a: Candidate, b: Candidate) -> Candidate:
    """Each element from one of two parents, with equal chances."""
    leaves, treedef = jax.tree.flatten(a)
    keys = jax.random.split(key, len(leaves))
    chosen = [
        jnp.where(jax.random.bernoulli(k, 0.5, x.shape), x, y)
        for k, x, y in zip(keys, leaves, jax.tree.leaves(b), strict=True)
    ]
    return jax.tree.unflatten(treedef, chosen)


def _jumps(process: Process, times: Array) -> bool:
    """Whether the last interval leads from the last network time below t_min: to 0."""
    known = checks.concrete(times)
    if known is None:
        raise ValueError(
            "The grid that a search starts from must be concrete: build it outside jit."
        )
    return bool(known[-1] < float(process.t_min)) and len(known) > 2


def logits_of(process: Process, times: Array) -> Array:
    """c of eq. (1) for a grid: (n,), the logarithms of its steps' shares."""
    if not _jumps(process, times):
        return jnp.log(-jnp.diff(times))
    nodes = np.asarray(times, np.float64)[:-1]
    low = float(process.t_min)
    steps = np.append(-np.diff(nodes), nodes[-1] - low)
    # A grid that stands at t_min already has no distance from it: a small one may grow.
    steps[-1] = max(steps[-1], 1e-2 * steps[-2])
    return jnp.asarray(np.log(steps), times.dtype)


def grid_of(process: Process, times: Array, logits: Array) -> Array:
    """Eq. (1), like `times`, whose ends it keeps."""
    jumps = _jumps(process, times)
    low = jnp.asarray(process.t_min, times.dtype) if jumps else times[-1]
    shares = jax.nn.softmax(logits)
    heights = jnp.cumsum(shares[::-1])[::-1]  # heights[0] is 1 up to rounding
    inner = low + (times[0] - low) * heights[1:]
    return jnp.concatenate([times[:1], inner, times[-1:]])
