"""Devices as a mesh, and batches laid out on it.

One axis, "data": each device holds the whole state and a slice of the batch. Every process brings
its own slice of the global batch, B / processes images, and no image travels between hosts.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax.core.types import PyTree

DATA = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None, *, data: int | None = None) -> Mesh:
    """A mesh with one axis "data" of `data` devices; all of `devices` (default: all) if None.

    Raises ValueError where there are fewer devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    data = len(devices) if data is None else data
    if not 1 <= data <= len(devices):
        raise ValueError(
            f"data must lie between 1 and the {len(devices)} devices at hand; got {data}."
        )
    # Explicit axes, JAX's default, would put shardings into the types of every library function.
    return jax.make_mesh((data,), (DATA,), axis_types=(AxisType.Auto,), devices=devices[:data])


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Array axis `axis` split over the devices; 1 for batches stacked over steps, (n, B, ...)."""
    return NamedSharding(mesh, PartitionSpec(*([None] * axis), DATA))


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Raises ValueError unless the global batch splits evenly over the devices."""
    devices = mesh.shape[DATA]
    if batch_size % devices:
        below = batch_size // devices * devices
        options = f"{below} or {below + devices}" if below else f"{devices}"
        raise ValueError(
            f"batch_size must be a multiple of the {devices} devices of the mesh; got "
            f"{batch_size}. Use {options}, or a mesh of fewer devices."
        )


def global_batch(mesh: Mesh, local: PyTree, axis: int = 0) -> PyTree:
    """Lays this process's NumPy batch out as its part of a global array split along `axis`.

    local: a tree of arrays whose axis `axis` holds B / processes images. Returns arrays whose axis
    holds B. Raises ValueError where B does not split evenly over the devices.
    """
    sharding = batch_sharding(mesh, axis)

    def place(leaf):
        leaf = np.asarray(leaf)
        check_batch_size(mesh, leaf.shape[axis] * jax.process_count())
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(place, local)


def dispatch_batches(mesh: Mesh, local: Iterable[PyTree], n: int = 1) -> Iterator[PyTree]:
    """Groups of n of this process's NumPy batches, stacked to (n, B, ...) and placed on the mesh.

    Lazy: asking for the next group is what reads and places it. A rest of fewer than n is dropped.
    """
    batches = iter(local)
    while len(group := list(itertools.islice(batches, n))) == n:
        # The stack is a copy, so the reader may use its buffers again while the device reads.
        yield global_batch(mesh, jax.tree.map(lambda *leaves: np.stack(leaves), *group), axis=1)
