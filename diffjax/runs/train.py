"""Training as one call: `train(config, workdir)`. Called again, it goes on where it stopped."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffjax import builders
from diffjax.core.random import sample_keys
from diffjax.core.types import Key
from diffjax.runs import pictures
from diffjax.runs.model import Model
from diffjax.runs.workdir import claim, plain

_log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """step: updates made. finished: False where a signal ended the run after a save."""

    step: int
    finished: bool


def train(config: Any, workdir: str | Path, *, show_progress: bool = True) -> Outcome:
    """Trains to `config.training.n_iters` updates, from the newest checkpoint if there is one.

    The figures go to metrics.jsonl and TensorBoard, checkpoints to checkpoints/, pictures to
    samples/ and, at the end, loss.png. SIGTERM or Ctrl-C saves before leaving. Runs on all devices,
    the batch split over them. The number of updates is rounded up to a multiple of
    `n_jitted_steps`, as in the reference code.

    Raises RunError or BuildError for a config or workdir that does not fit, CheckpointError for
    checkpoints that cannot be restored, Diverged where the loss is not finite.
    """
    from diffjax.data import prefetch
    from diffjax.train import checkpoint, loop, mesh, preempt, telemetry

    workdir, training = Path(workdir), config.training
    job = _prepare(config, workdir)
    k = training.n_jitted_steps
    n_steps = -(-training.n_iters // k) * k
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(
            checkpoint.Checkpointer(workdir, keep_every=training.snapshot_freq)
        )
        current = _current_state(job, config, checkpointer)
        start = int(current.step)
        if start:
            _log.info("Going on from step %d in %s.", start, workdir)
        writer = stack.enter_context(_writers(workdir, start))
        progress = (
            stack.enter_context(telemetry.progress_bar(n_steps, step=start))
            if show_progress
            else telemetry.no_progress
        )
        result = loop.fit(
            current,
            mesh.dispatch_batches(job.devices, prefetch(job.batches, start=start), k),
            step_fn=job.step_fn,
            n_steps=n_steps,
            n_jitted_steps=k,
            log_every=training.log_freq,
            writer=writer,
            progress=progress,
            hooks=_hooks(config, job.parts, workdir, writer),
            save=lambda at, state: checkpointer.save(
                at, state, position=job.batches.position(at), config=plain(config)
            ),
            checkpoint_every=training.snapshot_freq_for_preemption,
            stop=stack.enter_context(preempt.stop_on_signals()),
        )
        checkpointer.wait()
    if result.finished and jax.process_index() == 0:
        rows = telemetry.read_jsonl(workdir / "metrics.jsonl")
        pictures.write_figure(workdir / "loss.png", pictures.curves(rows, ("loss", "eval_loss")))
    return Outcome(int(result.state.step), result.finished)


class _Job(NamedTuple):
    """What a config and a workdir say of a run, before there is a state."""

    parts: builders.Parts
    devices: Mesh
    optimizer: Any
    batches: Any
    step_fn: Any


def _prepare(config: Any, workdir: Path) -> _Job:
    """Builds and checks everything, and only then claims the workdir."""
    from diffjax.data import TrainBatches, in_memory
    from diffjax.train import mesh, step

    parts = builders.build_parts(config)
    source = builders.build_source(config, "train")
    optimizer, schedule = builders.build_optimizer(config)
    if not builders.is_classifier(config):
        builders.build_sampling(config, parts.process)  # a sampler that does not fit fails now
    devices = mesh.make_mesh()
    mesh.check_batch_size(devices, config.training.batch_size)
    step_fn = step.compile_step(
        devices,
        loss_fn=builders.build_loss(config, parts, train=True),
        optimizer=optimizer,
        ema=builders.build_ema(config),
        schedule=schedule,
    )
    claim(workdir, config)
    batches = TrainBatches(
        in_memory(source) if _fits(source.info) else source,
        batch_size=config.training.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return _Job(parts, devices, optimizer, batches, step_fn)


def _current_state(job: _Job, config: Any, checkpointer: Any) -> Any:
    """A new state, or the newest checkpoint's with the data at its position, on the devices."""
    from diffjax.train import mesh, state

    key = jax.random.key(config.seed)
    create = functools.partial(_initial_state, job.parts, job.optimizer)
    sharding = mesh.replicated(job.devices)
    if checkpointer.latest_step() is None:
        return jax.jit(create, out_shardings=sharding)(key)
    current, meta = checkpointer.restore(state.abstract(jax.eval_shape(create, key), sharding))
    job.batches.resume(meta.position)
    return current


def _fits(info: Any, limit: int = 2**31) -> bool:
    """Whether the whole set may be held in memory: 2 GiB, CIFAR-10 with room to spare."""
    return info.size * int(np.prod(info.shape)) <= limit


def _initial_state(parts: builders.Parts, optimizer: Any, key: Key) -> Any:
    """The state before the first update."""
    from diffjax.train import state

    params_key, run_key = jax.random.split(key)
    return state.create_state(run_key, parts.init_params(params_key), optimizer)


@contextlib.contextmanager
def _writers(workdir: Path, start: int) -> Iterator[Any]:
    """The metric writers of the main process; none elsewhere."""
    from diffjax.train import telemetry

    if jax.process_index() != 0:
        yield telemetry.MultiWriter()
        return
    writer = telemetry.MultiWriter(
        [
            telemetry.JsonlWriter(workdir / "metrics.jsonl", last_step=start),
            telemetry.tensorboard_writer(workdir / "tensorboard"),
        ]
    )
    try:
        yield writer
    finally:
        writer.close()


def _hooks(config: Any, parts: builders.Parts, workdir: Path, writer: Any) -> list[Any]:
    """The loss on held-out images and, with each snapshot, a grid of samples."""
    from diffjax.train.loop import Hook

    training = config.training
    hooks = [Hook(training.eval_freq, _eval_loss(config, parts, writer))]
    if training.snapshot_sampling:
        hooks.append(Hook(training.snapshot_freq, _snapshot(config, parts, workdir, writer)))
    return hooks


def _eval_loss(config: Any, parts: builders.Parts, writer: Any) -> Any:
    """A hook: the averaged weights' loss on one held-out batch, drawn anew at each call."""
    from diffjax.data import TrainBatches

    source = builders.build_source(config, "eval")
    size = min(config.eval.batch_size, len(source))
    batches = TrainBatches(source, batch_size=size, seed=config.seed)
    loss_fn = builders.build_loss(config, parts, train=False)
    mean_loss = jax.jit(lambda params, key, batch: jnp.mean(loss_fn(params, key, batch)[0]))

    def run(step: int, state: Any) -> None:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        value = mean_loss(state.ema, key, batches[step // config.training.eval_freq])
        writer.write_scalars(step, {"eval_loss": float(value)})

    return run


def _snapshot(config: Any, parts: builders.Parts, workdir: Path, writer: Any) -> Any:
    """A hook: samples of the averaged weights as samples/<step>.png; the same keys each time."""

    def run(step: int, state: Any) -> None:
        model = Model(config, parts, state.ema, step)
        num = min(64, config.eval.num_samples)
        keys = sample_keys(jax.random.key(config.seed), num)
        labels = None if parts.num_classes is None else np.arange(num) % parts.num_classes
        images = model.sample(keys, num, labels=labels)
        grid = pictures.grid(pictures.to_bytes(images, parts.quantisation.levels))
        pictures.write_png(workdir / "samples" / f"{step}.png", grid)
        writer.write_images(step, {"samples": grid[None]})

    return run
