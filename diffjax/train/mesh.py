"""Devices as a mesh of three axes, and batches laid out on it.

    "data"      copies of the state, each with its own slice of the batch
    "fsdp"      slices of the state, each with its own slice of the batch
    "tensor"    slices of the state that share a slice of the batch

With D, F and T devices along them the global batch of B images lies in D F slices of B / (D F), in
the order of the axes. Which part of the state lies where says `sharding`.

Every process brings the rows that its own devices need and no image travels between hosts. A
process's rows are one run of the batch, `batch_share`; where "tensor" spans processes, these bring
the same rows.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax.core.types import PyTree

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)  # the axes over which a batch is split


def make_mesh(
    devices: Sequence[jax.Device] | None = None, *, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """A mesh of `devices` (default: all) with so many along "data", "fsdp" and "tensor".

    One of the three may be -1: it takes the rest of the devices. Without a -1 the first data fsdp
    tensor devices are used. Raises ValueError for sizes that do not fit the devices, and for those
    that leave a process without work or split its devices unevenly.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _shape(len(devices), dict(zip(AXES, (data, fsdp, tensor), strict=True)))
    used = devices[: math.prod(shape)]
    idle = {d.process_index for d in devices} - {d.process_index for d in used}
    if idle:
        raise ValueError(
            f"A mesh of {len(used)} of the {len(devices)} devices leaves the processes "
            f"{sorted(idle)} without one; let one axis be -1, which takes the rest."
        )
    # Explicit axes, JAX's default, would put shardings into the types of every library function.
    kinds = (AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh(shape, AXES, axis_types=kinds, devices=used)
    if any(share is None for share in _shares(mesh.devices).values()):
        # The network's own order of the devices may interleave the processes.
        used = sorted(used, key=lambda d: (d.process_index, d.id))
        mesh = Mesh(np.array(used).reshape(shape), AXES, axis_types=kinds)
    if any(share is None for share in _shares(mesh.devices).values()):
        raise ValueError(
            f"tensor={shape[2]} must divide the devices of each process or be a multiple of them, "
            f"so that each has whole rows of the batch; got {len(used)} devices of "
            f"{len({d.process_index for d in used})} processes."
        )
    return mesh


def _shape(devices: int, sizes: dict[str, int]) -> tuple[int, int, int]:
    """The sizes with the -1 among them replaced. Raises ValueError."""
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    bad = [name for name, size in sizes.items() if not (size == -1 or size >= 1)]
    if bad or list(sizes.values()).count(-1) > 1:
        raise ValueError(
            f"data, fsdp and tensor must be at least 1, at most one of them -1 for the rest of the "
            f"devices; got {given}."
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 not in sizes.values():
        if known > devices:
            raise ValueError(
                f"{given} needs {known} devices and there are {devices}; let one axis be -1, which "
                "takes the rest, or simulate devices on a CPU by "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={known}."
            )
    elif devices % known:
        raise ValueError(
            f"The axes that are not -1 must divide the {devices} devices; got {given}."
        )
    data, fsdp, tensor = (devices // known if s == -1 else s for s in sizes.values())
    return data, fsdp, tensor


class Share(NamedTuple):
    """Number `part` of `parts` equal runs of a batch's rows."""

    part: int
    parts: int


def _shares(devices: np.ndarray) -> dict[int, Share | None]:
    """What each process holds of a batch; None where that is no such run. devices: (D, F, T)."""
    slices = devices.reshape(-1, devices.shape[-1])
    rows: dict[int, list[int]] = {}
    for row, sharing in enumerate(slices):
        for process in {d.process_index for d in sharing}:
            rows.setdefault(process, []).append(row)

    def share(own: list[int]) -> Share | None:
        index, rest = divmod(own[0], len(own))
        whole = rest == 0 and own[-1] - own[0] == len(own) - 1 and len(slices) % len(own) == 0
        return Share(index, len(slices) // len(own)) if whole else None

    return {process: share(own) for process, own in rows.items()}


@functools.lru_cache(maxsize=8)
def batch_share(mesh: Mesh) -> Share:
    """Which rows of a batch this process brings: B / parts, after the first part B / parts.

    mesh: of `make_mesh`, with devices of this process.
    """
    share = _shares(mesh.devices)[jax.process_index()]
    assert share is not None  # make_mesh gives no other
    return share


def batch_slices(mesh: Mesh) -> int:
    """D F, the slices of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Array axis `axis` split over "data" and "fsdp"; 1 where steps are stacked, (n, B, ...)."""
    return NamedSharding(mesh, PartitionSpec(*([None] * axis), BATCH))


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Raises ValueError unless the global batch splits evenly over "data" and "fsdp"."""
    slices = batch_slices(mesh)
    if batch_size % slices:
        below = batch_size // slices * slices
        options = f"{below} or {below + slices}" if below else f"{slices}"
        raise ValueError(
            f"batch_size must be a multiple of the {slices} devices along data and fsdp; got "
            f"{batch_size}. Use {options}, or a mesh of fewer devices."
        )


def global_batch(mesh: Mesh, local: PyTree, axis: int = 0) -> PyTree:
    """Lays this process's NumPy batch out as its part of a global array split along `axis`.

    local: a tree of arrays whose axis `axis` holds the rows of `batch_share`, B / parts. Returns
    arrays whose axis holds B. Raises ValueError where B does not split evenly over the devices.
    """
    sharding, parts = batch_sharding(mesh, axis), batch_share(mesh).parts

    def place(leaf):
        leaf = np.asarray(leaf)
        rows = leaf.shape[axis] * parts
        check_batch_size(mesh, rows)
        whole = (*leaf.shape[:axis], rows, *leaf.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, leaf, whole)

    return jax.tree.map(place, local)


def dispatch_batches(mesh: Mesh, local: Iterable[PyTree], n: int = 1) -> Iterator[PyTree]:
    """Groups of n of this process's NumPy batches, stacked to (n, B, ...) and placed on the mesh.

    Lazy: asking for the next group is what reads and places it. A rest of fewer than n is dropped.
    """
    batches = iter(local)
    while len(group := list(itertools.islice(batches, n))) == n:
        # The stack is a copy, so the reader may use its buffers again while the device reads.
        yield global_batch(mesh, jax.tree.map(lambda *leaves: np.stack(leaves), *group), axis=1)
