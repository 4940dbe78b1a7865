"""Several processes, one result: who does which batch, and how the parts come together.

Process p of P does the batches p, p + P, p + 2 P, ... of a sequence. Batch k is a function of its
number alone, so the union is what one process would have done. The parts are exchanged in memory,
by `jax.experimental.multihost_utils`, and every process then holds the whole. With one process
nothing is exchanged.

Each call here that exchanges must be made by all processes, in the same order: what decides whether
it is made (a file that is there or not) is settled by `all_agree` first.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffjax.core.types import PyTree


def index() -> int:
    """p, this process."""
    return jax.process_index()


def count() -> int:
    """P, all processes."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process writes what there is one of."""
    return index() == 0


def share(batches: int) -> range:
    """The numbers of this process's batches, of so many."""
    return range(index(), batches, count())


def exchange(part: PyTree) -> list[PyTree]:
    """Each process's part, in the order of the processes. part: arrays of the same shapes in all.

    Arrays are 32 bits wide at most where JAX's are.
    """
    part = jax.tree.map(np.asarray, part)
    if count() == 1:
        return [part]
    from jax.experimental import multihost_utils

    stacked: Any = multihost_utils.process_allgather(part)
    return [jax.tree.map(lambda leaf, p=p: np.asarray(leaf[p]), stacked) for p in range(count())]


def all_agree(here: bool) -> bool:
    """Whether it is so in every process."""
    return all(bool(there) for there in exchange(np.asarray(here)))


def in_order(own: Sequence[np.ndarray], batches: int) -> np.ndarray:
    """The rows of all batches in the order of their numbers.

    own: the rows of each batch of `share(batches)`. All batches but the last have as many rows.
    """
    if count() == 1:
        return np.concatenate(own)
    # A process may have no batch: the first has one, and so knows a row's shape.
    first = exchange(_shape(own))[0]
    dtype = np.dtype(f"{chr(first[0])}{first[1]}")
    rows, shape = int(first[2]), tuple(int(n) for n in first[4 : 4 + int(first[3])])
    each = -(-batches // count())
    buffer = np.zeros((each, rows, *shape), dtype)
    counts = np.zeros(each, np.int32)
    for i, array in enumerate(own):
        buffer[i, : len(array)], counts[i] = array, len(array)
    parts = exchange((buffer, counts))
    found = []
    for k in range(batches):
        block, known = parts[k % len(parts)]
        place = k // len(parts)
        found.append(block[place, : known[place]])
    return np.concatenate(found)


def _shape(own: Sequence[np.ndarray]) -> np.ndarray:
    """Kind and bytes of the dtype, rows and shape of the first batch, as 12 numbers."""
    code = np.zeros(12, np.int32)
    if own:
        array = own[0]
        numbers = [ord(array.dtype.kind), array.dtype.itemsize, len(array), array.ndim - 1]
        numbers += array.shape[1:]
        code[: len(numbers)] = numbers
    return code
