"""The train step and the sampler of a config as programs of shapes: traced, lowered, compiled.

Nothing here holds an array of the model's size: arguments are `ShapeDtypeStruct`s. A mesh may be
abstract, where only shapes of shards are asked for.

A program is compiled for the devices of this process where they suffice, for a slice of a TPU pod
by libtpu's description of it where libtpu is installed, and else by another process with simulated
CPU devices. There are at most `SIMULATED` of these; a larger mesh is compiled with fewer devices
along "data", then "fsdp", at the same batch a device, so that what a device does stays as it is.
"""

import copy
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from ml_collections import ConfigDict

from diffjax import builders
from diffjax.core.types import PyTree
from diffjax.processes import prior
from diffjax.runs import programs
from diffjax.runs.counting import size_of
from diffjax.runs.update import build_update, initial_state
from diffjax.runs.workdir import RunError, plain
from diffjax.solvers import AdaptiveFlow, sample

What = Literal["train", "sample"]
Axes = Mapping[str, int]

SIMULATED = 64

# What libtpu calls the chips, and the dimensions of their torus.
_TOPOLOGIES = {"tpu-v4": ("v4", 3), "tpu-v5e": ("v5e", 2), "tpu-v5p": ("v5p", 3)}
_TOPOLOGIES["tpu-v6e"] = ("v6e", 2)


class Compiled(NamedTuple):
    """What one device of a compiled program does. axes: of the mesh that it was compiled for."""

    backend: str
    axes: dict[str, int]
    memory: programs.Memory
    flops: float
    instructions: int
    collectives: tuple[programs.Collective, ...]


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
    return jax.make_jaxpr(_draw(config, parts))(*sample_arguments(config, parts, size)).jaxpr


def lower(config: Any, what: What, mesh: Mesh) -> Any:
    """The program as training or sampling runs it on a mesh of devices, lowered.

    The batch is config.training.batch_size or config.eval.batch_size.
    """
    parts = builders.build_parts(config)
    if what == "train":
        return _lower_step(config, parts, mesh)
    from diffjax.train.mesh import batch_sharding, replicated

    arguments = sample_arguments(config, parts, config.eval.batch_size)
    layouts = (replicated(mesh), *[batch_sharding(mesh)] * (len(arguments) - 1))
    draw = jax.jit(_draw(config, parts), in_shardings=layouts, out_shardings=batch_sharding(mesh))
    return draw.lower(*arguments)


def _lower_step(config: Any, parts: builders.Parts, mesh: Mesh) -> Any:
    made = build_update(config, parts, mesh)
    n = config.training.n_jitted_steps
    batches = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape), leaf.dtype),
        train_batch(config, parts, config.training.batch_size),
    )
    return made.step_fn.lower(made.like, batches)


def _draw(config: Any, parts: builders.Parts) -> Any:
    plan = builders.build_sampling(config, parts.process)
    solver = plan.solver
    if isinstance(solver, AdaptiveFlow):
        raise RunError(
            "An adaptive sampler chooses its number of steps as it goes: there is no plan of it. "
            "Name a solver of a grid, such as --config.sampling.solver.name=heun."
        )

    def draw(params, keys, *labels):
        x = prior(keys, parts.process, (keys.shape[0], *parts.image_shape))
        found = sample(
            keys,
            parts.denoiser(params, *labels),
            x,
            plan.times,
            solver=solver,
            process=parts.process,
            final=plan.final,
        )
        return parts.quantisation.from_model(found.x)

    return draw


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


def compile_for(config: Any, what: What, axes: Axes, chip: str) -> Compiled:
    """Compiles the program for a mesh, where and how the module's docstring says.

    axes: sizes along "data", "fsdp" and "tensor". chip: a name in `chips.CHIPS`. Raises RunError
    where compiling fails.
    """
    devices = math.prod(axes.values())
    topology = _topology(chip, devices)
    if topology is not None:
        return compile_on(topology, config, what, axes)
    if len(jax.devices()) >= devices:
        return compile_on(jax.devices(), config, what, axes)
    small = shrunk(axes)
    rows = batch_size(config, what) // (axes["data"] * axes["fsdp"])
    rows *= small["data"] * small["fsdp"]
    return _compile_elsewhere(with_batch(config, what, rows), what, small)


def shrunk(axes: Axes, limit: int = SIMULATED) -> dict[str, int]:
    """A mesh of at most `limit` devices: fewer along "data", then "fsdp", then "tensor"."""
    small = dict(axes)
    for name in ("data", "fsdp", "tensor"):
        while math.prod(small.values()) > limit and small[name] > 1:
            small[name] = next(
                (n for n in range(small[name] // 2, 1, -1) if small[name] % n == 0), 1
            )
    return small


def compile_on(devices: Any, config: Any, what: What, axes: Axes) -> Compiled:
    """Compiles the program for some of these devices, which need not exist."""
    from diffjax.train.mesh import make_mesh

    mesh = make_mesh(devices, **axes)
    compiled = lower(config, what, mesh).compile()
    text = compiled.as_text()
    return Compiled(
        devices[0].platform,
        dict(axes),
        programs.memory(compiled),
        programs.flops(compiled),
        programs.instructions(text),
        programs.collectives(text, mesh.size),
    )


def _topology(chip: str, devices: int) -> Any:
    """The devices of a slice of a TPU pod; None where libtpu is missing or does not know it."""
    if chip not in _TOPOLOGIES or importlib.util.find_spec("libtpu") is None:
        return None
    from jax.experimental import topologies

    name, dimensions = _TOPOLOGIES[chip]
    shape = torus(devices, dimensions)
    options: dict[str, Any] = {"topology_name": f"{name}:{'x'.join(map(str, shape))}"}
    if devices < 4:  # less than a host of 2 x 2 chips
        options["chips_per_host_bounds"] = (*shape, 1)[:3]
    if name == "v4":
        options["chip_config_name"] = "megacore"  # its two cores as one device
    # Without this libtpu asks a metadata server that only a TPU's host has.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", **options).devices
    except (RuntimeError, ValueError, NotImplementedError):
        return None


def torus(chips: int, dimensions: int) -> tuple[int, ...]:
    """The most even shape of so many chips, largest side first: 32 in three are 4 x 4 x 2."""
    if dimensions == 1:
        return (chips,)
    ideal = round(chips ** (1 / dimensions))
    side = max(n for n in range(1, ideal + 1) if chips % n == 0)
    return tuple(sorted((side, *torus(chips // side, dimensions - 1)), reverse=True))


def _compile_elsewhere(config: Any, what: What, axes: Axes) -> Compiled:
    """Compiles in a process of its own, with as many simulated devices as the mesh has."""
    count = math.prod(axes.values())
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={count}")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    request = {"config": plain(config), "what": what, "axes": dict(axes)}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "diffjax.runs.dryrun", str(asked), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise RunError(
                f"Compiling for {count} simulated devices failed: {lines[-1]} Use --nocompile for "
                "the figures of the model alone."
            )
        return from_json(json.loads(answer.read_text(encoding="utf-8")))


def to_json(found: Compiled) -> dict[str, Any]:
    """Plain values; `from_json` makes them a `Compiled` again."""
    return found._asdict() | {
        "memory": found.memory._asdict(),
        "collectives": [c._asdict() for c in found.collectives],
        "flops": None if math.isnan(found.flops) else found.flops,
    }


def from_json(found: Mapping[str, Any]) -> Compiled:
    """What `to_json` wrote."""
    return Compiled(
        found["backend"],
        dict(found["axes"]),
        programs.Memory(**found["memory"]),
        math.nan if found["flops"] is None else found["flops"],
        found["instructions"],
        tuple(programs.Collective(**c) for c in found["collectives"]),
    )


def _main(asked: str, answer: str) -> None:
    request = json.loads(Path(asked).read_text(encoding="utf-8"))
    config = ConfigDict(request["config"])
    found = compile_on(jax.devices(), config, request["what"], request["axes"])
    Path(answer).write_text(json.dumps(to_json(found)), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
