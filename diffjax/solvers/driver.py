"""The one driver: a solve over a given grid of times.

Symbols: times (n+1,), from the noisiest to the last; interval i leads from times[i] to times[i+1].

    state = solver.init(process, x, times[0])
    for i in 0 .. m-1:  state = solver.step(keys_i, denoise, process, state, times[i], times[i+1])
    state = final.end(solver, ..., times[n-1], times[n])                                        (1)

with m = n where the last interval is a step like the others (`final.steps`), else n - 1. The loop
is one `lax.scan`, so compile time and memory do not grow with n. `sample` is not jitted:
call it inside your own `jit`, or as

    draw = jax.jit(sample, static_argnames=("save", "checkpoint"))

where one trace serves every key, grid of the same length, weight, schedule constant and solver
constant. keys_i = fold_in(fold_in(key, sample), i), so sample j depends on nothing but its own key.
Another number of steps is another program, unless the grid is padded (`diffjax.grids.padded`).

Reverse mode goes through the loop and stores what each step leaves for the way back: n times a
step's memory, a network's activations included. With `checkpoint` = k the loop is cut into n/k
segments. The states between segments are stored, and each segment, then each step, is computed
again on the way back [1]: n/k + k states and one step's own memory, for two more passes forward.
k near sqrt(n) stores the least; k = 1 stores n states for one more pass.

References:
[1] Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016,
    https://arxiv.org/abs/1604.06174.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from diffjax.core import checks, random
from diffjax.core.numerics import at_least_float32, batch_size
from diffjax.core.types import Array, DenoiseFn, Key, PyTree, evaluations
from diffjax.processes.base import Process
from diffjax.solvers.base import Final, Solver, ToEnd, calls


class Result(NamedTuple):
    """What `sample` and `solve_adaptive` return.

    x: the samples, like the input. state: the solver's whole final state. nfe: calls of the
    denoiser, an int, a traced int32 where `n_steps` is traced, or (B,) from `solve_adaptive`.
    saved: `save` of the state after each interval, stacked along a new leading axis of length n, or
    None. evaluations: of networks, like nfe: a guided denoiser asks more than one a call.
    """

    x: PyTree
    state: Any
    nfe: int | Array
    saved: PyTree
    evaluations: int | Array


def result(denoise: DenoiseFn, state: Any, nfe: int | Array, saved: PyTree = None) -> Result:
    """What a solve returns that ended in `state` after `nfe` calls of `denoise`."""
    return Result(state.x, state, nfe, saved, nfe * evaluations(denoise))


def sample(
    key: Key,
    denoise: DenoiseFn,
    x: PyTree,
    times: Array,
    *,
    solver: Solver,
    process: Process,
    final: Final = ToEnd(),
    save: Callable[[Any], PyTree] | None = None,
    n_steps: int | Array | None = None,
    state: Any = None,
    checkpoint: int | None = None,
) -> Result:
    """Solves from x at times[0] to times[-1], eq. (1).

    key: a typed key, or (B,) keys, one a sample.
    denoise: (x_t, t) -> Prediction, any callable; a pytree such as `make_denoiser`'s can be an
      argument of your own `jit`.
    x: (B, *data), a tree of floating-point arrays; half precision is raised to float32.
    times: (n+1,), strictly decreasing, n >= 1, from `diffjax.grids` or your own; increasing to
      invert (a deterministic solver and final=Keep()).
    final: how the last interval is done; see `diffjax.solvers.base`.
    save: state -> tree, kept after each interval. By default nothing is kept.
    n_steps: the number of real intervals, possibly traced, in a grid padded in front with copies of
      its first time; padded intervals call and draw nothing.
    state: a state to continue from instead of `solver.init`; its x is used.
    checkpoint: steps a segment for reverse mode in less memory, static; see the module's docstring.
      The samples are the same.

    Raises ValueError for a grid that is not strictly monotonic or whose end does not fit `final`,
    and TypeError for an untyped key or integer x. Inside `jit` the grid's values are unknown: use
    `diffjax.testing.checked(sample)` to check them there.
    """
    x = at_least_float32(x)
    times = jnp.asarray(times)
    check_solve(denoise, times, solver, process, final, n_steps)
    if checkpoint is not None:
        checks.at_least("checkpoint", checkpoint, 1)
    keys = random.sample_keys(key, batch_size(x))
    intervals = times.shape[0] - 1
    padding = 0 if n_steps is None else intervals - n_steps
    stepped = intervals if final.steps else intervals - 1
    segment = min(checkpoint or 1, max(stepped, 1))
    filling = -stepped % segment  # skipped like padding, so that all segments have one length
    before = 0 if state is None else getattr(state, "done", 0)
    _check_noisy_end(solver, process, x, times)
    if state is None:
        state = solver.init(process, x, times[0])

    def advance(state, i):
        step_keys = random.step_keys(keys, i - padding)
        return solver.step(step_keys, denoise, process, state, times[i], times[i + 1])

    def body(state, i):
        if n_steps is None and not filling:
            state = advance(state, i)
        else:
            state = jax.lax.cond(i >= padding, advance, lambda state, _: state, state, i)
        return state, None if save is None else save(state)

    indices = jnp.arange(-filling, stepped)
    if checkpoint is None:
        state, saved = jax.lax.scan(body, state, indices)
    else:
        state, saved = _checkpointed_scan(body, state, indices, segment)
    last_keys = random.step_keys(keys, intervals - 1 - padding)
    state = final.end(solver, last_keys, denoise, process, state, times[-2], times[-1])
    if save is not None:
        saved = jax.tree.map(
            lambda path, end: jnp.concatenate(
                [path[filling : filling + intervals - 1], jnp.asarray(end)[None]]
            ),
            saved,
            save(state),
        )
    nfe = calls(solver, final, intervals - padding, before)
    return result(denoise, state, nfe, saved)


def _checkpointed_scan(
    body: Callable[[Any, Array], tuple[Any, PyTree]], state: Any, indices: Array, segment: int
) -> tuple[Any, PyTree]:
    """`lax.scan` in segments that are computed again on the way back; their length divides."""
    step = jax.checkpoint(body, prevent_cse=False)  # a loop's body needs no guard against merging
    if segment == 1:
        return jax.lax.scan(step, state, indices)

    def several(state, indices):
        return jax.lax.scan(step, state, indices)

    parts = indices.reshape(-1, segment)
    state, saved = jax.lax.scan(jax.checkpoint(several, prevent_cse=False), state, parts)
    return state, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), saved)


def check_solve(
    denoise: DenoiseFn,
    times: Array,
    solver: Solver,
    process: Process,
    final: Final,
    n_steps: int | Array | None = None,
) -> None:
    """Raises what `sample` would for these arguments: call it before a jitted `sample`.

    Inside `jit` the values of `times` are unknown and go to checkify.
    """
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"times must have shape (n+1,) with n >= 1; got {times.shape}.")
    if not jnp.issubdtype(times.dtype, jnp.floating):
        raise TypeError(f"times must be floating point; got {times.dtype}.")
    intervals = times.shape[0] - 1
    if n_steps is not None:
        checks.in_range("n_steps", n_steps, 1, intervals)
    known, count = checks.concrete(times), checks.concrete(n_steps)
    if known is None or (n_steps is not None and count is None):
        _check_when_run(times, intervals if n_steps is None else jnp.asarray(n_steps))
    if known is None:
        return
    start = 0 if count is None else intervals - int(count)
    real = known[start:]
    steps = real[1:] - real[:-1]
    increasing = bool(steps[0] > 0)
    wrong = ~(steps > 0) if increasing else ~(steps < 0)
    if n_steps is not None and count is None:
        wrong = ~(steps <= 0)  # repeats may be padding
    if wrong.any():
        i = int(wrong.argmax()) + start
        raise ValueError(
            f"times must decrease strictly; got times[{i + 1}] = {known[i + 1]} after {known[i]}. "
            "Build it with diffjax.grids, or pass n_steps= if it is padded in front."
        )
    end_sigma = checks.evaluated(lambda: process.coeffs(jnp.asarray(known[-1])).sigma)
    final.check(solver, end_sigma, increasing)
    if hasattr(denoise, "check_times"):
        denoise.check_times(known[:-1])


def _check_noisy_end(solver: Solver, process: Process, x: PyTree, times: Array) -> None:
    """Raises what `init` does at the noisiest time: where none can start, none can arrive."""
    known = checks.concrete(times)
    if known is not None:
        with jax.ensure_compile_time_eval():
            noisy = jnp.asarray(max(known[0], known[-1]))
        jax.eval_shape(lambda x: solver.init(process, x, noisy), x)


def _check_when_run(times: Array, n_steps: int | Array) -> None:
    """Leaves debug checks of a grid or a number of steps whose values are not known yet."""
    intervals = times.shape[0] - 1
    checkify.debug_check(
        (jnp.asarray(n_steps) >= 1) & (n_steps <= intervals),
        "n_steps must lie in [1, {intervals}], the intervals of the padded grid; got {n_steps}.",
        intervals=jnp.asarray(intervals),
        n_steps=jnp.asarray(n_steps),
    )
    steps, padding = jnp.diff(times), jnp.arange(intervals) < intervals - n_steps
    checkify.debug_check(
        jnp.all((steps < 0) | padding) | jnp.all((steps > 0) | padding),
        "times must decrease strictly (or increase, to invert); got {times}. Build it with "
        "diffjax.grids, or pass n_steps= if it is padded in front.",
        times=times,
    )
