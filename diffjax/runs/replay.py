"""One update of a run again: `replay(workdir, step)`, for one that went wrong, or any other.

The newest checkpoint before the update, on the way that led to it (`runs.divergence`), is restored
and trained from with the same program, data and keys. On the same devices that repeats the run: on
a CPU to the last bit, on a GPU to the last bit if both ran with --deterministic. Nothing of the run
is changed; what is found goes to `workdir/replay/<step>.json`.

Symbols: an update is the N-th, counted from 1, of a dispatch of n. Its figures are those of the
run's own program. What that program does not tell, the loss of each image and the gradient of each
leaf, comes from another one, which rounds otherwise; and with n > 1 the state in the middle of a
dispatch is made by updates one at a time. There the figures agree to rounding. Both programs take
config.training.accumulate micro-batches one after another, and the memory of one.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import builders
from diffjax.core.files import write_atomic
from diffjax.runs import divergence, hosts
from diffjax.runs.workdir import RunError, read_config

SHOWN = ("loss", "grad_norm")


class Replayed(NamedTuple):
    """An update again. step: its number, from 1. checkpoint: the step begun from; 0 for a new run.

    batch: the number of its batch. figures: "loss" and "grad_norm" by the run's program. logged:
    what the run wrote of them, by name; {} where it wrote nothing. That is the update's own where
    `alone`, else the mean of its dispatch, `mean`. images: a row for each image of the batch: its
    index in the source, label, loss and what else the loss function reports. gradients: the norm of
    each leaf's gradient. first_bad: the first of weights, losses and gradients that is not finite;
    origin: the operation that made a NaN, and where. None where all is finite.
    """

    step: int
    checkpoint: int
    batch: int
    figures: dict[str, float]
    mean: dict[str, float]
    logged: dict[str, float]
    alone: bool
    images: list[dict[str, Any]]
    gradients: dict[str, float]
    first_bad: str | None
    origin: str | None

    @property
    def equal(self) -> bool | None:
        """Whether what was logged came again bit for bit; None where nothing was logged."""
        found = self.figures if self.alone else self.mean
        same = [repr(found[name]) == repr(value) for name, value in self.logged.items()]
        return all(same) if same else None

    def bad_images(self) -> list[dict[str, Any]]:
        """The images whose loss is not finite."""
        return [image for image in self.images if not math.isfinite(image["loss"])]


def replay(workdir: str | Path, step: int) -> Replayed:
    """Repeats update `step` >= 1 of a run, in one process, and writes what it found.

    Raises RunError for a step that the run has not made, and where there is no way back to it.
    """
    from diffjax.runs.train import prepare
    from diffjax.train import checkpoint, examine

    workdir = Path(workdir)
    config = read_config(workdir)
    if step < 1:
        raise RunError(f"--step counts updates from 1; got {step}.")
    if hosts.count() > 1:
        raise RunError("A replay runs in one process; leave the flags of several out.")
    shifts = divergence.read_shifts(workdir, step)
    job = prepare(config, workdir)
    with checkpoint.Checkpointer(workdir, writable=False) as checkpointer:
        _check_made(workdir, step, checkpointer)
        begun = _nearest(checkpointer, step, shifts)
        state = _restored(job, config, checkpointer, begun)
    batches = divergence.Shifted(job.batches, shifts)
    before, metrics, first = _to_dispatch(job, state, batches, step, config)
    place = step - 1 - first
    for n in range(first, step - 1):
        # One update at a time: the run's program has them together.
        before, _ = job.step_fn(before, _batch(job, batches, n, 1))
    batch = jax.tree.map(lambda leaf: leaf[0], _batch(job, batches, step - 1, 1))
    parts: dict[str, Any] = {
        "accumulate": builders.build_accumulate(config),
        "prepare": builders.build_prepare(config),
    }
    seen = jax.device_get(examine.examine(before, batch, job.loss_fn, **parts))
    bad = examine.first_bad(seen)
    number = divergence.batch_number(shifts, step - 1)
    figures = {name: np.asarray(metrics[name]) for name in SHOWN}
    logged, alone = _logged(workdir, step, config.training.n_jitted_steps)
    found = Replayed(
        step=step,
        checkpoint=begun,
        batch=number,
        figures={name: float(values[place]) for name, values in figures.items()},
        mean={name: float(np.mean(values)) for name, values in figures.items()},
        logged=logged,
        alone=alone,
        images=_images(seen, job.batches, number),
        gradients=examine.by_name(seen.gradients),
        first_bad=bad,
        origin=None if bad is None else examine.origin(before, batch, job.loss_fn, **parts),
    )
    _write(workdir, found)
    return found


def _nearest(checkpointer: Any, step: int, shifts: divergence.Shifts) -> int:
    """The newest checkpoint before `step` that the run with `shifts` came by; 0 for none."""
    for at in reversed([s for s in checkpointer.steps() if s < step]):
        own = divergence.as_shifts(checkpointer.meta(at).position.get("shifts", ()))
        if divergence.leads_to(shifts, at, own):
            return at
    return 0


def _check_made(workdir: Path, step: int, checkpointer: Any) -> None:
    """Raises RunError where there is no sign that the run made update `step`."""
    from diffjax.train.telemetry import read_jsonl

    rows = read_jsonl(workdir / "metrics.jsonl")
    made = [*checkpointer.steps(), *(row["step"] for row in rows), *divergence.dumped(workdir)]
    if step > max(made, default=0):
        raise RunError(
            f"--step={step} has not been made in {workdir}, which came to step "
            f"{max(made, default=0)}. Give one that it has."
        )


def _restored(job: Any, config: Any, checkpointer: Any, at: int) -> Any:
    """The state of a checkpoint, or of a new run."""
    if at in checkpointer.steps():
        state, meta = checkpointer.restore(job.like, at)
        job.batches.resume(meta.position)
        return state
    if config.training.get("init_from", ""):
        raise RunError(
            "There is no checkpoint before this step, and the run did not begin afresh but with "
            "config.training.init_from. Replay a later step."
        )
    layout = jax.tree.map(lambda leaf: leaf.sharding, job.like)
    return jax.jit(job.create, out_shardings=layout)(jax.random.key(config.seed))


def _to_dispatch(
    job: Any, state: Any, batches: Any, step: int, config: Any
) -> tuple[Any, Mapping[str, Any], int]:
    """Trains to the dispatch with update `step`.

    Returns the state before it, its metrics (n,), and the updates made before it.
    """
    n = config.training.n_jitted_steps
    at = int(state.step)
    while at + n < step:
        state, _ = job.step_fn(state, _batch(job, batches, at, n))
        at += n
    before = jax.tree.map(jnp.copy, state)  # the step takes its argument's memory over
    _, metrics = job.step_fn(state, _batch(job, batches, at, n))
    return before, jax.device_get(metrics), at


def _batch(job: Any, batches: Any, first: int, n: int) -> Any:
    """Batches `first` to first + n - 1 on the devices, (n, B, ...)."""
    from diffjax.train import mesh

    local = (batches[k] for k in range(first, first + n))
    return next(mesh.dispatch_batches(job.devices, local, n))


def _logged(workdir: Path, step: int, n: int) -> tuple[dict[str, float], bool]:
    """What the run wrote of the update itself, and True; else of its dispatch, and False."""
    from diffjax.train.telemetry import read_jsonl

    dump = divergence.read_dump(workdir, step)
    if dump is not None:
        return {name: float(dump[name]) for name in SHOWN}, True
    end = -(-step // n) * n
    for row in read_jsonl(workdir / "metrics.jsonl"):
        # null stands for a mean without a number, as where all updates were skipped.
        if row["step"] == end:
            return {name: row[name] for name in SHOWN if row.get(name) is not None}, n == 1
    return {}, n == 1


def _images(seen: Any, batches: Any, number: int) -> list[dict[str, Any]]:
    """A row for each image of batch `number`."""
    rows = len(seen.losses)
    columns = {name: v for name, v in seen.aux.items() if np.shape(v) == (rows,)}
    images = batches[number]
    found = []
    for i, index in enumerate(batches.indices(number)):
        row: dict[str, Any] = {"row": i, "index": int(index), "loss": float(seen.losses[i])}
        if "label" in images:
            row["label"] = int(images["label"][i])
        found.append(row | {name: float(v[i]) for name, v in columns.items()})
    return found


def _write(workdir: Path, found: Replayed) -> None:
    """Writes replay/<step>.json; numbers that JSON lacks as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return repr(value) if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(plain(found._asdict() | {"equal": found.equal}), indent=2)
    write_atomic(workdir / "replay" / f"{found.step}.json", text + "\n")
