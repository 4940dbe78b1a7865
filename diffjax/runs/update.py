"""The update of a config on a mesh: what training runs, and what `plan` compiles."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from diffjax import builders
from diffjax.core.types import Array, Key
from diffjax.runs import divergence, init_from


class Update(NamedTuple):
    """create: (key, leaves of other weights by name) -> the state before the first update. like:
    such a state's shapes and dtypes with the places of its leaves. loss_fn, step_fn: as of
    `train.step.compile_step`.
    """

    create: Any
    like: Any
    loss_fn: Any
    step_fn: Any


def build_update(config: Any, parts: builders.Parts, devices: Mesh) -> Update:
    """The update, not yet traced. Raises BuildError for a config that does not fit the mesh."""
    from diffjax.train import mesh, state, step

    optimizer, schedule = builders.build_optimizer(config)
    averages = builders.build_ema(config)
    mesh.check_batch_size(devices, config.training.batch_size)
    accumulate = builders.build_accumulate(config, mesh.batch_slices(devices))
    create = functools.partial(initial_state, parts, optimizer, tuple(averages))
    shapes = jax.eval_shape(create, jax.random.key(config.seed))
    layout = builders.build_sharding(config, devices, shapes)
    layout = builders.build_offload(config, layout)
    fetching = builders.build_fetching(parts, layout.params)
    loss_fn = builders.build_loss(config, fetching, train=True)
    step_fn = step.compile_step(
        devices,
        loss_fn=loss_fn,
        optimizer=optimizer,
        ema=averages,
        schedule=schedule,
        accumulate=accumulate,
        prepare=builders.build_prepare(config),
        probes=builders.build_probes(config),
        skip_bad=divergence.build_policy(config).name == "skip",
        state_sharding=layout,
    )
    return Update(create, state.abstract(shapes, layout), loss_fn, step_fn)


def initial_state(
    parts: builders.Parts,
    optimizer: Any,
    tracks: tuple[str, ...],
    key: Key,
    leaves: Mapping[str, Array] = {},
) -> Any:
    """The state before the first update; `leaves` take the places of those of their names."""
    from diffjax.train import state

    params_key, run_key = jax.random.split(key)
    params = init_from.replaced(parts.init_params(params_key), leaves)
    return state.create_state(run_key, params, optimizer, tracks=tracks)
