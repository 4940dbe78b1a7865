"""Batches over all devices of this process: one program on all of them, each with its own rows.

Where the weights lie says where a batch goes. Weights on a mesh of `train.mesh` send its rows over
"data" and "fsdp"; weights on one device, as a user's own, keep it there.

What is computed for each row alone (a solve, a likelihood, features) needs no other device: with
whole weights on each the loop of a sampler over a grid moves nothing. An adaptive solve asks after
each step whether any sample is still running, one bit. Weights that are split over "fsdp" are
fetched in each call of the network and let go again; over "tensor" they stay, and the network's
sums over channels are sums over devices.

A row's figure does not depend on the other rows, so padding and the number of devices do not show
in it, but for rounding: a network of fewer rows on a device may add in another order.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax import builders
from diffjax.core.pytree import replace, taken
from diffjax.core.types import PyTree
from diffjax.prediction import Denoiser
from diffjax.runs.workdir import RunError
from diffjax.train.mesh import AXES, FSDP, batch_sharding, batch_slices, make_mesh, replicated
from diffjax.train.sharding import fetched


def local_mesh(**axes: int) -> Mesh:
    """A mesh of this process's devices. axes: of `make_mesh`, by default all along "data".

    Raises RunError for axes that there are not, or that do not fit the devices.
    """
    unknown = axes.keys() - set(AXES)
    if unknown:
        raise RunError(f"A mesh has the axes {', '.join(AXES)}; got {sorted(unknown)}.")
    try:
        return make_mesh(jax.local_devices(), **axes)
    except ValueError as error:
        raise RunError(f"The mesh of this process: {error}") from error


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh on which a tree lies; None where it lies on one device or reaches other processes'.

    A mesh is one of `make_mesh`; arrays on another kind of mesh stay as they are.
    """
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.is_fully_addressable:
            mesh = sharding.mesh
            return mesh if isinstance(mesh, Mesh) and mesh.axis_names == AXES else None
        return None
    return None


def padded(mesh: Mesh | None, rows: int) -> int:
    """So many rows up to a multiple of the slices of a batch."""
    slices = 1 if mesh is None else batch_slices(mesh)
    return -(-rows // slices) * slices


def filled(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Arrays (B, ...) with repeats of the last row up to what the mesh splits."""
    num = len(jax.tree.leaves(tree)[0])
    index = np.minimum(np.arange(padded(mesh, num)), num - 1)
    return tree if len(index) == num else jax.tree.map(lambda leaf: leaf[index], tree)


def placed(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Arrays (B, ...) with their rows over the mesh; a copy on each device where B does not split.

    None for the mesh leaves them as they are.
    """
    if mesh is None:
        return tree

    def where(leaf: Any) -> NamedSharding:
        return batch_sharding(mesh) if len(leaf) % batch_slices(mesh) == 0 else replicated(mesh)

    return jax.tree.map(lambda leaf: jax.device_put(leaf, where(leaf)), tree)


def placed_each(mesh: Mesh | None, value: Any, rows: int) -> Any:
    """A solver or a guide of a batch of so many samples: what it holds for each of them, `placed`.

    That is what its `take` gathers. The rest stays as it is, and JAX copies it where it is needed.
    """
    if mesh is None or not hasattr(value, "take"):
        return value
    more = jax.eval_shape(lambda value: taken(value, np.zeros(rows + 1, np.int32)), value)
    return jax.tree.map(
        lambda leaf, other: leaf if np.shape(leaf) == other.shape else placed(mesh, leaf),
        value,
        more,
    )


def over_rows(mesh: Mesh | None, call: Callable[..., PyTree], *rows: PyTree) -> PyTree:
    """`call(*rows)` of what depends on each row alone, with the rows over the mesh.

    rows: trees of arrays (B, ...) or None. Returns NumPy arrays (B, ...).
    """
    num = len(jax.tree.leaves(rows)[0])
    found = call(*placed(mesh, filled(mesh, rows)))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:num], found)


@dataclasses.dataclass(frozen=True)
class _Fetched:
    """`apply` of split weights, equal for equal ones. where: a sharding a leaf of `tree`."""

    apply: Callable[..., Any]
    tree: Any
    where: tuple[NamedSharding, ...]

    def __call__(self, variables: PyTree, *inputs: Any) -> Any:
        layout = jax.tree.unflatten(self.tree, self.where)
        # Else what one call fetched would be kept for the next, or for the whole loop.
        variables, inputs = jax.lax.optimization_barrier((variables, inputs))
        return fetched(self.apply, layout)(variables, *inputs)


@dataclasses.dataclass(frozen=True)
class _FetchedLayer:
    """What a network that loops over a stack of layers wraps each of them in."""

    tree: Any
    where: tuple[NamedSharding, ...]

    def __call__(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        return _Fetched(layer, self.tree, self.where)


def denoiser(parts: builders.Parts, params: PyTree, cond: PyTree) -> Denoiser:
    """`parts.denoiser`; weights that are split over "fsdp" are fetched in each call.

    So the weights travel and never the activations; see `train.sharding.fetched`.
    """
    mesh = mesh_of(params)
    if mesh is None or mesh.shape[FSDP] == 1:
        return parts.denoiser(params, cond)
    if hasattr(parts.net, "around") and "stack" in params:
        leaves, tree = jax.tree.flatten(params["stack"])
        each = tuple(NamedSharding(mesh, PartitionSpec(*w.sharding.spec[1:])) for w in leaves)
        parts = parts._replace(net=parts.net.clone(around=_FetchedLayer(tree, each)))
    plain = parts.denoiser(params, cond)
    leaves, tree = jax.tree.flatten(plain.variables)
    where = tuple(leaf.sharding for leaf in leaves)
    return replace(plain, apply=_Fetched(plain.apply, tree, where))


def on_local_devices(tree: PyTree) -> PyTree:
    """Arrays of one mesh with a whole copy on each device of this process, on `local_mesh`.

    All processes must call it together. Nothing is copied twice.
    """
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    whole, local = jax.device_put(tree, replicated(mesh)), replicated(local_mesh())

    def here(leaf: jax.Array) -> jax.Array:
        parts = {shard.device: shard.data for shard in leaf.addressable_shards}
        devices = list(local.mesh.devices.flat)
        if parts.keys() != set(devices):  # a mesh without some of the devices
            return jax.device_put(leaf.addressable_data(0), local)
        own = [parts[device] for device in devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, local, own)

    return jax.tree.map(here, whole)
