"""The batches of a run, read ahead and placed on its devices."""

import contextlib
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from diffjax import builders
from diffjax.core.types import PyTree


@contextlib.contextmanager
def groups(config: Any, devices: Mesh, batches: Any, start: int) -> Iterator[Iterator[PyTree]]:
    """Groups of `config.training.n_jitted_steps` batches from update `start` on, for `loop.fit`.

    batches: a sequence, batch k for update k. How far they are read ahead is `config.data`'s
    affair, see `builders.data.Reading`. When this is left, threads and workers have stopped.
    """
    from diffjax.data import placed_ahead, prefetch
    from diffjax.train import mesh

    reading = builders.build_reading(config)
    host = prefetch(batches, start=start, ahead=reading.ahead, workers=reading.workers)
    with contextlib.closing(host):
        placed = mesh.dispatch_batches(devices, host, config.training.n_jitted_steps)
        with contextlib.closing(placed_ahead(placed, reading.placed)) as ready:
            yield ready
