"""What a workdir holds of a trained network, onto the devices of this process."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from diffjax import builders
from diffjax.core.types import PyTree
from diffjax.runs.spread import local_mesh
from diffjax.runs.workdir import RunError, read_config


class Restored(NamedTuple):
    """The fields of `Model` and of `TrainedClassifier`."""

    config: Any
    parts: builders.Parts
    params: PyTree
    step: int


def read_weights(
    workdir: str | Path, step: int | None = None, ema: str = "main", mesh: Mesh | None = None
) -> Restored:
    """The averaged weights of a run's checkpoint with their config. Raises as `model.load`."""
    from diffjax.train.checkpoint import Checkpointer
    from diffjax.train.state import TrainState, abstract

    mesh = local_mesh() if mesh is None else mesh
    others = {d.process_index for d in mesh.devices.flat} - {jax.process_index()}
    if others:
        raise RunError(
            f"A model lies on devices of one process; the mesh has some of the processes "
            f"{sorted(others)}. Use diffjax.runs.spread.local_mesh."
        )
    config = read_config(workdir)
    parts = builders.build_parts(config)
    shapes = jax.eval_shape(parts.init_params, jax.random.key(0))
    none: Any = ()
    state = TrainState(step=none, params=shapes, opt_state=none, ema=none, key=none)
    layout = builders.build_sharding(config, mesh, state).params
    with Checkpointer(workdir, writable=False) as checkpointer:
        params, meta = checkpointer.restore_ema(abstract(shapes, layout), step, ema)
    return Restored(config, parts, params, meta.step)
