"""The host's loop: feed the device, read its figures late, save, and leave when asked.

The device is never kept waiting: batch k + 1 is read and step k + 1 dispatched while step k
runs, and figures are read two dispatches late. The host waits for the device only where it must:
before a hook and before a save.

Order at step s: figures of s, then hooks, then the writers are flushed, then the save. So a run
that is killed at any time and goes on from its last save writes again all that came after it, and
nothing else.
"""

import collections
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from diffjax.core import checks
from diffjax.core.types import PyTree
from diffjax.train.state import TrainState
from diffjax.train.step import Metrics, StepFn
from diffjax.train.telemetry import MetricWriter, MultiWriter, Progress, no_progress

_LAG = 2  # dispatches that the host may be ahead of the device


class Hook(NamedTuple):
    """Something done every `every` steps: a grid of samples, a loss on held-out images.

    run: (step, state) -> None. It must not keep the state, whose memory the next step takes over.
    """

    every: int
    run: Callable[[int, TrainState], None]


class FitResult(NamedTuple):
    """state: the last one. finished: False where `stop` ended the run early, after a save."""

    state: TrainState
    finished: bool


class Diverged(FloatingPointError):
    """The loss or its gradient is not finite. `step` is the update (counted from 1) that broke."""

    def __init__(self, step: int, name: str, value: float):
        super().__init__(
            f"Training diverged: {name} is {value} at step {step}. Nothing was saved since; resume "
            "from the last checkpoint with a lower learning rate, gradient clipping or a longer "
            "warm-up."
        )
        self.step = step


def fit(
    state: TrainState,
    batches: Iterator[PyTree],
    *,
    step_fn: StepFn,
    n_steps: int,
    n_jitted_steps: int = 1,
    log_every: int = 50,
    writer: MetricWriter | None = None,
    progress: Progress = no_progress,
    hooks: Sequence[Hook] = (),
    save: Callable[[int, TrainState], None] | None = None,
    checkpoint_every: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Trains from `state.step` to `n_steps` updates.

    state: donated. batches: groups (n_jitted_steps, B, ...) as `mesh.dispatch_batches` gives them,
    the first of them for update `state.step`. step_fn: from `step.compile_step`. n_steps and every
    frequency: in updates, multiples of n_jitted_steps. What is logged at a step is the mean over
    the updates of its dispatch, not over the interval, so that a resumed run logs the same.
    save: (step, state) -> None, every `checkpoint_every` updates (None: only at the end) and where
    `stop` becomes True, which is asked after each dispatch.
    Raises Diverged at a loss or gradient that is not finite, without saving, and ValueError for a
    frequency that does not fit or batches that run out.
    """
    step = int(state.step)
    _check_frequencies(
        n_jitted_steps,
        {
            "n_steps": n_steps,
            "log_every": log_every,
            "checkpoint_every": checkpoint_every,
            "the step to go on from": step,
        }
        | {f"hooks[{i}].every": hook.every for i, hook in enumerate(hooks)},
    )
    journal = _Journal(MultiWriter() if writer is None else writer, progress, log_every, n_steps)
    stopped = False
    while step < n_steps and not stopped:
        batch = _next(batches, step)
        state, metrics = step_fn(state, batch)
        step += n_jitted_steps
        journal.add(step, metrics, images=jax.tree.leaves(batch)[0].shape[1])
        stopped = stop()
        due = [hook for hook in hooks if step % hook.every == 0]
        saving = save is not None and (
            stopped or step == n_steps or (checkpoint_every and step % checkpoint_every == 0)
        )
        if not due and not saving:
            journal.read(lag=_LAG)
            continue
        journal.read(lag=0)
        for hook in due:
            hook.run(step, state)
        journal.flush()
        if save is not None and saving:
            save(step, state)
        journal.restart_clock(step)
    journal.read(lag=0)
    journal.flush()
    return FitResult(state, finished=step >= n_steps)


class _Journal:
    """The metrics of dispatches, in order, until they are read, checked and written."""

    def __init__(self, writer: MetricWriter, progress: Progress, log_every: int, n_steps: int):
        self._writer = writer
        self._progress = progress
        self._log_every = log_every
        self._n_steps = n_steps
        self._unread: collections.deque[tuple[int, Metrics, int]] = collections.deque()
        self._clock: tuple[int, float] | None = None  # a step, and when it was done

    def add(self, step: int, metrics: Metrics, images: int) -> None:
        """Notes the metrics (n,) of the dispatch that ends at `step`; `images` in an update."""
        for value in metrics.values():
            value.copy_to_host_async()
        self._unread.append((step, metrics, images))

    def read(self, lag: int) -> None:
        """Reads all but the newest `lag` dispatches, waiting for them. Raises Diverged."""
        while len(self._unread) > lag:
            step, metrics, images = self._unread.popleft()
            values = jax.device_get(metrics)
            _check_finite(step, values)
            if step % self._log_every == 0:
                self._log(step, values, images)
            if self._clock is None:  # from here on, so that compiling does not count
                self.restart_clock(step)

    def flush(self) -> None:
        self._writer.flush()

    def restart_clock(self, step: int) -> None:
        """Measures speed from `step`, just done: hooks and saves are not training."""
        self._clock = (step, time.monotonic())

    def _log(self, step: int, values: dict[str, np.ndarray], images: int) -> None:
        scalars = {name: float(np.mean(value)) for name, value in values.items()}
        left = {}
        if self._clock is not None and step > self._clock[0]:
            seconds = (time.monotonic() - self._clock[1]) / (step - self._clock[0])
            scalars["images_per_second"] = images / max(seconds, 1e-9)
            left["seconds_left"] = (self._n_steps - step) * seconds
            self.restart_clock(step)
        self._writer.write_scalars(step, scalars)
        self._progress(step, scalars | left)


def _check_finite(step: int, values: dict[str, np.ndarray]) -> None:
    n = len(values["loss"])
    for i in range(n):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name][i]):
                raise Diverged(step - n + i + 1, name, float(values[name][i]))


def _next(batches: Iterator[PyTree], step: int) -> PyTree:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"The batches ran out at step {step}; training needs an endless iterator."
        ) from None


def _check_frequencies(n_jitted_steps: int, frequencies: dict[str, int | None]) -> None:
    checks.at_least("n_jitted_steps", n_jitted_steps, 1)
    for name, value in frequencies.items():
        if value is None:
            continue
        checks.at_least(name, value, 0 if name.startswith("the step") else 1)
        if value % n_jitted_steps:
            raise ValueError(
                f"{name} must be a multiple of n_jitted_steps={n_jitted_steps}, the updates in one "
                f"dispatch; got {value}."
            )
