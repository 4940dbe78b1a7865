"""The mesh of a config, and how a training state lies on it.

    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}         devices along each axis; -1: the rest

Two optional fields say how the state is split; see `diffjax.train.sharding`:

    rules       pairs of a pattern for names of parameters and an axis, or None, for each of theirs:
                (("fc1/kernel$", (None, "tensor")),)
    min_size    elements from which on a parameter is split over "fsdp"
"""

from typing import Any

from jax.sharding import Mesh, PartitionSpec

from diffjax.builders.make import BuildError, frozen
from diffjax.builders.model import Parts
from diffjax.core.types import PyTree

_SPLIT = ("rules", "min_size")  # the fields of `state_sharding`; the others are `make_mesh`'s


def _section(config: Any) -> dict[str, Any]:
    return dict(dict(config).get("mesh", {}))  # configs of older runs have none


def build_mesh(config: Any, devices: Any = None) -> Mesh:
    """The mesh of config.mesh over `devices`, by default all. Raises BuildError."""
    from diffjax.train import mesh

    axes = {name: size for name, size in _section(config).items() if name not in _SPLIT}
    if unknown := axes.keys() - set(mesh.AXES):
        raise BuildError(
            f"config.mesh has the fields {', '.join((*mesh.AXES, *_SPLIT))}; got {sorted(unknown)}."
        )
    try:
        return mesh.make_mesh(devices, **axes)
    except ValueError as error:
        raise BuildError(f"config.mesh: {error}") from error


def build_sharding(config: Any, devices: Mesh, state: PyTree) -> PyTree:
    """Where each leaf of a `TrainState` lies, as a tree like it. Raises BuildError.

    state: arrays, or what `jax.eval_shape` returns.
    """
    from diffjax.train import sharding

    given = {name: frozen(value) for name, value in _section(config).items() if name in _SPLIT}
    try:
        if "rules" in given:
            given["rules"] = tuple((name, PartitionSpec(*axes)) for name, axes in given["rules"])
        return sharding.state_sharding(devices, state, **given)
    except (TypeError, ValueError) as error:
        raise BuildError(f"config.mesh: {error}") from error


def build_fetching(parts: Parts, layout: PyTree) -> Parts:
    """The parts to train with: a network that loops over its blocks fetches each one's weights.

    layout: of the parameters, of `build_sharding`. Other networks are left as they are.
    """
    from diffjax.train.sharding import around_layer

    around = around_layer(layout) if hasattr(parts.net, "around") else None
    return parts if around is None else parts._replace(net=parts.net.clone(around=around))
