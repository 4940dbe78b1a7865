"""Training as one call: `train(config, workdir)`. Called again, it goes on where it stopped."""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffjax import builders
from diffjax.core.random import sample_keys
from diffjax.core.types import Key
from diffjax.runs import (
    distributed,
    divergence,
    hosts,
    init_from,
    pictures,
    reading,
    speed,
    spread,
)
from diffjax.runs.model import Model
from diffjax.runs.update import build_update
from diffjax.runs.workdir import plain, versioned

_log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """step: updates made. finished: False where a signal ended the run after a save."""

    step: int
    finished: bool


def train(
    config: Any,
    workdir: str | Path,
    *,
    show_progress: bool = True,
    report: Callable[[str], None] = _log.info,
    profile: tuple[int, int] | None = None,
) -> Outcome:
    """Trains to `config.training.n_iters` updates, from the newest checkpoint if there is one.

    The figures go to metrics.jsonl and TensorBoard, checkpoints to checkpoints/, pictures to
    samples/ and, at the end, loss.png. SIGTERM or Ctrl-C saves before leaving. Runs on the mesh of
    `config.mesh`, by default all devices with the batch split over them. The number of updates is
    rounded up to a multiple of `n_jitted_steps`, as in the reference code. report: takes the table
    of what was loaded where the run begins with `config.training.init_from`. profile: (first,
    last), the steps between which a profiler's trace is written to profile/.

    Raises RunError or BuildError for a config or workdir that does not fit, CheckpointError for
    checkpoints that cannot be restored, Diverged where the loss or its gradient is not finite and
    `config.training.on_divergence` knows no way on (`runs.divergence`), SaveError where a
    checkpoint cannot be written: the ones before are then whole, and training goes on from there.
    """
    from diffjax.train import checkpoint, telemetry, tracing

    workdir, training = Path(workdir), config.training
    policy = divergence.build_policy(config)
    job = prepare(config, workdir)
    k = training.n_jitted_steps
    n_steps = -(-training.n_iters // k) * k
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(checkpoint.Checkpointer(workdir, **job.keep))
        start = checkpointer.latest_step() or 0
        progress = (
            stack.enter_context(telemetry.progress_bar(n_steps, step=start))
            if show_progress and hosts.is_first()
            else telemetry.no_progress
        )
        options: dict[str, Any] = {
            "n_steps": n_steps,
            "n_jitted_steps": k,
            "progress": progress,
            "stop": stack.enter_context(distributed.stop_requested(start, k)),
            "machine": speed.machine(config, job.parts, job.devices),
        }
        if profile is not None:
            traced = tracing.trace_steps(workdir / "profile", *profile)
            options["tracer"] = stack.enter_context(traced)
        course = divergence.Course(policy, workdir, job.batches, k)
        with distributed.losses_end():
            result = course.run(
                lambda: _attempt(job, config, workdir, checkpointer, course, report, options)
            )
        checkpointer.wait()
    if result.finished and hosts.is_first():
        rows = telemetry.read_jsonl(workdir / "metrics.jsonl")
        pictures.write_figure(workdir / "loss.png", pictures.curves(rows, ("loss", "eval_loss")))
    return Outcome(int(result.state.step), result.finished)


def _attempt(
    job: "Job",
    config: Any,
    workdir: Path,
    checkpointer: Any,
    course: divergence.Course,
    report: Callable[[str], None],
    options: dict[str, Any],
) -> Any:
    """Trains from the newest checkpoint to the end, a stop or Diverged. options: of `loop.fit`."""
    from diffjax.train import keep, loop, telemetry

    training = config.training
    figures = keep.Newest(training.keep.metric)
    save = functools.partial(_save, config, checkpointer, course, figures)
    current, position = _current_state(job, config, checkpointer, save, report)
    start = int(current.step)
    if start:
        _log.info("Going on from step %d in %s.", start, workdir)
    batches = course.begin(start, current.key, position)
    with (
        reading.groups(config, job.devices, batches, start) as groups,
        _writers(workdir, start) as files,
    ):
        writer = telemetry.MultiWriter([files, figures])
        return loop.fit(
            current,
            groups,
            step_fn=job.step_fn,
            log_every=training.log_freq,
            writer=writer,
            hooks=_hooks(config, job.parts, workdir, writer),
            save=save,
            checkpoint_every=training.snapshot_freq_for_preemption,
            tolerance=course.tolerance(start),
            **options,
        )


class Job(NamedTuple):
    """What a config and a workdir say of a run, before there is a state."""

    parts: builders.Parts
    devices: Mesh
    create: Any  # key, leaves of other weights by name -> the state before the first update
    like: Any  # such a state's shapes, types and places
    batches: Any
    loss_fn: Any
    step_fn: Any
    keep: Any  # which checkpoints stay
    start: init_from.Start | None  # weights to begin with


def prepare(config: Any, workdir: Path) -> Job:
    """Builds and checks everything, and only then claims the workdir."""
    from diffjax.data import TrainBatches, in_memory
    from diffjax.train import mesh

    parts = builders.build_parts(config)
    source = builders.build_source(config, "train")
    if not builders.is_classifier(config):
        builders.build_sampling(config, parts.process)  # a sampler that does not fit fails now
    builders.build_reading(config)
    devices = builders.build_mesh(config)
    made = build_update(config, parts, devices)
    keep = builders.build_keep(config)
    start = init_from.wanted(config, workdir, made.like.params)
    distributed.check_alike("config", json.dumps(plain(config), sort_keys=True))
    distributed.claim_together(workdir, config)
    share = mesh.batch_share(devices)
    batches = TrainBatches(
        in_memory(source) if _fits(source.info) else source,
        batch_size=config.training.batch_size,
        seed=config.seed,
        process_index=share.part,
        process_count=share.parts,
    )
    update = made._asdict()
    return Job(parts, devices, batches=batches, keep=keep, start=start, **update)


def _save(
    config: Any,
    checkpointer: Any,
    course: divergence.Course,
    figures: Any,
    step: int,
    state: Any,
) -> None:
    """Saves a checkpoint with all that a run needs to go on."""
    position, stored = course.position(step), versioned(config)
    checkpointer.save(step, state, position=position, config=stored, figures=figures.of(step))


def _current_state(
    job: Job, config: Any, checkpointer: Any, save: Any, report: Callable[[str], None]
) -> tuple[Any, Any]:
    """A new state and None, or the newest checkpoint's and its data's position, on the devices."""
    if checkpointer.latest_step() is None:
        layout = jax.tree.map(lambda leaf: leaf.sharding, job.like)
        create = jax.jit(job.create, out_shardings=layout)
        key = jax.random.key(config.seed)
        if job.start is None:
            return create(key), None
        if hosts.is_first():
            report(job.start.table())
        begun = create(key, job.start.leaves)
        save(0, begun)  # from here on the source is not needed
        return begun, None
    current, meta = checkpointer.restore(job.like)
    job.batches.resume(meta.position)
    return current, meta.position


def _fits(info: Any, limit: int = 2**31) -> bool:
    """Whether the whole set may be held in memory: 2 GiB, CIFAR-10 with room to spare."""
    return info.size * int(np.prod(info.shape)) <= limit


@contextlib.contextmanager
def _writers(workdir: Path, start: int) -> Iterator[Any]:
    """The metric writers of the main process; none elsewhere."""
    from diffjax.train import telemetry

    if not hosts.is_first():
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
        weights = spread.on_local_devices(state.ema["main"])
        batch = batches[step // config.training.eval_freq]
        value = mean_loss(weights, key, spread.placed(spread.mesh_of(weights), batch))
        writer.write_scalars(step, {"eval_loss": float(value)})

    return run


def _snapshot(config: Any, parts: builders.Parts, workdir: Path, writer: Any) -> Any:
    """A hook: samples of the averaged weights as samples/<step>.png; the same keys each time."""

    def run(step: int, state: Any) -> None:
        model = Model(config, parts, spread.on_local_devices(state.ema["main"]), step)
        num = min(64, config.eval.num_samples)
        images = _drawn_together(model, sample_keys(jax.random.key(config.seed), num))
        grid = pictures.grid(pictures.to_bytes(images, parts.quantisation.levels))
        if hosts.is_first():
            pictures.write_png(workdir / "samples" / f"{step}.png", grid)
        writer.write_images(step, {"samples": grid[None]})

    return run


def _drawn_together(model: Model, keys: Key) -> np.ndarray:
    """An image a key, uint8 levels, each process drawing its part of them."""
    classes, num = model.parts.num_classes, len(keys)
    labels = None if classes is None else np.arange(num) % classes
    size = -(-num // hosts.count())
    starts = range(0, num, size)
    own = []
    for k in hosts.share(len(starts)):
        rows = np.arange(starts[k], min(starts[k] + size, num))
        given = None if labels is None else labels[rows]
        own.append(model.sample(keys[rows], len(rows), labels=given))
    return hosts.in_order(own, len(starts))
