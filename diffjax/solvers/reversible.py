"""Gradients through a solve by running it backwards, with memory that does not grow with steps.

Symbols: theta all that a step depends on (weights, process, solver, times), S_i the solver's state
after i steps, step_i the map S_i -> S_(i+1), undo_i its inverse, c_i the cotangent of S_i.

    S_i                  = undo_i(S_(i+1))                                                     (1)
    (c_i, d_i theta)     = vjp of step_i at S_i, applied to c_(i+1)                            (2)
    gradient of theta    = sum over i of d_i theta                                             (3)

Plain reverse mode keeps the inner values of the denoiser of every step. Here only the last state is
kept, and (1) gives the others as they are needed: the memory of one step whatever their number, for
one call of the denoiser more a step at most. Where `undo` asks it what the step asks, as BDIA-DDIM
does, the compiler makes one call of the two, and the cost is that of plain reverse mode.

The solver must have `undo(denoise, process, state, t, s, r) -> State` and draw nothing:
`diffjax.solvers.bdia`. The states of (1) carry rounding, so the gradient does too; with gamma < 1
it grows as in eq. (5) there, and too many steps raise.

References:
[1] Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network: Backpropagation Without Storing
    Activations", 2017, https://arxiv.org/abs/1707.04585.
[2] Zhang, Lewis, Kleijn, "On Exact Bit-level Reversible Transformers Without Changing
    Architectures", 2024, https://arxiv.org/abs/2407.09093 (BDIA in training).
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import random
from diffjax.core.numerics import at_least_float32, batch_size
from diffjax.core.types import Array, DenoiseFn, Key, PyTree
from diffjax.processes.base import Process
from diffjax.solvers.base import Final, Solver, ToEnd, calls
from diffjax.solvers.driver import Result, check_solve, result


class Reversible(Solver, Protocol):
    """A solver whose steps have inverses; see the module's docstring."""

    def undo(
        self, denoise: DenoiseFn, process: Process, state: Any, t: Array, s: Array, r: Array
    ) -> Any: ...

    def check_inverse(self, times: Array, dtype: Any, max_error: float) -> None: ...


def sample_reversible(
    key: Key,
    denoise: DenoiseFn,
    x: PyTree,
    times: Array,
    *,
    solver: Reversible,
    process: Process,
    final: Final = ToEnd(),
    max_error: float = 1e-3,
) -> Result:
    """`sample`, with the same result, and reverse-mode gradients by eqs. (1) to (3).

    Gradients reach x, the times, and every number in `denoise`, `process` and `solver`, also those
    that a plain callable closes over. Forward mode is not defined.

    The arguments are those of `sample`, but for `n_steps`, `save` and `state`. max_error: as of
    `diffjax.solvers.bdia.invert`.

    Raises what `sample` does, TypeError for a solver without `undo`, and ValueError where rounding
    on the way back would exceed max_error.
    """
    if not hasattr(solver, "undo"):
        raise TypeError(
            f"{type(solver).__name__} has no inverse step (undo), so its states cannot be found "
            "again. Use BDIADDIM() or BDIAEDM(), or `sample`."
        )
    x, times = at_least_float32(x), jnp.asarray(times)
    check_solve(denoise, times, solver, process, final)
    solver.check_inverse(times, jnp.result_type(*jax.tree.leaves(x)), max_error)
    keys = random.sample_keys(key, batch_size(x))
    state = solver.init(process, x, times[0])
    intervals = times.shape[0] - 1
    stepped = intervals if final.steps else intervals - 1
    if stepped:
        state = _solve((denoise, process, solver), state, times[: stepped + 1])
    last_keys = random.step_keys(keys, intervals - 1)
    state = final.end(solver, last_keys, denoise, process, state, times[-2], times[-1])
    return result(denoise, state, calls(solver, final, intervals))


def _solve(parts: tuple[DenoiseFn, Process, Reversible], state: Any, times: Array) -> Any:
    """The state after a step for every interval of `times`, with the gradient of eqs. (1)-(3)."""
    numbers, rebuild = _split(parts)

    def step(numbers, state, t, s):
        denoise, process, solver = rebuild(numbers)
        return solver.step(None, denoise, process, state, t, s)

    def undo(numbers, state, t, s, r):
        denoise, process, solver = rebuild(numbers)
        return solver.undo(denoise, process, state, t, s, r)

    # What a plain callable closes over becomes an argument: gradients go through arguments only.
    t = times[0]
    step, of_step = jax.closure_convert(step, numbers, state, t, t)
    undo, of_undo = jax.closure_convert(undo, numbers, state, t, t, t)
    run = _with_gradient(
        lambda hidden, numbers, state, t, s: step(numbers, state, t, s, *hidden[0]),
        lambda hidden, numbers, state, t, s, r: undo(numbers, state, t, s, r, *hidden[1]),
    )
    return run((of_step, of_undo), numbers, state, times)


def _with_gradient(step: Callable[..., Any], undo: Callable[..., Any]) -> Callable[..., Any]:
    """(hidden, numbers, state, times) -> state, its gradient by running backwards."""

    @jax.custom_vjp
    def run(hidden, numbers, state, times):
        def body(state, pair):
            return step(hidden, numbers, state, *pair), None

        return jax.lax.scan(body, state, (times[:-1], times[1:]))[0]

    def forward(hidden, numbers, state, times):
        end = run(hidden, numbers, state, times)
        return end, (hidden, numbers, end, times)

    def backward(kept, cotangent):
        hidden, numbers, end, times = kept
        floats, merge = _floats((hidden, numbers))

        def body(carry, at):
            state, cotangent, total = carry
            before = undo(hidden, numbers, state, *at)
            _, pull = jax.vjp(
                lambda floats, state, t, s: step(*merge(floats), state, t, s),
                floats,
                before,
                *at[:2],
            )
            share, cotangent, d_t, d_s = pull(cotangent)
            return (before, cotangent, jax.tree.map(jnp.add, total, share)), (d_t, d_s)

        earlier = jnp.concatenate([times[:1], times[:-2]])  # of the first step, its own start
        start = end, cotangent, jax.tree.map(jnp.zeros_like, floats)
        (_, cotangent, total), (d_t, d_s) = jax.lax.scan(
            body, start, (times[:-1], times[1:], earlier), reverse=True
        )
        d_times = jnp.zeros_like(times).at[:-1].add(d_t).at[1:].add(d_s)
        return *_as_cotangents(total, (hidden, numbers)), cotangent, d_times

    run.defvjp(forward, backward)
    return run


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (bool, int, float, np.ndarray, np.generic, jax.Array))


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _split(tree: PyTree) -> tuple[list[Any], Callable[[list[Any]], PyTree]]:
    """The numbers among the leaves, and the tree again from others in their place.

    A leaf that is no number is a plain callable, which stays as it is.
    """
    leaves, treedef = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if _is_number(leaf)]

    def rebuild(numbers):
        filled = list(leaves)
        for i, number in zip(where, numbers, strict=True):
            filled[i] = number
        return jax.tree.unflatten(treedef, filled)

    return [jnp.asarray(leaves[i]) for i in where], rebuild


def _floats(tree: PyTree) -> tuple[list[Any], Callable[[list[Any]], PyTree]]:
    """The floating-point leaves, and the tree again from others in their place."""
    leaves, treedef = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]

    def merge(floats):
        filled = list(leaves)
        for i, leaf in zip(where, floats, strict=True):
            filled[i] = leaf
        return jax.tree.unflatten(treedef, filled)

    return [leaves[i] for i in where], merge


def _as_cotangents(floats: list[Any], like: PyTree) -> PyTree:
    """`floats` in the places of the floating-point leaves of `like`, None in the others."""
    given = iter(floats)
    return jax.tree.map(lambda leaf: next(given) if _is_float(leaf) else None, like)
