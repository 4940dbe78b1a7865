"""A full batch from a queue: a slot whose sample has arrived takes the next one, in the loop.

Symbols: n samples, B slots, N_i the attempts that sample i needs.

    cost of batches of B, one after the other    sum over batches of B max N_i                   (1)
    cost with refill                             sum of N_i, and the last ones' tail             (2)

A table of n rows is queue and output at once: a row holds the start of a sample until a slot takes
it, and its end once it is written back. The inner loop makes attempts until a slot is free (or,
with an empty queue, until all are); the outer one writes the ends and refills. Rows are read and
written only there, so the loop over attempts costs what it costs for B samples.

A start that costs calls (a first slope, a first step) is made before for all, B at a time: in the
loop, each refill would make the whole batch wait for it. This keeps n starts beside n results in
memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.numerics import select
from diffjax.core.types import Array, PyTree
from diffjax.solvers.adaptive import Progress

Step = Callable[[Progress], Progress]


class _Slots(NamedTuple):
    table: Progress  # (n, ...)
    slots: Progress  # (B, ...)
    whose: Array  # (B,): the row of each slot
    given: Array  # (): rows that have had a slot
    rounds: Array  # (): attempts of the batch


def in_chunks(function: Callable[[Array], PyTree], count: int, size: int) -> PyTree:
    """function(index (size,)) over 0 .. count-1 in chunks, as one tree of (count, ...)."""
    index = jnp.minimum(jnp.arange(-(-count // size) * size), count - 1).reshape(-1, size)
    mapped = jax.lax.map(function, index)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], mapped)


def run_in_slots(
    step_of: Callable[[Array], Step], table: Progress, size: int
) -> tuple[Progress, Array]:
    """Runs every row of the table, `size` at a time: (the table at the end, rounds ()).

    step_of: index (B,) -> the step of those samples. table: (n, ...) with n >= size. At the end
    only what a result needs is that of the end: t, y, accepted and rejected.
    """
    count = table.t.shape[0]
    index = jnp.arange(size)
    start = _Slots(table, _rows(table, index), index, jnp.int32(size), jnp.int32(0))

    def going(state: _Slots) -> Array:
        return jnp.any(state.slots.running) | (state.given < count)

    end = jax.lax.while_loop(going, lambda state: _refill(_attempts(step_of, state)), start)
    return end.table, end.rounds


def _attempts(step_of: Callable[[Array], Step], state: _Slots) -> _Slots:
    """Attempts until a slot is free that the queue can fill, or all are."""
    step, empty = step_of(state.whose), state.given >= state.table.t.shape[0]

    def going(carry):
        running = carry[0].running
        return jnp.any(running) & (empty | jnp.all(running))

    slots, rounds = jax.lax.while_loop(
        going, lambda carry: (step(carry[0]), carry[1] + 1), (state.slots, state.rounds)
    )
    return state._replace(slots=slots, rounds=rounds)


def _refill(state: _Slots) -> _Slots:
    """Writes what has ended to the table and gives its slots to the next rows."""
    count, free = state.table.t.shape[0], ~state.slots.running
    where = jnp.where(free, state.whose, count)  # beyond the table is not written

    def write(rows, slot):
        return jax.tree.map(lambda a, b: a.at[where].set(b, mode="drop"), rows, slot)

    old, new = state.table, state.slots
    table = old._replace(
        t=write(old.t, new.t),
        y=write(old.y, new.y),
        accepted=write(old.accepted, new.accepted),
        rejected=write(old.rejected, new.rejected),
    )
    following = state.given + jnp.cumsum(free, dtype=jnp.int32) - 1
    filled = free & (following < count)
    index = jnp.where(filled, following, state.whose)
    return _Slots(
        table,
        select(filled, _rows(table, index), state.slots),
        index,
        state.given + jnp.sum(filled, dtype=jnp.int32),
        state.rounds,
    )


def _rows(table: Progress, index: Array) -> Progress:
    return jax.tree.map(lambda leaf: leaf[index], table)
