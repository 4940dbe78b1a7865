"""The train step and the sampler of a config as programs of shapes: traced, and lowered.

Nothing here holds an array of the model's size: arguments are `ShapeDtypeStruct`s. A mesh may be
abstract, where only shapes of shards are asked for.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from diffjax import builders
from diffjax.core.types import PyTree
from diffjax.processes import prior
from diffjax.runs import spread
from diffjax.runs.counting import size_of
from diffjax.runs.update import build_update, initial_state
from diffjax.runs.workdir import RunError
from diffjax.solvers import AdaptiveFlow, Solver, sample, sample_with_restarts
from diffjax.solvers.base import calls
from diffjax.solvers.restart import restart_path
from diffjax.train.state import TrainState, abstract

What = Literal["train", "sample"]
Axes = Mapping[str, int]


def abstract_mesh(axes: Axes) -> AbstractMesh:
    """A mesh without devices."""
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def train_state(config: Any, parts: builders.Parts) -> Any:
    """The shapes of a training state."""
    optimizer, _ = builders.build_optimizer(config)
    tracks = tuple(builders.build_ema(config))
    create = functools.partial(initial_state, parts, optimizer, tracks)
    return jax.eval_shape(create, jax.random.key(0))


def train_batch(config: Any, parts: builders.Parts, size: int) -> dict[str, Any]:
    """The shapes of a batch of `size` images as the pipeline delivers it."""
    batch = {"image": jax.ShapeDtypeStruct((size, *parts.image_shape), jnp.uint8)}
    if parts.num_classes is not None or builders.is_classifier(config):
        batch["label"] = jax.ShapeDtypeStruct((size,), jnp.int32)
    return batch


def gradient(config: Any, parts: builders.Parts, size: int) -> Any:
    """The jaxpr of the gradient of a batch's mean loss. Its results are the gradients."""
    loss_fn = builders.build_loss(config, parts, train=True)

    def objective(params, key, batch):
        return jnp.mean(loss_fn(params, key, batch)[0])

    arguments = (train_state(config, parts).params, _key(), train_batch(config, parts, size))
    return jax.make_jaxpr(jax.grad(objective))(*arguments).jaxpr


def sampler(config: Any, parts: builders.Parts, size: int) -> Any:
    """The jaxpr of drawing a batch of `size` images."""
    solve = _solve(config, parts)

    def draw(params, keys, *labels):
        return solve(parts.denoiser(params, *labels), keys)

    return jax.make_jaxpr(draw)(*sample_arguments(config, parts, size)).jaxpr


def sampler_calls(config: Any, parts: builders.Parts) -> int:
    """How often drawing a batch calls the network."""
    plan, solver = _on_a_grid(config, parts)
    intervals = plan.times.shape[0] - 1
    if plan.restarts:
        intervals = restart_path(plan.times, plan.restarts).start.shape[0]
    return int(calls(solver, plan.final, intervals))


def sample_layout(config: Any, params: PyTree, mesh: Any) -> PyTree:
    """Where the parameters of a sampler lie. mesh: of devices, or abstract."""
    none: Any = ()
    state = TrainState(step=none, params=params, opt_state=none, ema=none, key=none)
    return builders.build_sharding(config, mesh, state).params


def lower(config: Any, what: What, mesh: Mesh) -> Any:
    """The program as training or sampling runs it on a mesh of devices, lowered.

    The batch is config.training.batch_size or config.eval.batch_size.
    """
    parts = builders.build_parts(config)
    if what == "train":
        return _lower_step(config, parts, mesh)
    from diffjax.train.mesh import batch_sharding

    rows = batch_sharding(mesh)
    params, *given = sample_arguments(config, parts, config.eval.batch_size)
    params = abstract(params, sample_layout(config, params, mesh))
    keys, *labels = abstract(given, [rows] * len(given))
    denoise = spread.denoiser(parts, params, labels[0] if labels else None)
    return jax.jit(_solve(config, parts), out_shardings=rows).lower(denoise, keys)


def _lower_step(config: Any, parts: builders.Parts, mesh: Mesh) -> Any:
    made = build_update(config, parts, mesh)
    n = config.training.n_jitted_steps
    batches = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape), leaf.dtype),
        train_batch(config, parts, config.training.batch_size),
    )
    return made.step_fn.lower(made.like, batches)


def _on_a_grid(config: Any, parts: builders.Parts) -> tuple[builders.Sampling, Solver]:
    """How the config samples. Raises RunError for a solver that has no number of steps."""
    plan = builders.build_sampling(config, parts.process)
    if isinstance(plan.solver, AdaptiveFlow):
        raise RunError(
            "An adaptive sampler chooses its number of steps as it goes: there is no plan of it. "
            "Name a solver of a grid, such as --config.sampling.solver.name=heun."
        )
    return plan, plan.solver


def _solve(config: Any, parts: builders.Parts) -> Any:
    """(denoiser, keys) -> images of a batch."""
    plan, solver = _on_a_grid(config, parts)
    restarting = functools.partial(sample_with_restarts, restarts=plan.restarts)

    def solve(denoise, keys):
        x = prior(keys, parts.process, (keys.shape[0], *parts.image_shape))
        found = (restarting if plan.restarts else sample)(
            keys,
            denoise,
            x,
            plan.times,
            solver=solver,
            process=parts.process,
            final=plan.final,
        )
        return parts.quantisation.from_model(found.x)

    return solve


def sample_arguments(config: Any, parts: builders.Parts, size: int) -> tuple[Any, ...]:
    """The shapes of what the sampler takes: parameters, keys and, if there are any, labels."""
    params = jax.eval_shape(parts.init_params, jax.random.key(0))
    labels = () if parts.num_classes is None else (jax.ShapeDtypeStruct((size,), jnp.int32),)
    return (params, jax.ShapeDtypeStruct((size,), _key().dtype), *labels)


def _key() -> Any:
    return jax.eval_shape(jax.random.key, 0)


def shard_bytes(shapes: PyTree, layout: PyTree) -> int:
    """The bytes of one device's part of a tree of shapes. layout: a tree of `NamedSharding`."""

    def part(leaf: Any, sharding: NamedSharding) -> int:
        shape = sharding.shard_shape(leaf.shape)
        return size_of(jax.ShapeDtypeStruct(shape, leaf.dtype))

    return sum(jax.tree.leaves(jax.tree.map(part, shapes, layout)))


def with_batch(config: Any, what: What, batch_size: int) -> Any:
    """A copy of the config with another batch to train or to sample."""
    config = copy.deepcopy(config)
    with config.unlocked():
        if what == "train":
            config.training.batch_size = batch_size
        else:
            config.eval.batch_size = batch_size
    return config


def batch_size(config: Any, what: What) -> int:
    """The images of a batch to train or to sample."""
    return config.training.batch_size if what == "train" else config.eval.batch_size
